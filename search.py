"""What training searches for: the nearest keys of other examples, for every entry, by matrix products.

Letters: N entries, H key width, K neighbours, Q queries, L inverted lists. D and I are distances and entry ids.
"""

import math

import faiss
import numpy as np
import torch
from tqdm import tqdm

from datastore import Datastore
from index import inverted_lists, transforms
from support.shards import Shards, write_rows

SEARCH_CHUNK = 16_384  # queries at once in a small datastore
SEARCH_NUMBERS = 2**26  # bound on queries x (width + 10 K) in a large one
PROBES = 2**22  # pairs of query and inverted list that are sorted at once
PAIRS = 2**21  # pairs of query and key that are compared at once: their distances, 8 MB, stay in the CPU's cache
SAMPLE = 512  # stored entries whose exact neighbours tell how many lists to read


class TrainingDatastore(Datastore):
    """A Datastore with its keys (N, H) fp16. It ranks by exact distances, whatever numbers the index keeps.

    All queries that probe an inverted list meet its keys in one matrix product. Faiss compares query by query, which takes
    several times as long on a CPU. An index without inverted lists is not used: every query meets every key.
    """

    def __init__(self, index, mean, values, example, position, examples, keys, device="cpu"):
        """device: where torch multiplies and sorts."""
        super().__init__(index, mean, values, example, position, examples)
        self.keys, self.device, self.lists = keys, device, inverted_lists(index)
        if self.lists:
            found = [entries_of_list(self.lists, number) for number in range(self.lists.nlist)]
            self.ids, self.limits = np.concatenate(found), np.cumsum([0, *map(len, found)])

    def search(self, queries, k):
        return self.search_others(queries, np.full(len(queries), -1), k)

    def search_others(self, queries, example, k):
        """Squared L2 distances D (Q, K), ascending, and entry ids I (Q, K) of the nearest entries of other examples.

        queries (Q, H). example (Q,): the query's own, whose entries do not count. Where there are fewer than k, D is inf and I
        is -1.
        """
        queries, found = np.asarray(queries, np.float32) - self.mean, []
        size = max(1, PROBES // self.lists.nprobe) if self.probes() else SEARCH_CHUNK
        for i in range(0, len(queries), size):
            some = queries[i:i + size]
            nothing = np.full((len(some), k), np.inf, np.float32), np.full((len(some), k), -1)
            best = Nearest(some, example[i:i + size], *nothing, self.device)
            for rows, ids in self.meetings(some):
                best.compare(rows, ids, self)
            found.append(best.result())
        return tuple(map(np.concatenate, zip(*found, strict=True)))

    def better(self, D, I, queries, example, first):
        """D, I (Q, K) of the K nearest among neighbours D, I (Q, K) and the entries from the number `first` on."""
        queries, found = np.asarray(queries, np.float32) - self.mean, []
        for part in (slice(i, i + SEARCH_CHUNK) for i in range(0, len(queries), SEARCH_CHUNK)):
            best = Nearest(queries[part], example[part], D[part], I[part], self.device)
            for ids in pieces(np.arange(first, len(self)), len(best.D)):
                best.compare(None, ids, self)
            found.append(best.result())
        return tuple(map(np.concatenate, zip(*found, strict=True)))

    def probes(self):
        """Whether a search reads only some of the entries."""
        return self.lists is not None and self.lists.nprobe < self.lists.nlist

    def meetings(self, queries):
        """Yield (rows of the queries, entry ids) that are to be compared, for queries (Q, H) minus the mean."""
        if not self.probes():
            for ids in pieces(np.arange(len(self)), len(queries)):
                yield None, ids
            return
        probed = self.nearest_lists(queries, self.lists.nprobe)
        # The nearest lists come first. They hold most neighbours, so that few of the later ones need sorting.
        for part in np.split(probed, [-(-self.lists.nprobe // 8)], axis=1):
            order = np.argsort(part, axis=None, kind="stable")
            limits = np.searchsorted(part.ravel()[order], np.arange(self.lists.nlist + 1))
            for number in np.flatnonzero(np.diff(limits)):
                rows = order[limits[number]:limits[number + 1]] // part.shape[1]
                for ids in pieces(self.ids[self.limits[number]:self.limits[number + 1]], len(rows)):
                    yield torch.from_numpy(rows), ids

    def nearest_lists(self, queries, count):
        """The numbers (Q, count) of the inverted lists whose centroids are nearest to queries (Q, H) minus the mean."""
        for transform in transforms(self.index):
            queries = transform.apply(queries)
        return self.lists.quantizer.search(queries, count)[1]

    def tune(self, k, recall, seed=0):
        """Let a search read the fewest inverted lists (nprobe) that hold a share `recall` of the K nearest, and return the share.

        The share is that of a sample of the entries, whose neighbours are found exactly. A recall of 1 reads all lists, since
        a sample cannot guarantee it. An index without inverted lists stays as it is.
        """
        if self.lists is None:
            return 1.0
        self.lists.nprobe = self.lists.nlist
        if recall == 1:
            return 1.0
        picks = np.sort(np.random.default_rng(seed).permutation(len(self))[:SAMPLE])
        needed = self.lists_needed(picks, self.search_others(self.keys[picks], self.example[picks], k)[1])
        self.lists.nprobe = int(np.sort(needed)[math.ceil(recall * len(needed)) - 1])
        return float((needed <= self.lists.nprobe).mean())

    def lists_needed(self, picks, I):
        """How many lists a search for the stored entries picks (Q,) must read to find each of the entries I (Q, K), one by one."""
        homes, L = np.empty(len(self), np.int64), self.lists.nlist
        homes[self.ids] = np.repeat(np.arange(L), np.diff(self.limits))
        order = self.nearest_lists(self.keys[picks].astype(np.float32) - self.mean, L)
        rank = np.full((len(picks), L + 1), L)
        np.put_along_axis(rank, np.where(order < 0, L, order), np.arange(1, L + 1)[None], 1)
        return np.take_along_axis(rank, np.where(I < 0, L, homes[I]), 1)[I >= 0]


class Nearest:
    """The nearest entries of other examples that some queries have met so far."""

    def __init__(self, queries, example, D, I, device):
        """queries (Q, H) minus the mean, their examples (Q,), and D, I (Q, K) to start with."""
        self.queries, self.example = (torch.as_tensor(np.asarray(x), device=device) for x in (queries, example))
        D, I = (torch.tensor(np.asarray(x), device=device) for x in (D, I))
        self.lengths = self.queries.square().sum(1, keepdim=True)
        self.D, self.I = D - self.lengths, I.long()  # |q - x|^2 - |q|^2, which sorts alike
        # Kept from list to list: allocating memory takes longer than filling it.
        self.chosen, self.products = self.queries.new_empty(0), self.queries.new_empty(max(PAIRS, len(D)))

    def compare(self, rows, ids, store):
        """Let these rows of the queries (None: all) meet the entries ids (M,) of a TrainingDatastore."""
        device, k = self.D.device, self.D.shape[1]
        own = torch.from_numpy(store.example[ids]).to(device)
        met = torch.from_numpy(store.keys[ids]).to(device).float().sub_(torch.from_numpy(store.mean).to(device))
        if rows is None:
            queries, rows = self.queries, torch.arange(len(self.queries), device=device)
        else:
            rows = rows.to(device)
            if len(rows) > len(self.chosen):
                self.chosen = torch.empty_like(self.queries[:2 * len(rows)])
            queries = torch.index_select(self.queries, 0, rows, out=self.chosen[:len(rows)])
        # Without the mean, this product is exact enough in float32.
        room = self.products[:len(rows) * len(ids)].view(len(rows), len(ids))
        new = torch.addmm(met.square().sum(1), queries, met.T, alpha=-2, out=room)
        nearer = new.amin(1) < self.D[rows, -1]  # usually few; sorting all would take as long as the product
        rows, new, ids = rows[nearer], new[nearer], torch.from_numpy(ids).to(device)
        new.masked_fill_(self.example[rows, None] == own, torch.inf)
        self.D[rows], place = torch.cat([self.D[rows], new], 1).topk(k, largest=False)
        before = self.I[rows].gather(1, place.clamp_max(k - 1))
        self.I[rows] = torch.where(place < k, before, ids[(place - k).clamp_min(0)])

    def result(self):
        """D fp32 and I int64 (Q, K)."""
        I = self.I.masked_fill(self.D.isinf(), -1)
        return (self.D + self.lengths).clamp_min(0).cpu().numpy(), I.cpu().numpy()


def entries_of_list(lists, number):
    """The entry ids in one inverted list of a faiss index."""
    size, ids = lists.invlists.list_size(number), lists.invlists.get_ids(number)
    found = faiss.rev_swig_ptr(ids, size).copy() if size else np.empty(0, np.int64)
    lists.invlists.release_ids(number, ids)
    return found


def pieces(ids, queries):
    """Yield the entry ids in pieces. queries: how many are compared with a piece at once."""
    size = max(1, PAIRS // queries)
    for i in range(0, len(ids), size):
        yield ids[i:i + size]


def chunk_size(entries, width, k):
    """How many entries are searched for at once.

    Every chunk reads most keys anew, so chunks grow with the datastore. A large one has 16 or more for several processes.
    """
    return max(SEARCH_CHUNK, min(-(-entries // 16), SEARCH_NUMBERS // (width + 10 * k)))


def find_neighbours(store, k, folder, earlier=None, rank=0, world=1):
    """Write D fp32 and I int32 (N, K) of every entry of a TrainingDatastore. A stopped run is resumed.

    earlier: a folder with D and I of the first entries. These are then compared with the new ones only. rank, world: this
    process, of how many.
    """
    known = [np.load(earlier / f"neighbours_{name}.npy", mmap_mode="r") for name in "DI"] if earlier else None
    old = len(known[0]) if known else 0
    shards = Shards(folder / "neighbours_done", [0, old, len(store)], chunk_size(*store.keys.shape, k), rank, world)
    total = sum(rows.stop - rows.start for rows in shards.left)
    with tqdm(total=total, desc="neighbours", unit="entry", disable=rank > 0) as bar:
        for rows in shards:
            queries, example = store.keys[rows], store.example[rows]
            if rows.start < old:
                D, I = store.better(known[0][rows], known[1][rows], queries, example, old)
            else:
                D, I = store.search_others(queries, example, k)
            write_rows(folder / "neighbours_D.npy", D.astype(np.float32), rows.start, len(store))
            write_rows(folder / "neighbours_I.npy", I.astype(np.int32), rows.start, len(store))
            bar.update(rows.stop - rows.start)
