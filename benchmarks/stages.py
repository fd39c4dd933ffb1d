"""The time and memory of a training's stages, beside what they cannot be faster than, and how they grow.

    python benchmarks/stages.py pace         # on the demo's base: reading beside a bare forward, a step beside its arithmetic
    python benchmarks/stages.py growth       # index, search and training over more and more clustered keys
    python benchmarks/stages.py processes    # one process and two, by accelerate

Run it with nothing else running. Prints a table, and all figures as JSON on the last line. growth draws pictures/growth.png too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_memory_decoder as script
from base_model import BaseLM
from corpus import Corpus
from datastore import open_keys, write_keys
from index import build_index, choose_index, inverted_lists
from memory_decoder import MemoryDecoder, TrainingLoss
from neighbours import LENGTH, PeakMemory, seconds_of, write_clustered
from search import TrainingDatastore, chunk_size, find_neighbours
from texts import Entries, entries_of, windows_of_sources
from training import Batches

VOCABULARY, SEEN, K = 49_152, 5000, 32  # of the decoder that learns clustered keys
SEARCHED, STEPS, ROUNDS = 16_384, 20, 3
BATCH, WINDOW = 4, 512  # windows of a training step, and entries of one


def reading():
    """(entries a second of a bare forward, of the stage that reads) on the demo's rows."""
    options = script.parse_options(["--demo"])
    base, corpus = BaseLM.load(options.base_model, options.dtype, options.device), Corpus.read(options)
    windows = windows_of_sources(base, corpus.examples, corpus.templates(base), options.max_length)[-8 * BATCH:]
    entries, paces = entries_of(windows), ([], [])
    batches = [windows[i:i + BATCH] for i in range(0, len(windows), BATCH)]
    ids = [torch.tensor([w.ids[:min(len(w.ids) for w in batch)] for w in batch]) for batch in batches]
    tokens = sum(batch.numel() for batch in ids)
    for number in range(ROUNDS + 1):  # the first round warms up
        with tempfile.TemporaryDirectory() as folder:
            bare, _ = seconds_of(lambda: [float(base.hidden(batch)[0, 0, 0]) for batch in ids])
            keys = Path(folder) / "keys.f16"
            whole, _ = seconds_of(lambda keys=keys: write_keys(base, windows, entries.offsets, keys, BATCH))
        for pace, value in zip(paces, (tokens / bare, len(entries.values) / whole), strict=True):
            pace.extend([value] if number else [])
    return tuple(map(statistics.median, paces))


def multiplication_rate(dtype=torch.float32, size=1024):
    """Multiplications and additions a second of a large matrix product."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ b)[0] for _ in range(10))


def clustered_entries(count):
    """Entries with random values, as windows of WINDOW positions, for keys that write_clustered wrote."""
    values = np.random.default_rng(0).integers(0, SEEN, count).astype(np.int32)
    offsets = np.append(np.arange(0, count, WINDOW), count).astype(np.int64)
    return Entries(values, (np.arange(count) // LENGTH).astype(np.int32), np.zeros(count, np.int32), offsets)


def store_of(index, mean, entries, keys):
    return TrainingDatastore(index, mean, entries.values, entries.example, entries.position, [], keys)


def training_steps(keys, entries, folder, width):
    """Seconds of STEPS training steps over the first windows, whose neighbours are in the folder, one by one."""
    decoder = MemoryDecoder(width, VOCABULARY, range(SEEN), 0.01, context=64)
    model, batches = TrainingLoss(decoder, 0.5), Batches(keys, entries, folder, 20.0, np.arange(SEEN))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)

    def step(number):
        loss, _, _ = model(*batches(np.arange(BATCH) + BATCH * number, "cpu"))
        loss.backward()
        optimizer.step(), optimizer.zero_grad()

    return [seconds_of(lambda n=n: step(n % (SEARCHED // WINDOW // BATCH)))[0] for n in range(STEPS)]


def step_arithmetic(width):
    """Multiplications and additions of one training step: forward and backward of every weight, and attention."""
    decoder, positions = MemoryDecoder(width, VOCABULARY, range(SEEN), 0.01, context=64), BATCH * WINDOW
    weights = sum(p.numel() for p in decoder.parameters() if p.dim() == 2)
    return 6 * positions * (weights + 6 * 2 * decoder.sizes["context"] * decoder.sizes["decoder_dim"])


def pace():
    bare, whole = reading()
    with tempfile.TemporaryDirectory() as name:
        folder, width = Path(name), 576
        write_clustered(folder / "keys", SEARCHED, width, 0)
        keys, entries = open_keys(folder / "keys", width), clustered_entries(SEARCHED)
        store = store_of(*build_index(keys, "Flat"), entries, keys)
        find_neighbours(store, K, folder)
        step = statistics.median(training_steps(keys, entries, folder, width)[2:])
    limit = step_arithmetic(width) / multiplication_rate()
    return [{"forward_entries_a_second": bare, "reading_entries_a_second": whole, "reading / forward": whole / bare,
             "step_seconds": step, "arithmetic_seconds": limit, "step / arithmetic": step / limit}]


def grown(count, width, memory, work):
    """Figures of every stage behind reading, over `count` clustered keys. Search is measured on a share of them."""
    path = work / f"keys_{count}_{width}.f16"
    if not path.exists() or path.stat().st_size != 2 * count * width:
        write_clustered(path, count, width, 0)
    keys, entries, found = open_keys(path, width), clustered_entries(count), {"entries": count}
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        with PeakMemory() as peak:
            factory = choose_index(count, width, int(memory * 2**30))
            built, (index, mean) = seconds_of(lambda: build_index(keys, factory))
            store = store_of(index, mean, entries, keys)
            tuned, recall = seconds_of(lambda: store.tune(K, 0.95))
            faiss.write_index(index, str(folder / "index"))
        found |= {"index": factory, "recall": recall, "nprobe": (lists := inverted_lists(index)) and lists.nprobe,
                  "build_seconds": built, "tune_seconds": tuned, "build_peak_gib": peak.peak / 2**30}
        del index, store
        with PeakMemory() as peak:
            store = store_of(faiss.read_index(str(folder / "index"), faiss.IO_FLAG_MMAP), mean, entries, keys)
            part = keys[:chunk_size(count, width, K)]
            searched, (D, I) = seconds_of(lambda: store.search_others(part, entries.example[:len(part)], K))
        for letter, array, kind in (("D", D, np.float32), ("I", I, np.int32)):
            np.save(folder / f"neighbours_{letter}.npy", array.astype(kind))
        found |= {"search_seconds": searched * count / len(part), "search_peak_gib": peak.peak / 2**30}
        with PeakMemory() as peak:
            found["step_seconds"] = statistics.median(training_steps(keys, entries, folder, width)[2:])
        return found | {"training_peak_gib": peak.peak / 2**30}


def growth(given):
    """grown() for every size, each in a process of its own, so that one's memory is not another's."""
    rows = []
    for count in given.entries:
        words = ["one", "--entries", count, "--width", given.width, "--memory", given.memory, "--work", given.work]
        done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.strip().split("\n")[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if len(rows) > 1:
        plot(rows)
    return rows


def plot(rows):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = [row["entries"] for row in rows]
    for name in ("build_seconds", "tune_seconds", "search_seconds"):
        seconds = [row[name] if row[name] > 0.01 else float("nan") for row in rows]  # a Flat index is not tuned
        axes.plot(counts, seconds, marker="o", label=name.split("_")[0])
    axes.plot(counts, [rows[0]["search_seconds"] * count / counts[0] for count in counts], "k:", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="entries", ylabel="seconds", title="Index and search over clustered keys")
    axes.legend()
    figure.savefig(ROOT / "benchmarks/pictures/growth.png", dpi=110)


def processes(given):
    """Seconds of each stage of one process and of two with one thread each: the demo with one pass."""
    common = ["train_memory_decoder.py", "--demo", "--num_epochs", "1", "--device", "cpu"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
              "no", "--dynamo_backend", "no"]
    rows = []
    for count, words in ((1, common), (2, [*launch, *common])):
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            subprocess.run([sys.executable, *words, "--output_dir", folder], cwd=ROOT, check=True, capture_output=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
            rows.append({"processes": count} | json.loads((Path(folder) / "metrics.json").read_text())["seconds"])
    return [*rows, {"processes": "one / two"} | {name: rows[0][name] / rows[1][name] for name in rows[0] if name != "processes"}]


def table(rows):
    """A Markdown table with a column for each figure."""
    lines = [rows[0], ["---:"] * len(rows[0])]
    lines += [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["pace", "growth", "processes", "one"], help="one: growth at a single size")
    parser.add_argument("--entries", type=int, nargs="+", default=[50_000, 100_000, 200_000, 400_000])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that the index may take")
    parser.add_argument("--work", type=Path, default=ROOT / "build/stages", help="where keys are kept")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    parts = {"pace": pace, "growth": lambda: growth(given), "processes": lambda: processes(given),
             "one": lambda: [grown(given.entries[0], given.width, given.memory, given.work)]}
    rows = parts[given.part]()
    print(f"{table(rows)}\n\n{json.dumps(rows if len(rows) > 1 else rows[0])}")


if __name__ == "__main__":
    main()
