"""The frozen base model: token ids, hidden states, logits, end tokens, number format, and models that cannot serve."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAT_TEMPLATE, SPECIAL, make_tiny_gemma
from models import make_model, refusal
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import base_model
from base_model import BaseLM, Literal
from support import machine
from support.command import UserError

BOS, TURN, END = SPECIAL.index("<bos>"), SPECIAL.index("<turn>"), SPECIAL.index("<end>")
TEXTS = ["", " ", "  two  spaces ", "\n\n\ttab\tand\r\nline \n", "naïve façade – 東京 Ωμέγα", "😀👩‍👩‍👧 e\u0301",
         "a\x00b\x7f\u00a0\u200b", "Hello , world . Don 't !", "<0x41> <0xE2>", "x=1234567890;",
         "a <unk> b<pad><bos><eos><turn>user\n<end>", "<<eos>> < eos> <eos", "<bos>first", "\ud7ff\U0010ffff"]


@pytest.fixture
def tokenizer(tiny_gemma):
    """A tokenizer that a test may change."""
    return AutoTokenizer.from_pretrained(tiny_gemma)


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_comes_back_and_holds_no_special_token_but_bos_in_front(base, text):
    ids = base.encode(text)
    assert ids[0] == BOS and not set(ids[1:]) & set(range(len(SPECIAL)))
    assert base.tokenizer.decode(ids[1:]) == text


def test_special_names_in_a_literal_are_marks_and_in_strings_letters(base):
    ids = base.encode([Literal("<turn>user\n"), "Is <end> a <turn>?", Literal("<end>\n")])
    assert [i for i in ids if i < len(SPECIAL)] == [BOS, TURN, END]
    assert base.tokenizer.decode(ids) == "<bos><turn>user\nIs <end> a <turn>?<end>\n"
    assert base.encode("<turn>") != base.encode(Literal("<turn>")) == [BOS, TURN]


def test_a_token_that_the_vocabulary_only_marks_as_special_is_a_mark_too(base, tokenizer):
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    assert "<tool>" not in tokenizer.all_special_tokens  # it has no role
    model = BaseLM(base.model, tokenizer)
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    model.vocabulary = tool + 1  # as if the model knew it
    assert model.encode(Literal("<tool>Why?")) == [BOS, tool, *base.encode("Why?")[1:]]
    assert model.encode("<tool>Why?") == base.encode("<tool>Why?") and tool not in base.encode("<tool>Why?")


def test_a_name_that_is_half_literal_and_half_string_is_letters(base):
    assert base.encode([Literal("<tu"), "rn>"]) == base.encode("<turn>") != [BOS, TURN]


def test_plain_text_between_two_marks_is_read_in_one_piece(base):
    whole = base.encode([Literal("<turn>the tenant shall keep<end>")])
    for cut in range(1, 20):
        text = "the tenant shall keep"
        assert base.encode([Literal("<turn>" + text[:cut]), text[cut:], Literal("<end>")]) == whole
    assert base.encode(["the ten", "ant"]) == base.encode("the tenant")


def test_bos_stands_in_front_once(base):
    plain = base.encode("Why?")
    assert plain.count(BOS) == 1 and base.encode([Literal("<bos>"), "Why?"]) == plain
    assert base.encode([Literal("<bos>Why?")]) == plain
    assert base.encode([]) == base.encode("") == [BOS]


def test_a_tokenizer_without_bos_begins_with_its_end_token(base, tokenizer):
    tokenizer.bos_token = None
    other = BaseLM(base.model, tokenizer)
    assert other.encode("Why?") == [other.eos, *base.encode("Why?")[1:]]


MODELS = [(Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 16, "sliding_window": 8}),
          (PhiForCausalLM, PhiConfig, {"partial_rotary_factor": 0.5}), (LlamaForCausalLM, LlamaConfig, {})]


@pytest.fixture(scope="module", params=MODELS, ids=["soft cap and sliding window", "bias", "untied head"])
def any_base(request, base):
    model_class, config_class, more = request.param
    model = make_model(model_class, config_class, **more)
    if model_class is PhiForCausalLM:
        torch.nn.init.normal_(model.lm_head.bias)
    return BaseLM(model, base.tokenizer)


def test_hidden_states_give_the_models_own_logits(any_base, base):
    for model in (any_base, base):
        ids = torch.randint(6, 512, (2, 20))
        torch.testing.assert_close(model.logits(model.hidden(ids)), model.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_cached_hidden_states_equal_uncached_ones(any_base):
    ids, cache = torch.randint(6, 512, (1, 20)), any_base.new_cache()
    pieces = [any_base.hidden(part, cache) for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:11], ids[:, 11:])]
    torch.testing.assert_close(torch.cat(pieces, 1), any_base.hidden(ids), atol=1e-4, rtol=1e-4)


def test_a_model_that_ignores_the_cache_is_refused(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=512, hidden_size=32, state_size=8, num_hidden_layers=2, initializer_range=0.3)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "choose a Transformer as base model" in refusal(str(tmp_path))


def forgets(hidden, ids, cache):
    return hidden(ids)


def gives_no_number(hidden, ids, cache):
    return hidden(ids, cache) * torch.nan


def raises(hidden, ids, cache):
    raise RuntimeError("no keys and\nvalues here")


@pytest.mark.parametrize(("cached", "said"), [
    (forgets, "differs from an uncached one"), (gives_no_number, "differs from an uncached one"),
    (raises, r"cannot go on from a cache .*\(no keys and values here\)")])
def test_a_model_whose_cached_step_is_wrong_is_refused_in_words(base, monkeypatch, cached, said):
    real = BaseLM.hidden
    monkeypatch.setattr(BaseLM, "hidden", lambda self, ids, cache=None: real(self, ids) if cache is None
                        else cached(lambda *a: real(self, *a), ids, cache))
    with pytest.raises(UserError, match=said) as error:
        BaseLM(base.model, base.tokenizer, "x")
    assert "choose a Transformer as base model" in str(error.value) and "\n" not in str(error.value)


def test_few_lengths_are_read_in_bfloat16_and_the_states_stay_the_same(any_base, base, monkeypatch):
    half = BaseLM(copy.deepcopy(any_base.model).bfloat16(), base.tokenizer)
    real, read = half.decoder.forward, []
    monkeypatch.setattr(half.decoder, "forward", lambda ids, **more: read.append(ids.shape[1]) or real(ids, **more))
    ids, cache = torch.randint(6, 512, (1, 45)), half.new_cache()
    slides = any(cache.is_sliding)  # a window that slides could not take padding back
    pieces = [half.hidden(part, cache) for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:11], ids[:, 11:])]
    assert read == ([9, 1, 1, 34] if slides else [32, 1, 1, 64]) and cache.get_seq_length() == 45
    whole = half.hidden(ids)
    assert (torch.cat(pieces, 1) - whole).norm() < 0.05 * whole.norm()
    monkeypatch.setattr(half, "max_positions", 31)
    half.hidden(ids[:, :9], half.new_cache())  # no position behind the last one that the model knows
    assert read[-1] == 9
    assert half.hidden(ids[:, :9]).shape[1] == 9 and read[-1] == 9  # without a cache nothing is padded


def test_the_rounding_of_bfloat16_is_not_refused(any_base, base, monkeypatch):
    few = 1 + 4 * torch.finfo(torch.bfloat16).eps  # the difference that a deep model's cached step may have
    for wrong in (False, True):
        monkeypatch.setattr(base_model.BaseLM, "hidden", wrong_by(few) if wrong else BaseLM.hidden)
        for model in (any_base, base):
            assert BaseLM(copy.deepcopy(model.model).bfloat16(), base.tokenizer).model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="differs from an uncached one"):
        BaseLM(base.model, base.tokenizer, "x")  # in float32 it cannot be rounding


def wrong_by(factor):
    """BaseLM.hidden with states that are too large by a factor wherever there is a cache."""
    real = BaseLM.hidden
    return lambda self, ids, cache=None: real(self, ids, cache) * (1 if cache is None else factor)


def test_another_dtype_leaves_a_models_own_tables_as_they_are():
    model = make_model(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)
    angles = model.model.rotary_emb.inv_freq.clone()
    base_model.recast(model, torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, angles) and angles.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # tied weights stay one


def test_a_model_that_scales_its_logits_behind_the_head_is_refused(base):
    BaseLM(make_model(GraniteForCausalLM, GraniteConfig, logits_scaling=1.0), base.tokenizer)
    with pytest.raises(UserError, match="choose another base model"):
        BaseLM(make_model(GraniteForCausalLM, GraniteConfig, logits_scaling=8.0), base.tokenizer)


def test_a_model_without_output_embeddings_is_refused(base, monkeypatch):
    model = make_model(LlamaForCausalLM, LlamaConfig)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(UserError, match="no output embeddings"):
        BaseLM(model, base.tokenizer, "x")


def test_every_end_token_counts(tokenizer):
    model = make_model(LlamaForCausalLM, LlamaConfig)
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [8, 9, 100_000]
    assert BaseLM(model, tokenizer).ends == {tokenizer.eos_token_id, 7, 8, 9, END}
    tokenizer.chat_template = None
    assert BaseLM(model, tokenizer).ends == {tokenizer.eos_token_id, 7, 8, 9}
    tokenizer.eos_token = None
    assert BaseLM(model, tokenizer).ends == {7, 8, 9}


def test_a_list_of_end_tokens_in_the_folder_counts(tiny_gemma, tmp_path):
    folder = shutil.copytree(tiny_gemma, tmp_path / "two")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 300]}))
    assert BaseLM.load(str(folder), device="cpu").ends >= {1, 300, END}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE.replace("<end>", ""), "{{ raise_exception('no') }}", "{% broken"])
def test_a_chat_template_without_an_end_of_turn_adds_no_end(base, tokenizer, template):
    tokenizer.chat_template = template
    assert BaseLM(base.model, tokenizer).ends == base.ends - {END}


def test_a_model_whose_answers_would_never_end_is_refused(tokenizer):
    model = make_model(LlamaForCausalLM, LlamaConfig)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        BaseLM(model, tokenizer)


def test_models_are_told_apart_by_their_weights_and_not_by_their_dtype(tiny_gemma, base, tmp_path):
    same = BaseLM.load(str(tiny_gemma), dtype="bfloat16", device="cpu")
    other = BaseLM.load(str(make_tiny_gemma(tmp_path, seed=1)), "float32", "cpu")
    assert same.model.dtype == torch.bfloat16 != base.model.dtype
    assert same.fingerprint == base.fingerprint != other.fingerprint


def test_models_are_told_apart_by_their_vocabulary(base, tokenizer):
    tokenizer.add_tokens(["another"])
    assert BaseLM(base.model, tokenizer).fingerprint != base.fingerprint


@pytest.mark.parametrize(("fast", "memory", "expected"), [
    (True, 0, torch.bfloat16), (False, 2**40, torch.float32), (False, 0, torch.bfloat16)])
def test_dtype_auto_is_bfloat16_where_that_is_fast_and_else_float32_where_it_fits(
        tiny_gemma, tmp_path, monkeypatch, fast, memory, expected):
    folder = shutil.copytree(tiny_gemma, tmp_path / "model")
    BaseLM.load(str(tiny_gemma), "bfloat16", "cpu").model.save_pretrained(folder)
    asked = []
    monkeypatch.setattr(base_model, "fast_bfloat16", lambda device: asked.append(device) or fast)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    assert BaseLM.load(str(folder), device="cpu").model.dtype == expected and asked == ["cpu"]
    assert BaseLM.load(str(folder), "float16", "cpu").model.dtype == torch.float16


def test_a_tokenizer_with_more_tokens_than_the_model_is_named_and_not_an_index_error(base, tiny_gemma):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma)
    tokenizer.add_tokens(["landlord"])
    larger = BaseLM(base.model, tokenizer, "tiny")
    assert larger.encode("a cat") == base.encode("a cat")
    with pytest.raises(UserError, match="gives the token 512, but the model has only 512"):
        larger.encode("my landlord")
