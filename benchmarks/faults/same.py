"""Whether two folders of artefacts hold the same memory, up to the last bits of numbers."""

import json

import faiss
import numpy as np
import torch

from datastore import open_keys
from index import inverted_lists
from memory_decoder import MemoryDecoder, read_manifest
from support.command import UserError

RTOL, ATOL = 1e-3, 1e-4
AT_ONCE = 16_384


def differences(a, b):
    """Sentences that say what differs between two trained folders. Both must be whole. Empty if they hold the same memory."""
    try:
        manifests = [read_manifest(folder) for folder in (a, b)]
    except UserError as error:
        return [str(error)]
    if None in manifests:
        return [f"{(a, b)[manifests.index(None)]} has no manifest."]
    if manifests[0]["stages"] != manifests[1]["stages"]:
        return ["The two folders are of different commands."]
    stages = [{name: folder / "stages" / path for name, path in manifests[0]["stages"].items()} for folder in (a, b)]
    left = [path.name for path in b.rglob("*") if path.name.endswith(".part") or path.name.startswith("checkpoint")]
    found = [f"{name} is left over." for name in left]
    found += [f"{name} differs." for name in ("datastore_values.npy", "examples.jsonl", "held_out.jsonl")
              if (a / name).read_bytes() != (b / name).read_bytes()]
    for compare, places in ((entries_differ, (a, b)), (keys_differ, stages), (index_differs, (a, b)), (neighbours_differ, stages),
                            (decoders_differ, (a, b)), (metrics_differ, (a, b)), (losses_differ, stages)):
        found += [sentence] if (sentence := compare(*places)) else []
    return found


def entries_differ(a, b):
    with np.load(a / "datastore_entries.npz") as one, np.load(b / "datastore_entries.npz") as other:
        same = all(np.array_equal(one[name], other[name]) for name in ("example", "position"))
        return None if same and np.allclose(one["mean"], other["mean"], RTOL, ATOL) else "The entries differ."


def keys_differ(a, b):
    one, other = (np.memmap(stages["datastore"] / "keys.f16", np.float16, "r") for stages in (a, b))
    if len(one) != len(other):
        return "The numbers of keys differ."
    for i in range(0, len(one), 2**22):
        pair = [keys[i:i + 2**22].astype(np.float32) for keys in (one, other)]
        if not np.allclose(*pair, rtol=2 * RTOL, atol=ATOL, equal_nan=True):  # half precision has eleven bits
            return "The keys differ."
    return None


def whole_index(folder):
    index = faiss.read_index(str(folder / "faiss_index.bin"))
    if ivf := inverted_lists(index):
        ivf.make_direct_map()
    return index


def index_differs(a, b):
    one, other = whole_index(a), whole_index(b)
    if one.ntotal != other.ntotal or type(one) is not type(other):
        return "The indexes are not of one kind and size."
    lists = [inverted_lists(index) for index in (one, other)]
    if lists[0] is not None and (lists[0].nlist, lists[0].nprobe) != (lists[1].nlist, lists[1].nprobe):
        return "The indexes do not read as many lists."
    for i in range(0, one.ntotal, AT_ONCE):
        keys = [index.reconstruct_n(i, min(AT_ONCE, one.ntotal - i)) for index in (one, other)]
        if not np.allclose(*keys, rtol=2 * RTOL, atol=ATOL):
            return "The keys of the indexes differ."
    return None


def neighbours_differ(a, b):
    """D must be close. Where I differs, the two must be equally near, by the keys themselves."""
    D, I = ([np.load(stages["neighbours"] / f"neighbours_{name}.npy", mmap_mode="r") for stages in (a, b)] for name in "DI")
    if D[0].shape != D[1].shape or I[0].shape != I[1].shape:
        return "The neighbours are not as many."
    if not np.allclose(*D, rtol=RTOL, atol=ATOL):
        return "The distances of the neighbours differ."
    rows = np.flatnonzero((I[0] != I[1]).any(1))
    if len(rows) == 0:
        return None
    if any(len(set(row[row >= 0].tolist())) < (row >= 0).sum() for row in I[1][rows]):
        return "An entry is a neighbour twice."
    keys = open_keys(a["datastore"] / "keys.f16", keys_width(a["datastore"], len(D[0])))
    distances = [key_distances(keys, keys[rows].astype(np.float32), ids[rows]) for ids in I]
    if np.allclose(*distances, rtol=RTOL, atol=ATOL):
        return None
    return f"The neighbours of some of {len(rows)} entries differ, and are not equally near."


def key_distances(keys, queries, I):
    """Squared L2 distances (Q, C) between queries (Q, H) and the keys of the entries I (Q, C). Where I is -1, inf."""
    D = np.stack([np.square(keys[ids].astype(np.float32) - query).sum(1) for query, ids in zip(queries, I, strict=True)])
    return np.where(I < 0, np.inf, D)


def keys_width(stage, entries):
    return (stage / "keys.f16").stat().st_size // 2 // entries


def decoders_differ(a, b):
    one, other = (MemoryDecoder.load(folder / "memory_decoder.pt") for folder in (a, b))
    if one.sizes != other.sizes or len(one.seen) != len(other.seen):
        return "The decoders have different sizes."
    for name, weights in one.state_dict().items():
        if not torch.allclose(weights, other.state_dict()[name], RTOL, ATOL):
            return f"The decoder's weights {name} differ by up to {farthest(weights, other.state_dict()[name]):.2g}."
    return None


def farthest(x, y):
    return float((x.float() - y.float()).abs().max())


def metrics_differ(a, b):
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    if any(one[name] != other[name] for name in ("entries", "k", "seen_tokens", "index")):
        return "The counts in metrics.json differ."
    for name, value in one["held_out"].items():
        if not np.isclose(value, other["held_out"].get(name, np.nan), rtol=RTOL):
            return f"The held-out {name} is {other['held_out'].get(name)} and not {value}."
    return None


def losses_differ(a, b):
    one, other = (np.array(json.loads((stages["decoder"] / "done.json").read_text())["losses"]) for stages in (a, b))
    return None if one.shape == other.shape and np.allclose(one, other, RTOL, ATOL) else "The losses of the training differ."
