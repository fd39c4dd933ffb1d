"""Base models in GGUF files: what is read from them, the folder they are unpacked into, the demo's package, and what is refused."""

import errno
import hashlib
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from models import make_model, refusal
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import base_model
from base_model import BaseLM

# A tiny Llama in a GGUF file, with a byte-level tokenizer and the splitting rule of the demo's model.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "12", "Ġt", "Ġth", "Ġthe"]
MERGES = ["1 2", "Ġ t", "Ġt h", "Ġth e"]
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write_gguf(path, model, without="", quantization=None, template=None, eos=2):
    """Write the model as a GGUF file, except the weight named `without`. quantization: of all matrices."""
    config, writer = model.config, GGUFWriter(path, "llama")
    for add, value in ((writer.add_context_length, config.max_position_embeddings), (writer.add_vocab_size, len(TOKENS)),
                       (writer.add_embedding_length, config.hidden_size), (writer.add_block_count, config.num_hidden_layers),
                       (writer.add_feed_forward_length, config.intermediate_size), (writer.add_rope_freq_base, 10_000.0),
                       (writer.add_head_count, config.num_attention_heads), (writer.add_head_count_kv, config.num_key_value_heads),
                       (writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_rope_dimension_count, config.head_dim),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
                       (writer.add_token_list, TOKENS), (writer.add_token_types, [3] * 3 + [1] * (len(TOKENS) - 3)),
                       (writer.add_token_merges, MERGES), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, eos)):
        add(value)
    if template:
        writer.add_chat_template(template)
    for name, weight in model.named_parameters():
        name, weight = name.removesuffix(".weight"), weight.detach().numpy()
        if name.startswith("model.layers."):
            _, _, number, part = name.split(".", 3)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(part)
            if heads:  # llama.cpp rotates pairs of neighbours where transformers rotates halves
                weight = weight.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(weight.shape)
            name = f"blk.{number}.{NAMES[part]}"
        if NAMES.get(name, name) != without:
            weight, kind = np.ascontiguousarray(weight), quantization if weight.ndim == 2 else None
            writer.add_tensor(f"{NAMES.get(name, name)}.weight", quantize(weight, kind) if kind else weight, raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


@pytest.fixture(scope="module")
def tiny_llama():
    model = make_model(LlamaForCausalLM, LlamaConfig)
    model.resize_token_embeddings(len(TOKENS))
    for weight in model.parameters():
        weight.data = weight.bfloat16().float()
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path, tiny_llama):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_opens_as_the_model_that_it_was_written_from(gguf_file, tiny_llama, cache):
    loaded = BaseLM.load(str(gguf_file), "float32", "cpu")
    ids = torch.tensor([loaded.encode("the 12 cats in the hat")])
    torch.testing.assert_close(loaded.logits(loaded.hidden(ids)), tiny_llama(ids).logits, atol=1e-4, rtol=1e-4)
    assert loaded.name == str(gguf_file) and (loaded.bos, loaded.eos) == (1, 2)
    pieces = loaded.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert pieces[:7] == ["<|im_start|>", "t", "h", "e", "Ġ", "1", "2"] and pieces[-6:] == ["n", "Ġthe", "Ġ", "h", "a", "t"]


QWEN_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_a_quantized_gguf_file_keeps_its_weights_to_the_last_bit_and_its_chat_template(tmp_path, tiny_llama, cache, name):
    kind = GGMLQuantizationType[name]
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, quantization=kind, template=QWEN_TEMPLATE, eos=0)
    loaded = BaseLM.load(str(tmp_path / "tiny.gguf"), "bfloat16", "cpu")
    expected = dict(tiny_llama.named_parameters())
    assert loaded.model.dtype == torch.bfloat16
    for weight_name, weight in loaded.model.named_parameters():
        exact = expected[weight_name].detach()
        if exact.ndim == 2:  # rotation moves whole rows of queries and keys, and blocks lie within rows
            exact = torch.from_numpy(dequantize(quantize(exact.numpy(), kind), kind))
            assert not torch.equal(exact, expected[weight_name])
        assert torch.equal(weight, exact.bfloat16()), weight_name
    assert loaded.tokenizer.chat_template == QWEN_TEMPLATE
    assert loaded.ends == {0, TOKENS.index("<|im_end|>")}  # the second only ends a turn


def test_a_gguf_file_is_converted_once(gguf_file, cache, monkeypatch):
    first, made = BaseLM.load(str(gguf_file), device="cpu"), list(cache.iterdir())
    monkeypatch.setattr(base_model, "with_own_pre_tokenizer", lambda *_: pytest.fail("the file was read again"))
    again = BaseLM.load(str(gguf_file), device="cpu")
    assert len(made) == 1 and list(cache.iterdir()) == made
    assert again.fingerprint == first.fingerprint and again.encode("the 12 cats") == first.encode("the 12 cats")


def test_another_gguf_file_of_the_same_name_is_another_model(gguf_file, cache, tiny_llama):
    first = BaseLM.load(str(gguf_file), device="cpu")
    other = make_model(LlamaForCausalLM, LlamaConfig)
    other.resize_token_embeddings(len(TOKENS))
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    write_gguf(gguf_file, other)
    assert BaseLM.load(str(gguf_file), device="cpu").fingerprint != first.fingerprint
    assert len(list(cache.iterdir())) == 2


def cut(content):
    return [content[:0], content[:3], content[:100], content[:30_000], content[:-10]]


def numbered(content):
    return [content[:4] + struct.pack("<I", version) + content[8:] for version in (1, 99)]


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5000000000\n".encode()
BROKEN = [("cut short", cut, ["it is incomplete or damaged", "download it again"]),
          ("a pointer", lambda _: [POINTER], ["only a Git LFS pointer", "git lfs pull", "download it again"]),
          ("not GGUF", lambda _: [b"some text", bytes(5000), b"PK\x03\x04" * 99], ["not in the GGUF format", "--base_model"]),
          ("architecture", lambda content: [content.replace(b"llama", b"quuxx")], ["architecture quuxx", "--base_model"]),
          ("version", numbered, ["this reader handles v2 and v3", "--base_model"])]


@pytest.mark.parametrize(("damage", "said"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_gguf_file_is_one_sentence_and_leaves_nothing(gguf_file, cache, damage, said):
    for content in damage(gguf_file.read_bytes()):
        gguf_file.write_bytes(content)
        sentence = refusal(str(gguf_file))
        assert f"The GGUF file {gguf_file} cannot be read: " in sentence and all(part in sentence for part in said)
        assert not list(cache.iterdir())


def test_one_part_of_a_gguf_file_says_how_to_join_them(tmp_path, tiny_llama, cache):
    part = tmp_path / "tiny-00002-of-00003.gguf"
    write_gguf(part, tiny_llama, without="blk.1.ffn_up")
    assert "one part of several" in refusal(str(part)) and "--merge" in refusal(str(part))


def test_a_gguf_file_with_spaces_and_foreign_letters_in_its_path_opens(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "CACHE", tmp_path / "Zwischen\u00adspeicher 東京")
    (tmp_path / "mit Leerzeichen é").mkdir()
    other = gguf_file.rename(tmp_path / "mit Leerzeichen é" / "ein Modell Ω.GGUF")
    assert BaseLM.load(str(other), device="cpu").encode("the 12")[0] == 1


def test_a_full_disk_or_memory_while_a_gguf_file_is_unpacked_is_said(gguf_file, cache, monkeypatch):
    for error, said in ((OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
                        (OSError(errno.EDQUOT, "Disk quota exceeded"), "XDG_CACHE_HOME"),
                        (MemoryError(), "not enough memory to unpack")):
        def stop(*_, error=error):
            raise error
        monkeypatch.setattr(base_model, "with_own_pre_tokenizer", stop)
        assert said in refusal(str(gguf_file)) and not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_sentence(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr(base_model, "CACHE", tmp_path / "taken")
    assert "XDG_CACHE_HOME" in refusal(str(gguf_file)) and (tmp_path / "taken").read_text() == "mine"


def test_a_gguf_file_that_may_not_be_read_is_one_sentence(gguf_file, cache, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(base_model, "file_checksum", closed)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "you have no permission" in refusal(str(gguf_file))


def test_a_gguf_file_that_lacks_a_weight_is_refused_and_leaves_nothing(tmp_path, tiny_llama, cache):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, without="blk.1.ffn_up")
    assert str(tmp_path / "tiny.gguf") in refusal(str(tmp_path / "tiny.gguf"))
    assert not list(cache.iterdir())


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path, cache):
    for path in (tmp_path / "no.gguf", tmp_path / f"{'x' * 300}.gguf"):
        assert refusal(str(path)) == f"There is no file {path}; check --base_model."


def place_package(monkeypatch, folder):
    """Make the demo's package be found in a folder, or nowhere."""
    found = SimpleNamespace(submodule_search_locations=[str(folder)]) if folder else None
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: found if name == base_model.DEMO_PACKAGE else None)


def test_a_demo_without_its_package_says_how_to_install_it(monkeypatch, tmp_path):
    for folder in (None, tmp_path):  # no package, and one without the file
        place_package(monkeypatch, folder)
        assert f"is not installed; run `{base_model.INSTALL_DEMO}`" in refusal(base_model.DEMO_MODEL)


def test_a_demo_with_another_file_says_how_to_install_the_right_one(monkeypatch, tmp_path, gguf_file, cache):
    shutil.copy(gguf_file, tmp_path / base_model.DEMO_FILE)
    place_package(monkeypatch, tmp_path)
    sentence = refusal(base_model.DEMO_MODEL)
    assert "not the base model that the demo was made with" in sentence and base_model.INSTALL_DEMO in sentence
    assert not cache.exists()


def test_the_demos_model_is_the_file_in_its_package(monkeypatch, tmp_path, gguf_file, cache):
    shutil.copy(gguf_file, tmp_path / base_model.DEMO_FILE)
    place_package(monkeypatch, tmp_path)
    monkeypatch.setattr(base_model, "DEMO_CHECKSUM", hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    loaded = BaseLM.load(base_model.DEMO_MODEL, device="cpu")
    assert loaded.name == base_model.DEMO_MODEL and loaded.fingerprint == BaseLM.load(str(gguf_file), device="cpu").fingerprint
