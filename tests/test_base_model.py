"""The frozen base model: loading and its errors, token ids, end tokens, logits, GGUF files and the demo's package."""

import copy
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, SPECIAL, make_tiny_gemma
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
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
from base_model import BaseLM, Literal, explain_load_error
from command import UserError

BOS, TURN, END = SPECIAL.index("<bos>"), SPECIAL.index("<turn>"), SPECIAL.index("<end>")
SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3}
TEXTS = ["", " ", "  two  spaces ", "\n\n\ttab\tand\r\nline \n", "naïve façade – 東京 Ωμέγα", "😀👩‍👩‍👧 e\u0301",
         "a\x00b\x7f\u00a0\u200b", "Hello , world . Don 't !", "<0x41> <0xE2>", "x=1234567890;",
         "a <unk> b<pad><bos><eos><turn>user\n<end>", "<<eos>> < eos> <eos", "<bos>first", "\ud7ff\U0010ffff"]


@pytest.fixture
def tokenizer(tiny_gemma):
    """A tokenizer that a test may change."""
    return AutoTokenizer.from_pretrained(tiny_gemma)


def make_model(model_class, config_class, **more):
    torch.manual_seed(0)
    return model_class(config_class(**SMALL, **more))


def refusal(*arguments, **more):
    """The sentence with which BaseLM.load refuses."""
    with pytest.raises(UserError) as error:
        BaseLM.load(*arguments, **{"device": "cpu", **more})
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


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


def test_the_rounding_of_bfloat16_is_not_refused(any_base, base, monkeypatch):
    few = 1 + 4 * torch.finfo(torch.bfloat16).eps  # what a deep model's cached step may differ by
    for wrong in (False, True):
        monkeypatch.setattr(base_model.BaseLM, "hidden", wrong_by(few) if wrong else BaseLM.hidden)
        for model in (any_base, base):
            assert BaseLM(copy.deepcopy(model.model).bfloat16(), base.tokenizer).model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="differs from an uncached one"):
        BaseLM(base.model, base.tokenizer, "x")  # in float32 that is no rounding


def wrong_by(factor):
    """BaseLM.hidden with states that are too large by a factor wherever there is a cache."""
    real = BaseLM.hidden
    return lambda self, ids, cache=None: real(self, ids, cache) * (1 if cache is None else factor)


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
    monkeypatch.setattr(base_model.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    assert BaseLM.load(str(folder), device="cpu").model.dtype == expected and asked == ["cpu"]
    assert BaseLM.load(str(folder), "float16", "cpu").model.dtype == torch.float16


@pytest.mark.parametrize("device", ["abacus", "cuda:x" if not torch.cuda.is_available() else "abacus:0"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(tiny_gemma, device):
    sentence = refusal(str(tiny_gemma), device=device)
    assert f"There is no device {device} here" in sentence and "cpu" in sentence


def break_weights(name, folder):
    path = folder / "model.safetensors"
    if name == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "pointer":
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5000000000\n")
    elif name == "gptq":
        config = json.loads((folder / "config.json").read_text())
        more = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
        (folder / "config.json").write_text(json.dumps(config | more))
    elif name == "missing":
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path, {"format": "pt"})
    elif name == "config":
        (folder / "config.json").write_text("{")
    elif name == "hollow":
        shutil.rmtree(folder), folder.mkdir()


@pytest.mark.parametrize("name", ["half", "pointer", "gptq", "missing", "config", "hollow"])
def test_a_folder_that_cannot_be_loaded_is_named_in_one_sentence(tiny_gemma, tmp_path, name):
    folder = shutil.copytree(tiny_gemma, tmp_path / "model")
    break_weights(name, folder)
    sentence = refusal(str(folder))
    assert str(folder) in sentence
    if name == "missing":
        assert "1 of its weights are missing" in sentence


GATED = """You are trying to access a gated repo.
Make sure to have access to it at https://huggingface.co/google/gemma-2b.
401 Client Error. (Request ID: Root=1-2)
Access to model google/gemma-2b is restricted. You must have access to it and be authenticated to access it."""


@pytest.mark.parametrize(("error", "said"), [
    (GATED, ["google/gemma-2b is gated", "https://huggingface.co/google/gemma-2b", "hf auth login", "--base_model"]),
    ("google/gemma-2b is not a local folder and is not a valid model identifier", ["no model google/gemma-2b on the hub"]),
    ("We couldn't connect to\n'https://huggingface.co'", ["hub cannot be reached", "--demo"]),
    ("a new\nkind of error", ["google/gemma-2b could not be loaded: a new kind of error"])])
def test_an_error_of_the_hub_is_explained_with_what_to_do(error, said):
    message = explain_load_error("google/gemma-2b", OSError(error))
    assert "\n" not in message and all(part in message for part in said)


def test_a_folder_that_does_not_exist_is_not_called_gated(tmp_path):
    assert refusal(str(tmp_path / "model-401")) == f"There is no folder {tmp_path / 'model-401'}; check --base_model."


# A tiny Llama in a GGUF file, with a byte-level tokenizer and the splitting rule of the demo's model.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "12", "Ġt", "Ġth", "Ġthe"]
MERGES = ["1 2", "Ġ t", "Ġt h", "Ġth e"]
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write_gguf(path, model, without="", quantization=None, template=None, eos=2):
    """Write the model as a GGUF file, but for the weight named `without`; `quantization` is of all matrices."""
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
            if heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
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
        if exact.ndim == 2:  # the turning of queries and keys moves whole rows, and blocks lie within rows
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


@pytest.mark.parametrize("keep", [0, 100, 30_000])
def test_a_broken_gguf_file_is_one_sentence_and_leaves_nothing(gguf_file, cache, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    assert f"The GGUF file {gguf_file} cannot be read" in refusal(str(gguf_file))
    assert not list(cache.iterdir())


def test_a_gguf_file_that_lacks_a_weight_is_refused_and_leaves_nothing(tmp_path, tiny_llama, cache):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, without="blk.1.ffn_up")
    assert str(tmp_path / "tiny.gguf") in refusal(str(tmp_path / "tiny.gguf"))
    assert not list(cache.iterdir())


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path, cache):
    assert refusal(str(tmp_path / "no.gguf")) == f"There is no file {tmp_path / 'no.gguf'}; check --base_model."


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
