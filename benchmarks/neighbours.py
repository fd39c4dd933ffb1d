"""How fast the index that auto chooses finds neighbours, beside exact search, at the recall that --recall asks for.

    python benchmarks/neighbours.py --entries 1000000 --width 2048    # 4 GB of disk
    python benchmarks/neighbours.py --device cuda

Makes clustered random keys on disk and builds the index over them. Its lists are tuned on one sample of stored keys and measured
on another, as training searches: no query finds its own example. Prints a table, and all figures as JSON on the last line.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datastore import Datastore, open_keys
from index import CHUNK, build_index, choose_index, index_bytes, inverted_lists
from search import TrainingDatastore, chunk_size
from support.machine import free_memory

CENTRES = 20_000
DIRECTIONS = 32  # in which the keys of a cluster differ, as hidden states of one kind of position do
LENGTH = 128  # entries of an example


def write_clustered(path, entries, width, seed):
    """Write keys (N, H) fp16: Gaussian centres with sizes as in Zipf's law, and around them noise in a few directions.

    The spread of a coordinate falls with its number, as principal components of hidden states do.
    """
    rng = np.random.default_rng(seed)
    spread = np.arange(1, width + 1) ** -0.5
    centres = (rng.standard_normal((CENTRES, width)) * spread).astype(np.float32)
    directions = (0.5 * rng.standard_normal((DIRECTIONS, width)) * spread / DIRECTIONS**0.5).astype(np.float32)
    sizes = 1 / np.arange(1, CENTRES + 1)
    with open(path, "wb") as file:
        for first in range(0, entries, CHUNK):
            count = min(CHUNK, entries - first)
            keys = centres[rng.choice(CENTRES, count, p=sizes / sizes.sum())]
            keys += rng.standard_normal((count, DIRECTIONS), np.float32) @ directions
            file.write(keys.astype(np.float16).tobytes())


class PeakMemory:
    """Watches the memory of this process. `peak`: the most bytes beyond those at the start, without mapped files."""

    def __enter__(self):
        self.peak, self.start, self.stop = 0, self.now(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    @staticmethod
    def now():
        """Mapped files, as the keys are, do not count: the system drops their pages when it needs them."""
        memory = psutil.Process().memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def watch(self):
        while not self.stop.wait(0.05):
            self.peak = max(self.peak, self.now() - self.start)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def seconds_of(search):
    """(seconds, what the search returns)."""
    began = time.perf_counter()
    found = search()
    return time.perf_counter() - began, found


def faiss_exact(keys, queries, mean, k):
    """Search every key by faiss, chunk after chunk, as a datastore that is larger than memory needs."""
    queries = queries.astype(np.float32) - mean
    for i in range(0, len(keys), CHUNK):
        faiss.knn(queries, keys[i:i + CHUNK].astype(np.float32) - mean, k)


def measure(options, path):
    """All figures of one run, as plain data."""
    keys, example, k = open_keys(path, options.width), np.arange(options.entries) // LENGTH, options.k
    factory = options.index or choose_index(options.entries, options.width, int(options.memory * 2**30))
    with PeakMemory() as memory:
        building, (index, mean) = seconds_of(lambda: build_index(keys, factory, options.seed))
        fields = index, mean, example, example, None, []
        store = TrainingDatastore(*fields, keys, options.device)
        tuning, _ = seconds_of(lambda: store.tune(k, options.recall, options.seed))
        picks = np.sort(np.random.default_rng(options.seed + 1).permutation(options.entries)[:options.sample])
        queries, own = keys[picks], example[picks]
        store.search_others(queries[:64], own[:64], k)  # once before, so that threads and pages are there
        indexed, (D, _) = seconds_of(lambda: store.search_others(queries, own, k))
    lists = inverted_lists(index)
    alone, _ = seconds_of(lambda: Datastore(*fields).search(queries[:options.fewer], k))
    store.lists = None  # from here on every query meets every key
    exact, (exact_D, _) = seconds_of(lambda: store.search_others(queries, own, k))
    by_faiss, _ = seconds_of(lambda: faiss_exact(keys, queries, mean, k))
    return {"entries": options.entries, "width": options.width, "index": factory, "k": k, "device": options.device,
            "nprobe": lists and lists.nprobe, "lists": lists and lists.nlist, "sample": len(picks),
            "recall": float((exact_D[:, -1:] * (1 + 1e-5) >= D).mean()),
            "queries_a_second": len(picks) / indexed, "exact_queries_a_second": len(picks) / exact,
            "faiss_exact_queries_a_second": len(picks) / by_faiss, "faiss_queries_a_second": options.fewer / alone,
            "times_as_fast": min(exact, by_faiss) / indexed,
            "build_seconds": building, "tune_seconds": tuning, "threads": torch.get_num_threads(),
            "index_bytes": index_bytes(options.entries, options.width, factory), "peak_bytes": memory.peak}


def table(found):
    """The Markdown table of the figures."""
    row = {"index": found["index"], "lists read": f"{found['nprobe']} of {found['lists']}" if found["lists"] else "-",
           f"recall@{found['k']}": f"{found['recall']:.3f}", "queries a second": f"{found['queries_a_second']:.0f}",
           "the same lists by faiss": f"{found['faiss_queries_a_second']:.0f}", "exact": f"{found['exact_queries_a_second']:.0f}",
           "exact by faiss": f"{found['faiss_exact_queries_a_second']:.0f}",
           "times as fast as exact": f"{found['times_as_fast']:.1f}", "peak GiB": f"{found['peak_bytes'] / 2**30:.2f}"}
    lines = row, ["---"] + ["---:"] * (len(row) - 1), row.values()
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--memory", type=float, default=free_memory() / 2**31, help="GiB for the index; default: half of the free")
    parser.add_argument("--index", help="faiss factory string; default: the one that auto chooses")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sample", type=int, help="stored keys that are searched for at once; default: as many as in training")
    parser.add_argument("--fewer", type=int, default=512, help="of them, those for faiss's own search of the lists")
    parser.add_argument("--device", default="cpu", help="where torch multiplies and sorts")
    parser.add_argument("--work", type=Path, default=ROOT / "build/neighbours", help="where the keys are kept")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.sample = options.sample or chunk_size(options.entries, options.width, options.k)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / f"keys_{options.entries}_{options.width}_{options.seed}.f16"
    if not path.exists() or path.stat().st_size != 2 * options.entries * options.width:
        write_clustered(path, options.entries, options.width, options.seed)
    found = measure(options, path)
    print(f"{found['entries']:,} entries of width {found['width']}, {found['sample']:,} queries, {found['threads']} threads\n")
    print(f"{table(found)}\n\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
