"""Entries, neighbour search and kNN distributions.

An entry is one (key, value) pair: the base model's hidden state at one position of one example, and
the token that comes next. Letters: N entries, H key width, K neighbours, Q queries, B windows,
T positions. D and I are distances and entry ids, as faiss names them.
"""

import bisect
import json
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from index import centred, inverted_lists
from sources.rows import Example
from support.command import UserError
from support.shards import Shards, write_rows, writing_at

SEARCH_CHUNK = 8192  # queries in one faiss call
SHARD_BATCHES = 8  # batches that the base reads before progress is noted
FOUND_AT_ONCE = 2_000_000  # neighbours that one call may find, at about 60 bytes each
CANDIDATES = 4  # for each neighbour, so many are fetched from a lossy index and ranked again by their keys
SAMPLE = 512  # stored entries whose exact neighbours tell the recall of an index


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

    def __init__(self, index, mean, values, example, position, examples, keys=None):
        """keys (N, H): those of a lossy index. Its candidates are then ranked again by their exact distances."""
        self.index, self.mean, self.values, self.keys = index, mean, values, keys
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
        """Squared L2 distances D (Q, K), ascending, and entry ids I (Q, K) of the nearest entries.

        queries (Q, H). Where an approximate index finds fewer than k, D is inf and I is -1.
        """
        return self._ranked(queries, *self.search_index(queries, self._candidates(k)), k)

    def search_index(self, queries, k, without=None):
        """Like search, with the distances of the index. without: an example whose entries are skipped, for an exact index only."""
        queries = np.asarray(queries, np.float32) - self.mean
        others = None if without is None else faiss.IDSelectorBitmap(np.packbits(self.example != without, bitorder="little"))
        # For a few queries one thread is faster than several, which must first synchronise.
        with search_threads(1 if len(queries) < 16 else torch.get_num_threads()):
            D, I = self.index.search(queries, k, params=faiss.SearchParameters(sel=others) if others else None)
        D = np.where(I < 0, np.inf, np.maximum(D, 0))
        return smallest(D, I, k)  # some builds return unsorted lists

    def _candidates(self, k):
        return k if self.keys is None else CANDIDATES * k

    def _ranked(self, queries, D, I, k):
        """The k nearest among the candidates D, I (Q, C), by their keys if the store has them."""
        return (D, I) if self.keys is None else smallest(key_distances(self.keys, queries, I), I, k)

    def search_others(self, queries, example, k):
        """Like search, but each query leaves out the entries of its own example (Q,)."""
        return self._ranked(queries, *self._others(queries, example, self._candidates(k)), k)

    def _others(self, queries, example, k):
        """The search of the index for search_others."""
        D = np.full((len(queries), k), np.inf, np.float32)
        I = np.full((len(queries), k), -1, np.int64)
        few = np.full(len(queries), k + k // 2 + 8)  # mostly enough; k plus all of its own entries always is
        left = self._fill_others(np.arange(len(queries)), few, queries, example, D, I)
        own = np.bincount(self.example, minlength=int(example.max(initial=0)) + 1)[example]
        # Faiss skips entries one by one, which pays only for an example with more than half of all entries.
        most = (own[left] > len(self) / 2) & isinstance(self.index, faiss.IndexFlat)
        if most.any():
            D[left[most]], I[left[most]] = self.search_index(queries[left[most]], k, example[left[most]][0])
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
            found_D, found_I = self.search_index(queries[here], count)
            other = (found_I >= 0) & (self.example[found_I] != example[here, None])
            rank = np.cumsum(other, axis=1)
            row, column = np.nonzero(other & (rank <= k))
            D[here[row], rank[row, column] - 1] = found_D[row, column]
            I[here[row], rank[row, column] - 1] = found_I[row, column]
            lacking.append(here[(rank[:, -1] < k) & (found_I[:, -1] >= 0) & (count < len(self))])
        return np.concatenate(lacking) if lacking else numbers

    def recall(self, keys, picks, exact):
        """Share of the exact neighbours' ids exact (Q, K) that a search for the stored entries picks (Q,) finds.

        An entry no farther than the last exact one counts too, since equal keys may change places. keys (N, H).
        """
        queries, k = keys[picks], exact.shape[1]
        _, found = self.search_others(queries, self.example[picks], k)
        farthest = key_distances(keys, queries, exact).max(1, keepdims=True)
        return float((key_distances(keys, queries, found) <= farthest * (1 + 1e-5)).mean())

    def tune(self, keys, k, recall, seed=0):
        """Let a search read the fewest inverted lists (nprobe) that reach a recall@k, over a sample of the stored keys (N, H).

        Returns (recall with these, recall with all lists). If all do not reach it, the fewest with that share of what all
        find are read. A recall of 1 reads all, which no sample can replace. An index without inverted lists stays as it is.
        """
        picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:SAMPLE])
        _, exact = exact_neighbours(keys, picks, self.example, self.mean, k)
        ivf = inverted_lists(self.index)
        if ivf is None:
            return (self.recall(keys, picks, exact),) * 2

        def found(lists):
            ivf.nprobe = lists
            return self.recall(keys, picks, exact)

        most = found(ivf.nlist)
        if recall < 1:
            wanted = recall if most >= recall else recall * most
            return found(fewest(lambda lists: found(lists) >= wanted, ivf.nlist)), most
        return most, most


def fewest(enough, most):
    """The smallest number from 1 to `most` that is enough, if more is always enough too. Otherwise `most`."""
    high = 1
    while high < most and not enough(high):
        high = min(2 * high, most)
    low = high // 2 + 1
    return low + bisect.bisect_left(range(low, high), True, key=enough)


@contextmanager
def search_threads(count):
    """Let faiss search with so many threads meanwhile. torch may share its OpenMP, and would keep that number afterwards."""
    before = torch.get_num_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def smallest(D, I, k):
    """D, I (Q, K): the k smallest distances of each row of D, I (Q, C), ascending."""
    order = np.argsort(D, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(D, order, 1), np.take_along_axis(I, order, 1)


def key_distances(keys, queries, I):
    """Squared L2 distances (Q, C) in float32 between queries (Q, H) and the keys of the entries I (Q, C). Where I is -1, inf."""
    D, rows = np.empty(I.shape, np.float32), max(1, 2**18 // (I.shape[1] * keys.shape[1]))  # a block stays in the cache
    for i in range(0, len(I), rows):
        apart = keys[I[i:i + rows]].astype(np.float32)
        apart -= queries[i:i + rows, None]
        D[i:i + rows] = np.einsum("qch,qch->qc", apart, apart)
    D[I < 0] = np.inf
    return D


def exact_neighbours(keys, picks, example, mean, k, device="cpu"):
    """D, I (Q, K) of the nearest entries of other examples to the stored entries picks (Q,), by comparing with all keys (N, H).

    example (N,). device: where torch multiplies and sorts.
    """
    queries = torch.from_numpy(keys[picks].astype(np.float32) - mean).to(device)
    own, lengths = torch.from_numpy(example[picks]).to(device), queries.square().sum(1, keepdim=True)
    D, I = torch.full((len(picks), k), torch.inf, device=device), torch.full((len(picks), k), -1, device=device)
    for i, chunk in centred(keys, mean):
        chunk = torch.from_numpy(chunk).to(device)
        new = torch.addmm(lengths + chunk.square().sum(1), queries, chunk.T, alpha=-2)
        new[own[:, None] == torch.from_numpy(example[i:i + len(chunk)]).to(device)] = torch.inf
        new, place = new.topk(min(k, len(chunk)), largest=False)
        D, order = torch.cat([D, new], 1).topk(k, largest=False)
        I = torch.cat([I, place + i], 1).gather(1, order)
    return D.clamp_min(0).cpu().numpy(), I.cpu().numpy()


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
    queries, k = queries.astype(np.float32) - mean, D.shape[1]
    for i, chunk in centred(new, mean):
        new_D, new_I = faiss.knn(queries, chunk, min(k, len(chunk)))
        D, I = smallest(np.concatenate([D, np.maximum(new_D, 0)], 1), np.concatenate([I, new_I + first + i], 1), k)
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
