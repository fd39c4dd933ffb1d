"""Folders that hold no base model, or a damaged one. Each gives one sentence that says what to do."""

import errno
import json
import os
import shutil

import datasets
import pytest
import torch
from models import SMALL, refusal
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from base_model import BaseLM
from support import model_errors
from support.model_errors import explain_load_error

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5000000000\n"
QUANTISED = ("gptq", "awq", "bitsandbytes", "hqq", "compressed-tensors", "aqlm")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
T5_SIZES = {"vocab_size": 512, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def folder(tiny_gemma, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_gemma, tmp_path / "model")


def configure(folder, **more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in (config | more).items() if value is not None}))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def quantise(folder, method):
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    configure(folder, quantization_config={"quant_method": method, "load_in_4bit": True} if method == "bitsandbytes" else settings)


def split(folder):
    """Weights in two files, of which the second is missing."""
    weights = load_file(folder / "model.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(dict(list(weights.items())[:3]), folder / first, {"format": "pt"})
    places = {name: first if i < 3 else second for i, name in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    remove(folder, "model.safetensors")


def adapt(folder):
    empty(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-2b"}))
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickle_weights(folder, content):
    remove(folder, "model.safetensors")
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")


def saved_rows(folder):
    empty(folder)
    datasets.Dataset.from_list([{"a": "b"}]).save_to_disk(folder)


def alone(name, content):
    """Changes a folder so that it holds only one file."""
    def damage(folder):
        empty(folder)
        (folder / name).write_text(content)
    return damage


DAMAGES = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "LFS pointer in place of model.saf", "git lfs pull"),
    "pointer of tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "LFS pointer in place of tokenizer.json"),
    "half": (lambda f: halve(f / "model.safetensors"), "weights that are incomplete or damaged", "download it again"),
    "no byte": (lambda f: (f / "model.safetensors").write_bytes(b""), "weights that are incomplete or damaged"),
    **{method: (lambda f, method=method: quantise(f, method), f"is quantised with {method}", "name the unquantised model")
       for method in QUANTISED},
    "quantised in a way not known": (lambda f: (quantise(f, "quux"), drop_weight(f)), "is quantised with quux"),
    "a weight missing": (drop_weight, "1 of its weights are missing", "download it again"),
    "no weights": (lambda f: remove(f, "model.safetensors"), "has no weights (model.safetensors)", "download it again"),
    "no config": (lambda f: remove(f, "config.json"), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "has a damaged config.json", "download it again"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), "has a damaged config.json"),
    "broken tokenizer": (lambda f: halve(f / "tokenizer.json"), "has a damaged tokenizer.json"),
    "no tokenizer": (lambda f: remove(f, "tokenizer.json", "tokenizer_config.json"), "has no tokenizer", "tokenizer.json"),
    "only settings of a tokenizer": (lambda f: remove(f, "tokenizer.json"), "has no tokenizer"),
    "a shard missing": (split, "lacks 1 of its 2 files of weights", "model-00002-of-00002.safetensors", "download it again"),
    "adapter": (adapt, "holds an adapter (LoRA) for google/gemma-2b", "merge_and_unload"),
    "unknown architecture": (lambda f: configure(f, model_type="quux9"), "the architecture quux9, which transformers"),
    "own code": (lambda f: configure(f, model_type="quux9", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
                 "own program code", "trust_remote_code"),
    "no architecture": (lambda f: configure(f, model_type=None), "names no model_type"),
    "other shapes": (lambda f: configure(f, hidden_size=48), "whose shapes are not those that its config.json gives"),
    "other vocabulary": (lambda f: configure(f, vocab_size=600), "whose shapes are not those that its config.json gives"),
    "broken pickle": (lambda f: pickle_weights(f, b"garbage"), "pytorch_model.bin that is damaged", "safetensors"),
    "a program as pickle": (lambda f: pickle_weights(f, {"a": shutil.rmtree}), "holds more than weights", "safetensors"),
    "TensorFlow": (lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"), "has no weights (model.safetensors)"),
    "data": (alone("rows.jsonl", "{}"), "holds a dataset and no model; name it with --dataset"),
    "saved data": (saved_rows, "holds a dataset and no model; name it with --dataset"),
    "nothing": (empty, "is empty; download the model into it"),
    "GGUF files": (alone("tiny.gguf", "GGUF"), "name one of them: --base_model", "tiny.gguf"),
    "pipeline": (alone("model_index.json", "{}"), "a pipeline of several models"),
    "memory": (alone("config.json", '{"base_model": "its/base", "base_fingerprint": "1"}'), "holds a memory", "_model its/base"),
}


@pytest.mark.parametrize(("damage", "said"), [(case[0], case[1:]) for case in DAMAGES.values()], ids=list(DAMAGES))
def test_a_folder_that_cannot_be_loaded_is_named_in_one_sentence(folder, damage, said):
    damage(folder)
    sentence = refusal(str(folder))
    assert str(folder) in sentence and all(part in sentence for part in said)


OTHER_MODELS = [(BertModel, BertConfig(vocab_size=512, **SIZES)), (BertForMaskedLM, BertConfig(vocab_size=512, **SIZES)),
                (ViTModel, ViTConfig(image_size=32, **SIZES)), (T5ForConditionalGeneration, T5Config(**T5_SIZES)),
                (LlamaModel, LlamaConfig(**SMALL))]


@pytest.mark.parametrize(("model_class", "config"), OTHER_MODELS, ids=[model_class.__name__ for model_class, _ in OTHER_MODELS])
def test_a_model_that_does_not_continue_texts_is_called_by_its_name(folder, model_class, config):
    model_class(config).save_pretrained(folder)
    sentence = refusal(str(folder))
    assert f"is a {model_class.__name__}, which is not a causal language model" in sentence and "--base_model" in sentence


def test_weights_in_a_pickle_load_as_those_in_safetensors_do(folder, base):
    pickle_weights(folder, load_file(folder / "model.safetensors"))
    assert BaseLM.load(str(folder), "float32", "cpu").fingerprint == base.fingerprint


def test_a_model_that_is_unpacked_as_it_is_loaded_serves_and_one_that_stays_quantised_does_not(folder, base, monkeypatch):
    quantise(folder, "mxfp4")  # on a CPU transformers makes plain weights of it
    assert BaseLM.load(str(folder), "float32", "cpu").fingerprint == base.fingerprint
    real = model_errors.explain_loaded

    def still_quantised(name, model, *more):
        model.hf_quantizer, model.config.quantization_config = object(), {"quant_method": "fp8"}
        return real(name, model, *more)
    monkeypatch.setattr("base_model.explain_loaded", still_quantised)
    assert "is quantised with fp8" in refusal(str(folder))


def test_a_folder_with_spaces_and_foreign_letters_in_its_path_loads(folder, base, tmp_path):
    other = folder.rename(tmp_path / "mit Leerzeichen é 東京")
    assert BaseLM.load(str(other), "float32", "cpu").fingerprint == base.fingerprint


def test_a_folder_that_does_not_exist_is_not_called_gated(tmp_path):
    for name in (str(tmp_path / "model-401"), "./model-401", "../no/such", "~/model-401", f"/{'x' * 300}"):
        assert refusal(name) == f"There is no folder {name}; check --base_model."


@pytest.mark.parametrize("name", ["weights.safetensors", "model.bin", "README"])
def test_a_file_that_is_no_gguf_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"something")
    assert f"The file {tmp_path / name} is no base model" in refusal(str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(folder):
    for path in (folder / "model.safetensors", folder):
        path.chmod(0)
        assert f"no permission for {path}" in refusal(str(folder))
        path.chmod(0o700)


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "model.safe" not in str(path) and real(path, mode))
    sentence = explain_load_error(str(folder), PermissionError(errno.EACCES, "Permission denied"))
    assert f"you have no permission for {folder / 'model.safetensors'}" in sentence


def test_a_damaged_model_of_the_hub_says_how_to_download_it_anew(folder, monkeypatch):
    monkeypatch.setattr(model_errors, "try_to_load_from_cache", lambda name, file: str(folder / file))
    halve(folder / "model.safetensors")
    with pytest.raises(Exception, match="deserializing") as error:
        load_file(folder / "model.safetensors")
    sentence = explain_load_error("some/model", error.value)
    assert "The model some/model has weights that are incomplete" in sentence
    assert "run `hf download some/model --force-download`" in sentence


def test_a_repository_without_a_config_is_told_from_one_that_is_missing(monkeypatch):
    monkeypatch.setattr(model_errors, "try_to_load_from_cache", lambda name, file: object())
    assert "The model some/gguf has no config.json" in explain_load_error("some/gguf", ValueError("Unrecognized model"))


def test_an_error_of_no_known_kind_is_told_as_it_is(folder):
    error = ValueError("a new\nkind of error")
    assert explain_load_error("some/model", error) == "The model some/model could not be loaded: a new kind of error."
    assert explain_load_error(str(folder), error).endswith("that transformers can load: a new kind of error.")
