"""Entries, their index, and kNN distributions.

An entry is one (key, value) pair: the base model's hidden state at one position of one example, and
the token that comes next. Letters: N entries, H key width, K neighbours, Q queries, B windows,
T positions. D and I are distances and entry ids, as faiss names them.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from sources.rows import Example
from support.command import UserError
from support.shards import Shards, writing_at

SHARD_BATCHES = 8  # batches that the base reads before progress is noted


def hidden_batches(base, windows, batch_size):
    """Yield (number of the first window, the entries' hidden states (n, H)) of batch_size windows at a time."""
    for first in range(0, len(windows), batch_size):
        batch = windows[first:first + batch_size]
        longest = max(len(w.ids) for w in batch)
        # Right padding changes nothing before it under a causal mask, so no attention mask is needed.
        ids = torch.tensor([w.ids + [base.eos] * (longest - len(w.ids)) for w in batch])
        hidden = base.hidden(ids)
        yield first, torch.cat([h[w.skip:len(w.ids) - 1] for h, w in zip(hidden, batch, strict=True)])


def write_keys(base, windows, offsets, path, batch_size, known=0, rank=0, world=1):
    """Write the keys (N, H) fp16 of all windows into the file `path`. A stopped run is resumed.

    known: how many of the first windows have keys that were copied into the file. rank, world: this process, of how many.
    """
    shards = Shards(path.with_name(f"{path.stem}_done"), [known, len(windows)], SHARD_BATCHES * batch_size, rank, world)
    total = sum(int(offsets[shard.stop] - offsets[shard.start]) for shard in shards.left)
    with tqdm(total=total, desc="keys", unit="entry", mininterval=1, disable=rank > 0) as bar:
        for shard in shards:
            with writing_at(path, 2 * base.width * int(offsets[shard.start])) as file:
                for _, hidden in hidden_batches(base, windows[shard], batch_size):
                    keys = hidden.to("cpu", torch.float16).numpy()
                    if not np.isfinite(keys).all():
                        raise UserError(f"Some hidden states of {base.name} are not finite or above 65504, the most that keys "
                                        "hold; try another --dtype or base model.")
                    file.write(keys.tobytes())
                    bar.update(len(keys))


def open_keys(path, width):
    """The keys (N, H) of a file, memory-mapped."""
    return np.memmap(path, dtype=np.float16, mode="r").reshape(-1, width)


def seen_tokens(entries):
    """(ids (V',) of the tokens that are some entry's value, ascending; the probability of all other tokens together).

    The probability is the share of positions whose token occurs in no other example (Good 1953, over examples).
    With n such positions it is max(n, 1) / (N + 1), so that no token is impossible.
    """
    pairs = np.unique(np.stack([entries.values, entries.example]), axis=1)  # (token, example)
    seen, examples = np.unique(pairs[0], return_counts=True)
    alone = np.isin(entries.values, seen[examples == 1]).sum()
    return seen, float(max(alone, 1) / (len(entries.values) + 1))


def copy_keys(source, wanted, path, width):
    """Copy the wanted entries' keys from the file `source` to the beginning of `path`, unless `path` holds them already."""
    if path.exists() and path.stat().st_size >= 2 * width * len(wanted):
        return
    keys = open_keys(source, width)
    with open(path, "wb") as file:
        for i in range(0, len(wanted), 65536):
            file.write(keys[wanted[i:i + 65536]].tobytes())


def write_examples(examples, path):
    """Write Examples to a file, one JSON object a line."""
    lines = [json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")


def read_examples(path):
    """The Examples of a file that write_examples wrote."""
    with open(path, encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028
        return [Example(**json.loads(line)) for line in lines]


class Datastore:
    """The entries and their index. Searches by hidden state, and knows the text that each entry comes from."""

    def __init__(self, index, mean, values, example, position, examples):
        self.index, self.mean, self.values = index, mean, values
        self.example, self.position, self.examples = example, position, examples

    @classmethod
    def open(cls, folder):
        """Open what training wrote. The caller must have checked the files against the manifest.

        The keys are not among these files, so the distances are the index's own. Those of a lossy index are approximate.
        """
        folder = Path(folder)
        with np.load(folder / "datastore_entries.npz", allow_pickle=False) as entries:
            example, position, mean = entries["example"], entries["position"], entries["mean"]
        values = np.load(folder / "datastore_values.npy", allow_pickle=False)
        index = faiss.read_index(str(folder / "faiss_index.bin"), faiss.IO_FLAG_MMAP)
        return cls(index, mean, values, example, position, read_examples(folder / "examples.jsonl"))

    def __len__(self):
        return len(self.values)

    def search(self, queries, k):
        """Squared L2 distances D (Q, K), ascending, and entry ids I (Q, K) of the nearest entries, as the index has them.

        queries (Q, H). Where an approximate index finds fewer than k, D is inf and I is -1.
        """
        queries = np.asarray(queries, np.float32) - self.mean
        # For a few queries one thread is faster than several, which must first synchronise.
        with search_threads(1 if len(queries) < 16 else torch.get_num_threads()):
            D, I = self.index.search(queries, k)
        D = np.where(I < 0, np.inf, np.maximum(D, 0))
        order = np.argsort(D, axis=1, kind="stable")  # some builds return unsorted lists
        return np.take_along_axis(D, order, 1), np.take_along_axis(I, order, 1)


@contextmanager
def search_threads(count):
    """Let faiss search with so many threads meanwhile. torch may share its OpenMP, and would keep that number afterwards."""
    before = torch.get_num_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def knn_weights(D, temperature):
    """Weights (Q, K) of neighbours at squared distances D (Q, K): softmax(-D / temperature).

    A temperature of inf gives equal votes. An infinite distance has weight 0. Khandelwal et al. 2020, equation 2.
    """
    found = np.isfinite(D)
    nearest = D.min(axis=1, keepdims=True, initial=np.finfo(np.float32).max)  # subtracted so that exp cannot underflow
    weights = np.exp(-(np.where(found, D, nearest) - nearest) / temperature) * found
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)


def default_temperature(D):
    """Half the median squared distance of a sample. It was the best temperature tried for kNN-LM on legal text."""
    sample = D[:: max(1, len(D) // 10_000)]
    return max(float(np.median(sample[np.isfinite(sample)])) / 2, 1e-6)
