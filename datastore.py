"""Entries, their FAISS index, neighbour search and kNN distributions.

An entry is one (key, value) pair: the base model's hidden state at one position of one example, and
the token that comes next. Letters: N entries, H key width, K neighbours, Q queries, B windows,
T positions. D and I are distances and entry ids, as faiss names them.
"""

import json
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from sources.rows import Example
from support.command import UserError, one_line
from support.shards import Shards, write_rows, writing_at

FLAT_LIMIT = 50_000  # entries up to which exact search is quick enough on two cores
PROBED = 64  # a search reads one in this many inverted lists
SEARCH_CHUNK = 8192  # queries in one faiss call
SHARD_BATCHES = 8  # batches that the base reads before progress is noted
FOUND_AT_ONCE = 2_000_000  # neighbours that one call may find, at about 60 bytes each


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
    return np.memmap(path, dtype=np.float16, mode="r").reshape(-1, width)


def grow_index(path, keys, first, mean):
    """The faiss index in the file `path`, after adding the keys (N, H) from `first` on."""
    index = faiss.read_index(str(path))
    for i in range(first, len(keys), 65536):
        index.add(keys[i:i + 65536].astype(np.float32) - mean)
    return index


def choose_index(entries, width, memory):
    """A faiss factory string: exact search while it is quick, then inverted lists, then also PCA and 8-bit numbers.

    memory: bytes that the index may take.
    """
    if entries <= FLAT_LIMIT:
        return "Flat"
    lists = int(4 * entries**0.5)
    if 2 * entries * width <= memory:
        return f"IVF{lists},SQfp16"
    return f"PCA{min(width, 256)},IVF{lists},SQ8"


def build_index(keys, factory, seed=0):
    """(index, mean): a faiss index over keys (N, H) minus their mean.

    Without the mean, faiss's batched |q|^2 - 2qx + |x|^2 stays exact in float32. L2 distances do not change.
    Raises UserError for a factory string that faiss does not know or cannot train.
    """
    chunks = range(0, len(keys), 65536)
    mean = sum(keys[i:i + 65536].astype(np.float32).sum(0, dtype=np.float64) for i in chunks) / len(keys)
    mean = mean.astype(np.float32)
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        index = faiss.index_factory(keys.shape[1], factory)
        lists = 256
        if "IVF" in factory:
            ivf = faiss.extract_index_ivf(index)
            lists, ivf.cp.niter = ivf.nlist, 8
            ivf.nprobe = max(8, lists // PROBED)
        if not index.is_trained:
            picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:max(40 * lists, 20_000)])
            sample = keys[picks].astype(np.float32)
            sample -= mean
            index.train(sample)
        for i in tqdm(chunks, desc="index", unit="chunk"):
            index.add(keys[i:i + 65536].astype(np.float32) - mean)
    except RuntimeError as error:
        raise UserError(f"faiss cannot build the index {factory!r}: {one_line(error)}") from None
    return index, mean


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
        """Open what training wrote. The caller must have checked the files against the manifest."""
        folder = Path(folder)
        with np.load(folder / "datastore_entries.npz", allow_pickle=False) as entries:
            example, position, mean = entries["example"], entries["position"], entries["mean"]
        values = np.load(folder / "datastore_values.npy", allow_pickle=False)
        index = faiss.read_index(str(folder / "faiss_index.bin"), faiss.IO_FLAG_MMAP)
        return cls(index, mean, values, example, position, read_examples(folder / "examples.jsonl"))

    def __len__(self):
        return len(self.values)

    def search(self, queries, k, without=None):
        """Squared L2 distances D (Q, K), ascending, and entry ids I (Q, K) of the nearest entries.

        queries (Q, H). without: an example whose entries are skipped, for an exact index only. Where an approximate index
        finds fewer than k, D is inf and I is -1.
        """
        queries = np.asarray(queries, np.float32) - self.mean
        # For a few queries one thread is faster than several, which must first synchronise.
        faiss.omp_set_num_threads(1 if len(queries) < 16 else torch.get_num_threads())
        others = None if without is None else faiss.IDSelectorBitmap(np.packbits(self.example != without, bitorder="little"))
        D, I = self.index.search(queries, k, params=faiss.SearchParameters(sel=others) if others else None)
        D = np.where(I < 0, np.inf, np.maximum(D, 0))
        order = np.argsort(D, axis=1, kind="stable")  # some builds return unsorted lists
        return np.take_along_axis(D, order, 1), np.take_along_axis(I, order, 1)

    def search_others(self, queries, example, k):
        """Like search, but each query leaves out the entries of its own example (Q,)."""
        D = np.full((len(queries), k), np.inf, np.float32)
        I = np.full((len(queries), k), -1, np.int64)
        few = np.full(len(queries), k + k // 2 + 8)  # mostly enough; k plus all of its own entries always is
        left = self._fill_others(np.arange(len(queries)), few, queries, example, D, I)
        own = np.bincount(self.example, minlength=int(example.max(initial=0)) + 1)[example]
        # Faiss skips entries one by one, which pays only for an example with more than half of all entries.
        most = (own[left] > len(self) / 2) & isinstance(self.index, faiss.IndexFlat)
        if most.any():
            D[left[most]], I[left[most]] = self.search(queries[left[most]], k, example[left[most]][0])
        left = left[~most][np.argsort(own[left[~most]], kind="stable")]
        self._fill_others(left, k + own, queries, example, D, I)
        return D, I

    def _fill_others(self, numbers, fetch, queries, example, D, I):
        """Fill rows of D and I (Q, K) from the fetch (Q,) nearest entries of each. Returns the numbers of rows that lack some."""
        lacking, first, k = [], 0, D.shape[1]
        while first < len(numbers):
            here = numbers[first:first + SEARCH_CHUNK]
            here = here[:max(1, FOUND_AT_ONCE // int(fetch[here].max()))]
            first += len(here)
            count = min(len(self), int(fetch[here].max()))
            found_D, found_I = self.search(queries[here], count)
            other = (found_I >= 0) & (self.example[found_I] != example[here, None])
            rank = np.cumsum(other, axis=1)
            row, column = np.nonzero(other & (rank <= k))
            D[here[row], rank[row, column] - 1] = found_D[row, column]
            I[here[row], rank[row, column] - 1] = found_I[row, column]
            lacking.append(here[(rank[:, -1] < k) & (found_I[:, -1] >= 0) & (count < len(self))])
        return np.concatenate(lacking) if lacking else numbers

    def recall(self, keys, k, sample=200, seed=0):
        """Share of the exact k nearest entries that the index finds, over a sample of the stored keys (N, H)."""
        picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:sample])
        queries = keys[picks].astype(np.float32)
        exact = faiss.ResultHeap(len(queries), k)
        for i in range(0, len(keys), 65536):
            chunk = keys[i:i + 65536].astype(np.float32) - self.mean
            D, I = faiss.knn(queries - self.mean, chunk, min(k, len(chunk)))
            exact.add_result(D, I + i)
        exact.finalize()
        _, I = self.search(queries, k)
        return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact.I, I, strict=True)]))


def find_neighbours(store, keys, k, folder, earlier=None, rank=0, world=1):
    """Write D fp32 and I int32 (N, K) of every entry, its own example left out. A stopped run is resumed.

    earlier: a folder with D and I of the first entries. These are then compared with the new ones only. rank, world: this
    process, of how many.
    """
    known = [np.load(earlier / f"neighbours_{name}.npy", mmap_mode="r") for name in "DI"] if earlier else None
    old = len(known[0]) if known else 0
    shards = Shards(folder / "neighbours_done", [0, old, len(keys)], SEARCH_CHUNK, rank, world)
    total = sum(rows.stop - rows.start for rows in shards.left)
    with tqdm(total=total, desc="neighbours", unit="entry", disable=rank > 0) as bar:
        for rows in shards:
            if rows.start < old:
                D, I = nearer(known[0][rows], known[1][rows], keys[rows], keys[old:], store.mean, old)
            else:
                D, I = store.search_others(keys[rows], store.example[rows], k)
            write_rows(folder / "neighbours_D.npy", D.astype(np.float32), rows.start, len(keys))
            write_rows(folder / "neighbours_I.npy", I.astype(np.int32), rows.start, len(keys))
            bar.update(rows.stop - rows.start)


def nearer(D, I, queries, new, mean, first):
    """D, I (Q, K) of the K nearest among neighbours D, I (Q, K) and new keys (M, H) of other examples, numbered from `first`."""
    queries, K = queries.astype(np.float32) - mean, D.shape[1]
    for i in range(0, len(new), 65536):
        chunk = new[i:i + 65536].astype(np.float32) - mean
        new_D, new_I = faiss.knn(queries, chunk, min(K, len(chunk)))
        D, I = np.concatenate([D, np.maximum(new_D, 0)], 1), np.concatenate([I, new_I + first + i], 1)
        order = np.argsort(D, axis=1, kind="stable")[:, :K]
        D, I = np.take_along_axis(D, order, 1), np.take_along_axis(I, order, 1)
    return D, I


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
