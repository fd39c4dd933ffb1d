"""Does everything fit at Gemma-2b's real size? Both scripts' work on random weights of that shape.

    python benchmarks/gemma_2b_shape.py --folder build/gemma_2b_shape    # 5 GB of disk, about 14 GB of memory

Trains on four short rows, streams ten tokens, and times a streamed token against the original demo's way of
making one: two forwards of the base model over the whole prefix and a search of the index.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

from base_model import BaseLM, converted, demo_model_file
from datastore import Datastore
from generation import MemoryAugmentedLM, Settings
from memory_decoder import MemoryDecoder

SHAPE = {"vocab_size": 256_000, "hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 18,
         "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}


def make_model(folder):
    """Save a random bfloat16 Gemma of the 2B shape with the demo's tokenizer (`make demo` installs it), once."""
    if (folder / "config.json").exists():
        return
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SHAPE))
    torch.set_default_dtype(torch.float32)
    print(f"parameters: {model.num_parameters():,}", flush=True)
    AutoTokenizer.from_pretrained(converted(demo_model_file())).save_pretrained(folder)
    model.save_pretrained(folder)


def train(folder):
    """Run script 1 on four short rows; returns its seconds and peak memory in bytes."""
    rows = [{"Title": "Deposit", "Question": f"Question number {i}?", "Answer": "Ask for it in writing."} for i in range(4)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.monotonic()
    subprocess.run([sys.executable, ROOT / "train_memory_decoder.py", "--base_model", folder, "--dataset", data, "--k", "8",
                    "--dtype", "bfloat16", "--device", "cpu", "--output_dir", folder / "trained"], check=True)
    return time.monotonic() - began, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


@torch.no_grad()
def original_token(base, decoder, store, ids):
    """One token the original's way: hidden state and logits from two whole forwards, and a search nobody reads."""
    window = torch.tensor([ids])
    logits = base.model(window, use_cache=False).logits[0, -1].float()
    hidden = base.model(window, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
    store.search(hidden.float().numpy()[None], 8)
    memory = decoder.log_probabilities(decoder.features(hidden.float()[None, None])[0, 0], logits)
    return (0.5 * logits + 0.5 * memory).argmax()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the random model is kept")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder)
    seconds, peak = train(folder)
    print(f"script 1 on four rows: {seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB", flush=True)

    base = BaseLM.load(str(folder), "bfloat16", "cpu")
    decoder = MemoryDecoder.load(folder / "trained/memory_decoder.pt")
    store, model = Datastore.open(folder / "trained"), MemoryAugmentedLM(base, decoder)
    prompt = "Question: " + "May I keep the deposit? " * 8 + "\nAnswer:"
    stamps = [time.monotonic()]
    for _ in model.stream(prompt, Settings(temperature=0.7), max_new_tokens=10):
        stamps.append(time.monotonic())
    steps = sorted(b - a for a, b in pairwise(stamps[1:]))
    ids, own = base.encode(prompt), []
    for _ in range(3):
        began = time.monotonic()
        original_token(base, decoder, store, ids)
        own.append(time.monotonic() - began)
    print(f"streamed {len(stamps) - 1} tokens behind {len(ids)}: first {stamps[1] - stamps[0]:.2f} s, then median "
          f"{steps[len(steps) // 2]:.2f} s a token; the original's way {sorted(own)[1]:.2f} s a token; peak memory "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
