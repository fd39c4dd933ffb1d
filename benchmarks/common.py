"""What the quality benchmarks share: paths from the command line, training runs as script 1 makes them, results on disk."""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train_memory_decoder as script
from datastore import BaseLM, Template, keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
TEMPLATE = Template(script.Options.template)


def arguments(description, **more):
    """--data (a folder with legal_qa/ and off_domain/), --base_model and --work, beside those given as name=default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with legal_qa/*.jsonl and off_domain/wikitext2_valid.txt")
    parser.add_argument("--base_model", default=str(ROOT / "demo/base_model"))
    parser.add_argument("--work", type=Path, default=ROOT / "build/quality", help="where runs leave their artefacts")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    keep_freed_memory()
    return parsed


def held_out_file(given, rows):
    """The first `rows` validation rows as a file of their own."""
    lines = (given.data / "legal_qa/validation.jsonl").read_text(encoding="utf-8").split("\n")[:rows]
    path = given.work / f"validation_{rows}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(given, folder, held_rows=200, **options):
    """metrics.json of one run of script 1 into the folder, with `wall` seconds; what is already there is not made again."""
    options = {"base_model": given.base_model, "dataset": str(given.data / "legal_qa/train.jsonl"),
               "validation_dataset": str(held_out_file(given, held_rows)), "output_dir": str(given.work / folder)} | options
    began = time.monotonic()
    script.run(script.Options(**options))
    return json.loads((given.work / folder / "metrics.json").read_text()) | {"wall": time.monotonic() - began}


@contextlib.contextmanager
def replaced(module, name, value):
    """The module with one name bound to another value: a variant that is no option of the project."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def record(name, key, value):
    """Put value under key in results/<name>.json, at once, so that a stopped benchmark goes on."""
    path = RESULTS / f"{name}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table[key] = value
    path.write_text(json.dumps(table, indent=1) + "\n")


def recorded(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


# Asked once, since the folder may move on while a benchmark runs.
COMMIT = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()


def shortened_base(given, layers):
    """A folder with the base model cut after so many layers: the final norm then reads an inner state."""
    base = BaseLM.load(given.base_model)
    base.model.model.layers = base.model.model.layers[:layers]
    base.model.config.num_hidden_layers = layers
    if getattr(base.model.config, "layer_types", None):
        base.model.config.layer_types = base.model.config.layer_types[:layers]
    folder = given.work / f"base_{layers}_layers"
    base.model.to(torch.bfloat16).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)
