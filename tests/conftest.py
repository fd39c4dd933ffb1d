"""What the tests share: a tiny random Gemma with a byte-fallback tokenizer, and a small real file. No network."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import httpx
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from base_model import BaseLM
from browser import NoBrowser, chromium
from memory_decoder import MemoryDecoder
from sources.rows import Example

ROOT = Path(__file__).resolve().parent.parent
DEMO_ROWS = [json.loads(line) for line in (ROOT / "demo/legal_qa.jsonl").read_text().splitlines()]
ROWS = DEMO_ROWS[::2]  # each answer once
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<end>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Like Gemma's, but small: a mark, the role and a newline before a turn, and another mark after it.
CHAT_TEMPLATE = ("<bos>{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
                 "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")


def make_tokenizer(texts, vocab_size=512):
    """A byte-fallback BPE tokenizer like Gemma's: spaces as U+2581, single digits, no EOS after a text."""
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + BYTES, limit_alphabet=160)
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex("\u2581?\\p{L}+|\\p{N}|\u2581?[^\\s\u2581\\p{L}\\p{N}]+|\u2581+(?=\u2581)|\\n+|."), "isolated")
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    # Byte tokens are only in the vocabulary, so that only SPECIAL are ever matched in text.
    tokenizer = Tokenizer(models.BPE(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=["<turn>", "<end>"], padding_side="left", chat_template=CHAT_TEMPLATE)


def make_tiny_gemma(folder, seed=0, tokenizer_rows=ROWS[:60]):
    """Save a random Gemma of width 32 and 512 tokens. Its weights are larger than usual, so that logits differ."""
    tokenizer = make_tokenizer([" ".join(row.values()) for row in tokenizer_rows])
    torch.manual_seed(seed)
    config = GemmaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.3)
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples(rows):
    """Rows as Examples of one source."""
    return [Example(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]


def rows_of(store):
    """The rows of a Datastore's examples."""
    return [example.row for example in store.examples]


def make_decoder(seed=0, hidden=32, vocab=512, seen=None, **sizes):
    """A MemoryDecoder with random weights for the tiny Gemma. By default it has seen two tokens in three."""
    torch.manual_seed(seed)
    seen = [token for token in range(vocab) if token % 3] if seen is None else seen
    sizes = {"backoff": 0.01, "decoder_dim": 32, "num_layers": 2, "num_heads": 4, **sizes}
    decoder = MemoryDecoder(hidden, vocab, seen, **sizes)
    torch.nn.init.normal_(decoder.output_projection.weight, std=0.3)  # a fresh one hardly prefers any token
    return decoder.eval()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory):
    return make_tiny_gemma(tmp_path_factory.mktemp("tiny_gemma"))


@pytest.fixture(scope="session")
def base(tiny_gemma):
    return BaseLM.load(str(tiny_gemma), "float32", "cpu")  # auto would be bfloat16 on some CPUs


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """Twenty-four real rows as JSONL."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::18][:24]))
    return path


def run_script(name, *arguments, timeout=300):
    """Run one of the two scripts as a user would. Returns (exit code, output, errors)."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout, cwd=ROOT)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


SIZES = ("--device", "cpu", "--dtype", "float32", "--decoder_dim", "32", "--k", "8", "--num_epochs", "2", "--batch_size", "8",
         "--max_length", "96")
SMALL = (*SIZES, "--context", "16", "--decoder_lr", "1e-2")  # a learning rate so high that two epochs over few rows are enough


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_gemma, rows_file):
    """A folder that train_memory_decoder.py has filled."""
    folder = tmp_path_factory.mktemp("trained") / "trained_models"
    done = run_script("train_memory_decoder.py", "--base_model", tiny_gemma, "--dataset", rows_file, "--output_dir", folder, *SMALL)
    assert done.code == 0, done.err
    return folder


@contextmanager
def served(folder, log):
    """The address at which `app.py --model_dir` serves a folder. log: a file for what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--model_dir", str(folder), "--server_port", str(port), "--device", "cpu"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # several threads round differently from call to call
    with open(log, "w") as out, subprocess.Popen(command, cwd=ROOT, env=alone, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            wait_for(process, f"http://127.0.0.1:{port}/", log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.kill()


@pytest.fixture(scope="session")
def address(trained, tmp_path_factory):
    """The address of the trained folder's page, for all tests that visit or call it."""
    with served(trained, tmp_path_factory.mktemp("app") / "log.txt") as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with ExitStack() as opened:
        try:
            browser = opened.enter_context(chromium())
        except NoBrowser as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
        yield browser


def wait_for(process, address, log):
    give_up = time.monotonic() + 240
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, f"app.py does not answer: {log.read_text()}"
        try:
            return httpx.get(address, timeout=5).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
