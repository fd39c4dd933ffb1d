"""What the tests share: a tiny random Gemma with a byte-fallback tokenizer, and a small real file. No network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import build_base_model
import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from datastore import BaseLM
from memory_decoder import MemoryDecoder

ROOT = Path(__file__).resolve().parent.parent
DEMO_ROWS = [json.loads(line) for line in (ROOT / "demo/legal_qa.jsonl").read_text().splitlines()]
ROWS = DEMO_ROWS[::2]  # each answer once


def make_tiny_gemma(folder, seed=0, tokenizer_rows=ROWS[:60]):
    """Save a random Gemma of width 32 and 512 tokens, larger in its weights than usual so that logits differ."""
    texts = [" ".join(row.values()) for row in tokenizer_rows]
    tokenizer = build_base_model.train_tokenizer(texts, 512)
    torch.manual_seed(seed)
    config = GemmaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.3)
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_decoder(seed=0, hidden=32, vocab=512, **sizes):
    """A MemoryDecoder for the tiny Gemma, at random weights."""
    torch.manual_seed(seed)
    return MemoryDecoder(hidden, vocab, **{"decoder_dim": 32, "num_layers": 2, "num_heads": 4, **sizes}).eval()


def with_any_topic(decoder):
    """The decoder with topics drawn at random in place of fitted ones."""
    torch.nn.init.normal_(decoder.topic.table), torch.nn.init.normal_(decoder.topic.centres)
    return decoder


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory):
    return make_tiny_gemma(tmp_path_factory.mktemp("tiny_gemma"))


@pytest.fixture(scope="session")
def base(tiny_gemma):
    return BaseLM.load(str(tiny_gemma), device="cpu")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """Twenty-four real rows as JSONL."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::18][:24]))
    return path


def run_script(name, *arguments, timeout=300):
    """Run one of the two scripts as a user would; returns (exit code, output, errors)."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout, cwd=ROOT)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


SMALL = ("--device", "cpu", "--decoder_dim", "32", "--k", "8", "--num_epochs", "2", "--batch_size", "8", "--max_length", "96")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_gemma, rows_file):
    """A folder that train_memory_decoder.py has filled."""
    folder = tmp_path_factory.mktemp("trained") / "trained_models"
    done = run_script("train_memory_decoder.py", "--base_model", tiny_gemma, "--dataset", rows_file, "--output_dir", folder, *SMALL)
    assert done.code == 0, done.err
    return folder
