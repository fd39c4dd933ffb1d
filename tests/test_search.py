"""Training's search: exact distances among the entries of other examples, and how many inverted lists it reads."""

import json

import faiss
import numpy as np
import pytest

import search
from datastore import knn_weights
from index import build_index, grow_index, inverted_lists
from search import TrainingDatastore, find_neighbours

K = 10
FACTORIES = ["Flat", "HNSW8", "IVF16,Flat", "IVF16_HNSW8,SQ8", "PCA8,IVF16,SQfp16", "OPQ4_16,IVF16,PQ4np"]


def clustered(count=3000, width=16, centres=60, seed=0):
    """(keys, example): clusters far from 0, in examples of 20 entries. Some keys are equal."""
    rng = np.random.default_rng(seed)
    keys = 20 + 0.7 * rng.normal(size=(centres, width))[rng.integers(centres, size=count)] + rng.normal(size=(count, width))
    keys[::50] = keys[0]
    return keys.astype(np.float16), np.arange(count) // 20


def store_of(factory, lists=None, example=None, **sizes):
    """A TrainingDatastore of clustered keys. lists: how many a search reads."""
    keys, usual = clustered(**sizes)
    example = usual if example is None else example
    store = TrainingDatastore(*build_index(keys, factory), example % 100, example, None, [], keys)
    if lists:
        store.lists.nprobe = lists
    return store


def all_distances(store, picks):
    """Squared distances (Q, N) in float64 to the entries of other examples. Those of the own example are inf."""
    D = ((store.keys[picks, None].astype(np.float64) - store.keys[None].astype(np.float64)) ** 2).sum(-1)
    D[store.example[picks, None] == store.example[None]] = np.inf
    return D


def probed_lists(store, picks):
    """Slow twin: for each entry, the set of entries in the inverted lists that faiss itself would read."""
    queries = store.keys[picks].astype(np.float32) - store.mean
    if isinstance(store.index, faiss.IndexPreTransform):
        queries = store.index.chain.at(0).apply(queries)
    _, numbers = store.lists.quantizer.search(queries, store.lists.nprobe)
    inside = [set(search.entries_of_list(store.lists, number).tolist()) for number in range(store.lists.nlist)]
    return [set().union(*(inside[number] for number in row if number >= 0)) for row in numbers]


@pytest.fixture(params=FACTORIES)
def factory(request):
    return request.param


@pytest.fixture(params=[(2**21, 2**22), (5000, 300)], ids=["at once", "in pieces"])
def at_once(request, monkeypatch):
    """How many pairs are compared, and how many lists are sorted, at once."""
    monkeypatch.setattr(search, "PAIRS", request.param[0])
    monkeypatch.setattr(search, "PROBES", request.param[1])


def test_a_search_that_reads_all_finds_what_brute_force_finds_and_never_the_own_example(factory, at_once):
    store = store_of(factory)
    if store.lists:
        store.lists.nprobe = store.lists.nlist
    picks = np.arange(5, 3000, 31)
    D, I = store.search_others(store.keys[picks], store.example[picks], K)
    exact = all_distances(store, picks)
    np.testing.assert_allclose(D, np.sort(exact, 1)[:, :K], atol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(exact, I, 1), D, atol=1e-3)
    assert all(len(set(row)) == K for row in I.tolist())


@pytest.mark.parametrize("factory", [name for name in FACTORIES if "IVF" in name])
def test_a_search_of_some_lists_finds_the_nearest_of_the_entries_in_them(factory, at_once):
    store, picks = store_of(factory, lists=3), np.arange(0, 3000, 41)
    D, I = store.search_others(store.keys[picks], store.example[picks], K)
    exact = all_distances(store, picks)
    for row, inside in enumerate(probed_lists(store, picks)):
        expected = np.sort(exact[row, sorted(inside)])[:K]
        found = np.isfinite(expected)
        np.testing.assert_allclose(D[row, :len(expected)][found], expected[found], atol=1e-3)
        assert set(I[row][I[row] >= 0].tolist()) <= inside
    assert (np.sort(exact, 1)[:, :K] + 1e-2 < D).any()  # three lists do not hold all neighbours


def test_without_an_own_example_an_entry_finds_itself(factory):
    store = store_of(factory)
    D, I = store.search(store.keys[7:200:9], 1)
    assert np.abs(D).max() < 1e-2 and (store.keys[I[:, 0]] == store.keys[7:200:9]).all()


@pytest.mark.parametrize("most", [240, 2400])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_an_example_that_is_much_of_the_text_is_left_out_too(factory, most):
    store = store_of(factory, example=np.maximum(np.arange(3000) // 20, most // 20))
    if store.lists:
        store.lists.nprobe = 8
    picks = np.arange(0, 3000, 29)
    D, _ = store.search_others(store.keys[picks], store.example[picks], K)
    np.testing.assert_allclose(D, np.sort(all_distances(store, picks), 1)[:, :K], atol=1e-3)


def test_neighbours_that_are_not_there_are_marked():
    store = store_of("IVF64,Flat", lists=1, count=300)
    D, I = store.search_others(store.keys[:], store.example, 100)
    assert (I < 0).any() and (np.isinf(D) == (I < 0)).all()
    assert (np.diff(np.where(I < 0, 1e9, D), axis=1) >= 0).all() and np.isfinite(knn_weights(D, 1.0)).all()
    small = store_of("Flat", count=30)
    assert (np.isfinite(small.search_others(small.keys[:], small.example, 25)[0]).sum(1) == [10] * 20 + [20] * 10).all()


@pytest.mark.parametrize("asked", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64_HNSW32,SQ8", "PCA16,IVF64,SQ8", "PCA16,IVF64,SQ8,RFlat"])
def test_a_search_reads_the_fewest_lists_that_reach_the_recall(factory, asked):
    store = store_of(factory)
    found = store.tune(K, asked)
    chosen = store.lists.nprobe
    assert asked <= found < 1 and 1 < chosen < 64
    picks = np.sort(np.random.default_rng(0).permutation(3000)[:512])
    assert found_share(store, picks) == pytest.approx(found, abs=2e-3)  # equal keys may change places
    store.lists.nprobe = chosen - 1
    assert found_share(store, picks) < asked + 2e-3


def found_share(store, picks):
    """Slow twin of the recall: found entries no farther than the last exact neighbour, one by one."""
    _, I = store.search_others(store.keys[picks], store.example[picks], K)
    exact, found = all_distances(store, picks), 0
    for row in range(len(picks)):
        last = np.sort(exact[row])[K - 1]
        found += sum(entry >= 0 and exact[row, entry] <= last * 1.00001 + 1e-6 for entry in I[row])
    return found / I.size


@pytest.mark.parametrize(("factory", "lists"), [("IVF64,Flat", 64), ("Flat", None), ("HNSW16", None)])
def test_a_recall_of_one_reads_everything(factory, lists):
    store = store_of(factory)
    assert store.tune(K, 1.0) == 1 and (store.lists and store.lists.nprobe) == lists


def test_a_saved_index_keeps_the_number_of_lists_to_read(tmp_path):
    store = store_of("PCA8,IVF64,SQ8")
    store.tune(K, 0.8)
    faiss.write_index(store.index, str(tmp_path / "index"))
    assert inverted_lists(faiss.read_index(str(tmp_path / "index"))).nprobe == store.lists.nprobe > 1


def test_an_index_on_disk_has_the_same_lists(tmp_path):
    store = store_of("IVF64,SQ8", lists=5)
    faiss.write_index(store.index, str(tmp_path / "index"))
    index = faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP)
    mapped = TrainingDatastore(index, store.mean, store.values, store.example, None, [], store.keys)
    for found, expected in zip(mapped.search(store.keys[:90], K), store.search(store.keys[:90], K), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("added", [1, 3, 60])
def test_neighbours_of_a_grown_datastore_are_those_of_one_made_at_once(added, tmp_path):
    whole = store_of("Flat", example=np.where(np.arange(3000) < 3000 - added, np.arange(3000) // 20, 999))
    for name in ("before", "grown", "whole"):
        (tmp_path / name).mkdir()
    index, mean = build_index(whole.keys[:-added], "Flat")
    before = TrainingDatastore(index, mean, None, whole.example[:-added], None, [], whole.keys[:-added])
    before.values = whole.values[:-added]
    find_neighbours(before, 5, tmp_path / "before")
    faiss.write_index(index, str(tmp_path / "index"))
    index = grow_index(tmp_path / "index", whole.keys, 3000 - added, mean)
    grown = TrainingDatastore(index, mean, whole.values, whole.example, None, [], whole.keys)
    asked, real = [], grown.search_others
    grown.search_others = lambda queries, *more: asked.append(len(queries)) or real(queries, *more)
    find_neighbours(grown, 5, tmp_path / "grown", tmp_path / "before")
    find_neighbours(whole, 5, tmp_path / "whole")
    one, other = (np.load(tmp_path / name / "neighbours_D.npy") for name in ("grown", "whole"))
    np.testing.assert_allclose(one, other, atol=2e-3)
    I = np.load(tmp_path / "grown/neighbours_I.npy")
    assert (whole.example[I] != whole.example[:, None]).all() and asked == [added]  # the others met new entries only


def test_a_large_datastore_is_searched_in_large_chunks_that_fit_in_memory():
    assert search.chunk_size(50_000, 576, 32) == 16_384  # few entries: few chunks
    assert -(-1_000_000 // search.chunk_size(1_000_000, 576, 32)) == 16
    for width, k in ((576, 32), (2048, 32), (576, 1024)):  # the memory of a chunk is bounded, whatever its numbers are
        assert search.chunk_size(10**9, width, k) * (width + 10 * k) <= max(2**26, 16_384 * (width + 10 * k))
    assert search.chunk_size(10**9, 576, 32) > 4 * 16_384


def test_a_search_that_was_stopped_goes_on_with_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "SEARCH_CHUNK", 700)
    store, whole, cut = store_of("IVF16,Flat", lists=4), tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    find_neighbours(store, 5, whole)
    real, calls = store.search_others, []

    def search_twice(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(store, "search_others", search_twice)
    with pytest.raises(KeyboardInterrupt):
        find_neighbours(store, 5, cut)
    assert json.loads((cut / "neighbours_done_0.json").read_text()) == [[0, 700], [700, 1400]]
    calls.extend([1, 1, 1])
    find_neighbours(store, 5, cut)
    assert len(calls) == 9  # two chunks, the stopped one, three of ours, and only the three chunks left
    np.testing.assert_array_equal(np.load(cut / "neighbours_I.npy"), np.load(whole / "neighbours_I.npy"))
