"""The FAISS index of the keys: which kind, how large, and how it is built.

Letters: N entries, H key width.
"""

import re

import faiss
import numpy as np
import torch
from tqdm import tqdm

from support.command import UserError, one_line

FLAT_LIMIT = 50_000  # entries up to which exact search is quick enough on two cores
CHUNK = 16_384  # keys in float32 at a time
PER_LIST, FEWEST = 40, 20_000  # keys to train with: so many for each inverted list, and at least so many
CODE_BYTES = (64, 32, 16)  # of a product quantiser, which keeps four dimensions of the rotated keys in each byte

# Faiss would keep a table for each inverted list of product codes. Below millions of entries it is larger than the codes.
faiss.cvar.precomputed_table_max_bytes = 0


def centred(keys, mean, first=0):
    """Yield (number of the first key, CHUNK keys (n, H) in float32 minus the mean) from the key `first` on."""
    for i in range(first, len(keys), CHUNK):
        chunk = keys[i:i + CHUNK].astype(np.float32)
        chunk -= mean
        yield i, chunk


def choose_index(entries, width, memory):
    """A faiss factory string: exact search while it is quick, then inverted lists of ever smaller numbers until they fit.

    The order is that of faiss's "Guidelines to choose an index": fp16, PCA and 8 bits, then OPQ and product codes.
    memory: bytes that the index may take.
    """
    if entries <= FLAT_LIMIT:
        return "Flat"
    lists = f"IVF{int(4 * entries**0.5)}"
    choices = [f"{lists},SQfp16", f"PCA{min(width, 256)},{lists},SQ8"]
    # Without polysemous training ("np"), which serves another kind of search and takes minutes.
    choices += [f"OPQ{size}_{4 * size},{lists},PQ{size}np" for size in CODE_BYTES if 4 * size <= width]
    return next((choice for choice in choices if index_bytes(entries, width, choice) <= memory), choices[-1])


def list_count(factory):
    """How many inverted lists a factory string asks for."""
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def index_bytes(entries, width, factory):
    """Approximate bytes of a faiss index over this many entries."""
    codes = factory.split(",")[-1]
    reduced, product = re.search(r"(?:PCA[A-Z]*|OPQ\d+_)(\d+)", factory), re.match(r"PQ(\d+)(?:x(\d+))?", codes)
    kept, bits = int(reduced[1]) if reduced else width, int(product[2] or 8) if product else 0
    size = int(product[1]) * bits // 8 if product else kept * {"Flat": 4, "SQfp16": 2}.get(codes, 1)
    rows = list_count(factory) + (width if reduced else 0) + (2**bits if product else 0)  # centroids and rotation
    return entries * (size + 8) + 4 * kept * rows


def training_keys(entries, factory):
    """How many keys an index of this kind is trained with."""
    return min(entries, max(PER_LIST * list_count(factory), FEWEST))


def inverted_lists(index):
    """The part of an index that has inverted lists, with its nlist and nprobe. None if it has none."""
    return faiss.try_extract_index_ivf(index)


def build_index(keys, factory, seed=0):
    """(index, mean): a faiss index over keys (N, H) minus their mean.

    Without the mean, faiss's batched |q|^2 - 2qx + |x|^2 stays exact in float32. L2 distances do not change.
    Raises UserError for a factory string that faiss does not know or cannot train.
    """
    mean = sum(chunk.sum(0, dtype=np.float64) for _, chunk in centred(keys, np.float32(0))) / len(keys)
    mean = mean.astype(np.float32)
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        index = faiss.index_factory(keys.shape[1], factory)
        limit_training(index)
        if not index.is_trained:
            index.train(training_sample(keys, mean, factory, seed))
        for _, chunk in tqdm(centred(keys, mean), total=-(-len(keys) // CHUNK), desc="index", unit="chunk"):
            index.add(chunk)
    except RuntimeError as error:
        raise refusal(factory, error) from None
    return index, mean


def training_sample(keys, mean, factory, seed):
    """Keys (n, H) in float32 minus the mean, drawn at random, from which an index of this kind learns."""
    picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:training_keys(len(keys), factory)])
    sample = keys[picks].astype(np.float32)
    sample -= mean
    return sample


def refusal(factory, error):
    """The UserError for a factory string that faiss refuses. Of faiss's own text only the reason is kept."""
    reason = re.sub(r"^.*\.(?:cpp|h):\d+: |^Error: '.*' failed: ", "", one_line(error)).rstrip(".")
    return UserError(f"faiss cannot build the index {factory!r}: {reason}; choose another --index, e.g. auto or Flat.")


def check_index(factory, width, entries):
    """Raise UserError for a factory string that cannot work, before anything is read with the base model.

    Some that faiss takes would end the process or make nothing of the keys: those with a size of 0.
    """
    if re.search(r"(?<!\d)0+(?!\d)", factory):
        raise UserError(f"The index {factory!r} has a size of 0; choose another --index, e.g. auto or Flat.")
    if list_count(factory) > entries:
        raise UserError(f"The index {factory!r} has more inverted lists than the {entries} entries; choose fewer.")
    try:
        index = faiss.index_factory(width, factory)
    except RuntimeError as error:
        raise refusal(factory, error) from None
    for transform in transforms(index):
        if transform.d_out > transform.d_in:
            raise UserError(f"The index {factory!r} keeps {transform.d_out} dimensions and a key has {transform.d_in}; keep fewer.")


def transforms(index):
    """What an index does with keys before it stores them: rotations and projections."""
    found = []
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(index, faiss.IndexPreTransform):
            found += [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(index.chain.size())]
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return found


def limit_training(index):
    """Set the rounds of an untrained index's training to a few, which are enough and take a fifth of the time."""
    if ivf := inverted_lists(index):
        ivf.cp.niter = 8
    for transform in transforms(index):
        if isinstance(transform, faiss.OPQMatrix):
            transform.niter = transform.niter_pq_0 = 10


def grow_index(path, keys, first, mean):
    """The faiss index in the file `path`, after adding the keys (N, H) from `first` on."""
    index = faiss.read_index(str(path))
    for _, chunk in centred(keys, mean, first):
        index.add(chunk)
    return index
