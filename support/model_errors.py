"""Why a base model could not be loaded: one sentence about what its folder or file holds instead."""

import json
import os
import pickle
import re
from importlib.metadata import version
from pathlib import Path

from gguf import GGUFReader
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support import hub
from support.command import one_line
from support.machine import lacks_memory

POINTER = b"version https://git-lfs.github.com/spec/"
CHOOSE = "choose another base model, e.g. --base_model Qwen/Qwen2.5-0.5B"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*")
OBJECTS = ("config.json", "tokenizer*.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", "*.index.json")
NO_TOKENIZER = "has no tokenizer; get its tokenizer.json and tokenizer_config.json from where the model came from"
DATA = ("*.jsonl", "*.csv", "*.parquet", "*.arrow", "dataset_info.json", "dataset_dict.json", "data/*.parquet")


def explain_load_error(name, error):
    """One sentence for a model that could not be loaded from the hub or a folder.

    name: what the user named. error: what transformers raised.
    """
    if lacks_memory(error):
        return f"There is not enough memory for the base model {name}; choose a smaller one, or another --device."
    path = Path(name)
    is_folder = os.path.isdir(path)  # Path.is_dir can raise for a name that cannot be looked up; this does not
    if os.path.isfile(path):
        return f"The file {name} is no base model; --base_model takes a folder, a name on the hub or a file that ends in .gguf."
    if not is_folder:
        if path.is_absolute() or str(name).startswith((".", "~")):
            return f"There is no folder {name}; check --base_model."
        if sentence := hub.explain("model", name, error):
            return sentence
    fault = fault_of_folder(path, "download it again", error) if is_folder else fault_on_hub(name, error)
    if fault:
        return f"The {'folder' if is_folder else 'model'} {name} {fault}."
    reason = one_line(error).rstrip(".") or type(error).__name__
    if is_folder:
        return f"The folder {name} does not hold a causal language model that transformers can load: {reason}."
    return f"The model {name} could not be loaded: {reason}."


def fault_on_hub(name, error):
    """What is wrong with a model of the hub, by its downloaded files."""
    config = try_to_load_from_cache(str(name), "config.json")
    if isinstance(config, str):
        return fault_of_folder(Path(config).parent, f"run `hf download {name} --force-download`", error)
    if config is not None:  # the hub has said that there is none
        return f"has no config.json, so transformers cannot load it; if it holds .gguf files, download one and name it, or {CHOOSE}"
    return None


def fault_of_folder(folder, again, error):
    """What is wrong with a folder, as the end of a sentence, or None. again: how to get its files anew."""
    if fault := fault_of_access(folder) or fault_of_kind(folder) or fault_of_files(folder, again):
        return fault
    config, chain = read_json(folder / "config.json"), hub.chained(error)
    return (fault_of_config(config) or fault_of_weights(folder, again) or fault_of_tokenizer(folder, chain)
            or fault_of_loading(chain, again, config.get("architectures")))


def fault_of_access(folder):
    """The fault if the user may not read the folder or a file in it."""
    closed = [path for path in [folder, *(folder.iterdir() if os.access(folder, os.R_OK | os.X_OK) else [])]
              if not os.access(path, os.R_OK)]
    return f"cannot be read: you have no permission for {closed[0]}; ask its owner, or change it with chmod" if closed else None


def fault_of_kind(folder):
    """The fault if the folder holds something other than a base model."""
    config = read_json(folder / "config.json")
    if not any(folder.iterdir()):
        return "is empty; download the model into it"
    if "base_fingerprint" in config:
        return f"holds a memory and not its base model; name that: --base_model {config.get('base_model')}"
    if (folder / "adapter_config.json").exists() and not (config and has(folder, "model*.safetensors", "pytorch_model*.bin")):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return f"holds an adapter (LoRA) for {base} and no model of its own; merge the two with peft's merge_and_unload and name " \
               "the merged model, or name the base"
    if (folder / "config.json").exists():
        return None
    if files := sorted(folder.glob("*.gguf")):
        return f"holds GGUF files; name one of them: --base_model {str(files[0])!r}"
    if (folder / "model_index.json").exists():
        return f"holds a pipeline of several models, as those that make images; {CHOOSE}"
    if not has(folder, *WEIGHTS) and has(folder, *DATA):
        return f"holds a dataset and no model; name it with --dataset, and {CHOOSE}"
    return "has no config.json, so it is not a model that transformers can load; download all files of the model"


def fault_of_files(folder, again):
    """The fault if a file is only a Git LFS pointer or broken JSON."""
    for path in sorted(folder.iterdir()):
        if is_pointer(path):
            return f"holds only a Git LFS pointer in place of {path.name}; run `git lfs pull` in it, or {again}"
    broken = [path for pattern in OBJECTS for path in folder.glob(pattern) if is_broken(path)]
    return f"has a damaged {broken[0].name}; {again}" if broken else None


def fault_of_config(config):
    """The fault if config.json names something that this program cannot run."""
    kind, architectures = config.get("model_type"), config.get("architectures")
    if not kind:
        return f"has a config.json that names no model_type; {CHOOSE}"
    if kind not in CONFIG_MAPPING:
        if "auto_map" in config:
            return f"brings its own program code for the architecture {kind} (trust_remote_code), which is not run here; {CHOOSE}"
        return f"has the architecture {kind}, which transformers {version('transformers')} does not know; {CHOOSE}"
    if has_another_head(architectures):
        return not_causal(architectures)
    return quantised(config["quantization_config"]) if config.get("quantization_config") else None


def fault_of_weights(folder, again):
    """The fault if files of weights are missing."""
    for index in folder.glob("*.index.json"):
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [name for name in shards if not (folder / name).exists()]:
            return f"lacks {len(missing)} of its {len(shards)} files of weights, e.g. {missing[0]}; {again}"
    if not has(folder, *WEIGHTS):
        return f"has no weights (model.safetensors); {again}"
    return None


def fault_of_tokenizer(folder, chain):
    """The fault if the tokenizer is missing or needs a package."""
    if not has(folder, *TOKENIZERS):
        return NO_TOKENIZER
    if any("instantiate the backend tokenizer" in str(one) for one in chain) and not (folder / "tokenizer.json").exists():
        return "has no tokenizer.json, and its older tokenizer needs a package: `pip install sentencepiece tiktoken protobuf`"
    return None


def fault_of_loading(chain, again, architectures):
    """The fault that the error itself shows."""
    text = " ".join(str(one) for one in chain)
    if "ignore_mismatched_sizes" in text:
        return f"has weights whose shapes are not those that its config.json gives; {again}"
    if any(isinstance(one, pickle.UnpicklingError) for one in chain):
        return "has a pytorch_model.bin that is damaged or holds more than weights, so it is not opened; name a model in the " \
               "safetensors format"
    if any(isinstance(one, SafetensorError | EOFError) for one in chain) or "PytorchStreamReader" in text:
        return f"has weights that are incomplete or damaged ({one_line(chain[0])[:100]}); {again}"
    if architectures and "Unrecognized configuration class" in text:
        return not_causal(architectures)
    return None


def explain_loaded(name, model, missing, tokenizer_is_empty):
    """One sentence for a loaded model that is not a complete causal language model, else None.

    missing: the names of weights that were not found. tokenizer_is_empty: whether it has only special tokens.
    """
    fault, architectures = None, model.config.architectures or []
    settings = getattr(model.config, "quantization_config", None)
    headless = any(name.endswith("Model") for name in architectures) and not any(map(is_causal, architectures))
    if has_another_head(architectures) or (missing and headless):
        fault = not_causal(architectures)
    elif settings and (missing or getattr(model, "hf_quantizer", None)):  # otherwise it was dequantised while loading
        fault = quantised(settings if isinstance(settings, dict) else settings.to_dict())
    elif missing:
        fault = f"is incomplete: {len(missing)} of its weights are missing; download it again"
    elif tokenizer_is_empty:
        fault = NO_TOKENIZER
    return f"The model {name} {fault}." if fault else None


def quantised(settings):
    """The fault of a quantised model: it does not load, or it stays quantised and takes no other number format."""
    return f"is quantised with {settings.get('quant_method') or 'an unknown method'}, which cannot be used here; name the " \
           "unquantised model that it was made from as --base_model"


def not_causal(architectures):
    """The fault of a model that does something other than continue a text."""
    return f"is a {architectures[0]}, which is not a causal language model; {CHOOSE}"


def is_causal(architecture):
    """Whether an architecture is a causal language model, by its name or by transformers' own list."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or any(
        architecture in ([listed] if isinstance(listed, str) else listed) for listed in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def has_another_head(architectures):
    """Whether the model was made for another task, such as to classify, fill gaps or translate."""
    return any("For" in name for name in architectures or []) and not any(map(is_causal, architectures))


def explain_gguf_error(path, error):
    """One sentence for a GGUF file that could not be read or unpacked. error: what was raised."""
    if any(hub.of_this_machine(one) == "disk" for one in hub.chained(error)):
        return f"The disk is full, so {path} cannot be unpacked; make room, or set XDG_CACHE_HOME to a folder on another disk."
    what = f"The GGUF file {path} cannot be read"
    if not os.access(path, os.R_OK):
        return f"{what}: you have no permission; ask its owner, or change it with chmod."
    if is_pointer(path):
        return f"{what}: it is only a Git LFS pointer to it; run `git lfs pull` in its folder, or download it again."
    with open(path, "rb") as file:
        magic = file.read(4)
    if len(magic) == 4 and magic != b"GGUF":
        return f"{what}: it is not in the GGUF format, whatever its name; {CHOOSE}."
    detail = one_line(error)[:150].rstrip(".")
    if isinstance(error, MemoryError):
        return f"There is not enough memory to unpack the GGUF file {path}; choose a smaller base model."
    if "not supported" in detail or "reader handles" in detail:
        return f"{what}: {detail}; {CHOOSE}."
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name.lower()):
        return f"{what}: it is one part of several; put them together with `llama-gguf-split --merge` first."
    try:
        GGUFReader(path)
    except Exception:  # the reader does not check the file and may raise anything
        return f"{what}: it is incomplete or damaged ({detail}); download it again."
    return f"{what}: {detail}; download it again, or {CHOOSE}."


def is_pointer(path):
    """Whether a file is what Git LFS leaves in place of a large one."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def has(folder, *patterns):
    """Whether a folder holds a file of one of these names."""
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def read_json(path):
    """The object in a JSON file, or an empty one if there is none."""
    return {} if not path.is_file() or is_broken(path) else json.loads(path.read_text("utf-8"))


def is_broken(path):
    """Whether a JSON file does not hold an object."""
    try:
        return not isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError:
        return True
