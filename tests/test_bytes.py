"""Tokens that are pieces of a character: streamed, shown as candidates, in the log probabilities and in the terminal."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SPECIAL, make_decoder, make_tokenizer
from runs import jsonl, train_six
from test_generation import force_tokens
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

import app
from base_model import BaseLM
from chat import END, Chat
from generation import DecodedText, MemoryAugmentedLM, Settings, token_bytes
from memory_decoder import read_manifest
from support.command import whole_text
from texts import Template
from web import panels
from web.api import Api

SENTENCES = ["房东可以保留我的押金吗？", "可以，但他必须说明理由。", "我可以录音吗？🙂", "可以录音🎉，但要先问😀。",
             "naïve café, “ok” 👩‍👩‍👧!"]
QUESTION = SENTENCES[0]


def byte_level():
    """A tokenizer like GPT-2's: 256 bytes and few merges, so that most characters take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def llama_like():
    """A tokenizer like Llama's: bytes only for rare characters, and no space in front of a text's first word."""
    tokenizer = make_tokenizer(["So it is. Yes, ok."] * 3).backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a byte-level tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("byte_level"), byte_level()
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=len(tokenizer) + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
                         initializer_range=0.3, eos_token_id=0, bos_token_id=0, pad_token_id=1)
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    base = BaseLM.load(str(folder), "float32", "cpu")
    return MemoryAugmentedLM(base, make_decoder(vocab=base.vocabulary), Template.parse("问：{q}\n答：{a}"))


@pytest.fixture(scope="module")
def trained_folder(folder, tmp_path_factory):
    """A memory of Chinese rows. Its folder's name has a space and letters that are not ASCII."""
    place = tmp_path_factory.mktemp("里面")
    rows = jsonl(place / "rows.jsonl", [{"q": f"{i} {SENTENCES[i % 5]}", "a": SENTENCES[(i + 1) % 5] + str(i)} for i in range(12)])
    return train_six(folder, rows, place / "mémoire ひとつ", "--template", "问：{q}\n答：{a}")


@pytest.fixture(scope="module")
def chat(trained_folder):
    return Chat.open(app.Options(model_dir=str(trained_folder), device="cpu"), read_manifest(trained_folder))


@pytest.mark.parametrize(("text", "whole"), [
    ("\ud800 hello", "\ufffd hello"), ("a\ud800", "a\ufffd"), ("\udc00", "\ufffd"), ("\ud83d\ude42!", "🙂!"),
    ("\ude42\ud83d", "\ufffd\ufffd"), ("\ud83d\ud83d\ude42\ude42", "\ufffd🙂\ufffd"),
    (b"caf\xe9".decode("utf-8", "surrogateescape"), "caf\ufffd"),
    ("\ufeffa\x00\x1b[31m\ufffe 好🙂\r\n", "\ufeffa\x00\x1b[31m\ufffe 好🙂\r\n"), ("", "")], ids=ascii)
def test_each_lone_half_of_a_surrogate_pair_becomes_one_mark_and_nothing_else_changes(text, whole):
    assert whole_text(text) == whole


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def streamed(model, tokens, monkeypatch, **more):
    force_tokens(monkeypatch, tokens)
    return [step.text for step in model.stream("x", Settings(), len(tokens), **more)]


@pytest.mark.parametrize("make", [byte_level, llama_like])
@pytest.mark.parametrize("text", [*SENTENCES, "".join(SENTENCES), " a  b\t\n c", "it's \ufffd, \x00\x07 ok"])
def test_a_texts_tokens_hold_its_bytes_and_come_out_as_it_was(make, text):
    tokenizer = make()
    ids, decoded = ids_of(tokenizer, text), DecodedText(tokenizer)
    assert b"".join(token_bytes(tokenizer, token) for token in ids).lstrip() == text.encode().lstrip()
    shown = [decoded.add(token) for token in ids]
    assert "".join(shown).lstrip() == text.lstrip() and decoded.flush() == ""


def test_special_tokens_and_numbers_beyond_the_vocabulary_have_no_bytes():
    tokenizer = byte_level()
    assert [token_bytes(tokenizer, token) for token in (0, 1, len(tokenizer) + 3)] == [b""] * 3
    assert token_bytes(llama_like(), SPECIAL.index("<end>")) == b""


def test_no_broken_character_is_shown_however_its_bytes_are_cut(model, monkeypatch):
    text = "".join(SENTENCES)
    for tokens in (ids_of(model.base.tokenizer, text), one_byte_tokens(model.base.tokenizer, text)):
        assert len(tokens) > len(text)
        pieces = streamed(model, tokens, monkeypatch)
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 20


def one_byte_tokens(tokenizer, text):
    known = {token_bytes(tokenizer, token): token for token in range(len(tokenizer))}
    return [known[bytes([byte])] for byte in text.encode()]


def test_a_piece_of_a_character_that_ends_an_answer_is_seen_as_such(model, monkeypatch):
    tokens = one_byte_tokens(model.base.tokenizer, "好🙂")
    for cut, shown in ((3, "好"), (4, "好\ufffd"), (6, "好\ufffd"), (7, "好🙂")):
        assert "".join(streamed(model, tokens[:cut], monkeypatch)) == shown
    assert "".join(streamed(model, [*tokens[:5], 0, 9], monkeypatch)) == "好\ufffd"  # where the model itself ends it


def test_an_answer_goes_on_from_the_middle_of_a_character(model, monkeypatch):
    tokens = one_byte_tokens(model.base.tokenizer, "好🙂!")
    force_tokens(monkeypatch, tokens[5:])
    assert [step.text for step in model.stream("x", Settings(), len(tokens), kept=tokens[:5])] == ["", "🙂", "!"]


def test_a_stop_text_of_several_bytes_a_letter_ends_an_answer(model, monkeypatch):
    tokens = one_byte_tokens(model.base.tokenizer, "可以。\n问题？\n问：还有吗")
    assert "".join(streamed(model, tokens, monkeypatch)) == "可以。\n问题？"


def test_no_run_of_tokens_comes_twice(model):
    drawn = [step.token for step in model.stream(QUESTION, Settings(temperature=0, no_repeat=2), 60)]
    assert len({*itertools.pairwise(drawn)}) == len(drawn) - 1 > 20


def test_a_piece_of_a_character_is_shown_as_its_bytes(chat):
    tokenizer = chat.model.base.tokenizer
    known = {token_bytes(tokenizer, token): token for token in range(len(tokenizer))}
    assert chat.show(known["🙂".encode()[:1]]) == "<F0>" and chat.show(known[b"a"]) == "a" and chat.show(known[b" "]) == " "
    shown = {chat.show(token): own for own, token in known.items() if own}
    assert len(shown) == len(known) - 1 and not any("\ufffd" in text for text in shown)
    longer = {text: own for text, own in shown.items() if re.fullmatch("<..( ..)+>", text)}
    assert longer and all(bytes.fromhex(text[1:-1]) == own for text, own in longer.items())
    assert chat.show(0) == END and chat.show(1) == "<pad>"


def test_bytes_and_whole_characters_of_one_token_stand_side_by_side(chat, monkeypatch):
    monkeypatch.setattr("chat.token_bytes", lambda tokenizer, token: " 好".encode() + b"\xf0\x9f")
    assert chat.show(5) == " 好<F0 9F>"


def test_the_page_shows_the_bytes_of_a_candidate(chat):
    answer = chat.begin(QUESTION, temperature=0, max_new_tokens=30, alpha=0)
    for _ in chat.write(answer):
        pass
    pieces = [(i, c) for i, token in enumerate(answer.tokens) for c in token["candidates"] if c["text"].startswith("<")]
    i, piece = max(pieces, key=lambda found: found[1]["blended"])
    assert "&lt;" + piece["text"][1:3] in panels.candidates(answer, i) and "\ufffd" not in panels.candidates(answer, i)


def test_log_probabilities_hold_every_tokens_own_bytes(chat, monkeypatch):
    tokens = [*one_byte_tokens(chat.model.base.tokenizer, "好🙂"), 0]
    force_tokens(monkeypatch, tokens)
    *_, (text, found) = Api(chat, {}).chat(QUESTION, history=[[QUESTION, "好"]])
    content = json.loads(json.dumps(found))["content"]
    assert text == "好🙂" == "".join(entry["token"] for entry in content)
    assert b"".join(bytes(entry["bytes"]) for entry in content) == text.encode() and [e["id"] for e in content] == tokens
    for entry in content:
        own = next(top for top in entry["top_logprobs"] if top["id"] == entry["id"])
        assert own["bytes"] == entry["bytes"] and "\ufffd" not in own["token"]
    assert (content[-1]["token"], content[-1]["bytes"]) == ("", []) == (own["token"], own["bytes"])


@pytest.mark.parametrize(("variables", "codec"), [
    ({"PYTHONIOENCODING": "ascii"}, "ascii"),
    ({"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ascii")], ids=str)
def test_an_answer_is_printed_as_far_as_the_terminal_knows_its_letters(trained_folder, chat, tmp_path, variables, codec):
    *_, answer = chat.write(chat.begin("Why?", seed=3, temperature=2, alpha=0.5, max_new_tokens=256))
    assert not answer.text.isascii()
    copy = shutil.copytree(trained_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("stages"))  # faiss needs a plain path
    arguments = ["--model_dir", copy, "--ask", "Why?", "--device", "cpu", "--seed", "3.0", "--temperature", "2", "--alpha", "0.5"]
    done = subprocess.run([sys.executable, ROOT / "app.py", *arguments], capture_output=True, cwd=ROOT, env=os.environ | variables)
    assert done.returncode == 0 and done.stdout == (answer.text + "\n").encode(codec, "backslashreplace"), done.stderr
