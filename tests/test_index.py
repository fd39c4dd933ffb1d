"""Which index is chosen, how large it is, how many lists a search reads, and candidates ranked again by their keys."""

import faiss
import numpy as np
import pytest

import index
from datastore import Datastore, exact_neighbours, fewest, key_distances
from index import build_index, choose_index, index_bytes, inverted_lists, is_exact
from support.command import UserError

K = 10


def clustered(count=3000, width=16, centres=60, seed=0):
    """(keys, example): clusters far from 0, in examples of 20 entries. Some keys are equal."""
    rng = np.random.default_rng(seed)
    keys = 20 + 0.7 * rng.normal(size=(centres, width))[rng.integers(centres, size=count)] + rng.normal(size=(count, width))
    keys[::50] = keys[0]
    return keys.astype(np.float16), np.arange(count) // 20


def store_of(factory, with_keys=False, **sizes):
    keys, example = clustered(**sizes)
    return Datastore(*build_index(keys, factory), example % 100, example, None, [], keys if with_keys else None), keys


@pytest.fixture(scope="module", params=["IVF64,Flat", "IVF64,SQfp16", "PCA16,IVF64,SQ8"])
def lists(request):
    """A datastore with inverted lists, and its keys."""
    return store_of(request.param)


@pytest.fixture(scope="module")
def product():
    """Builds an index of product codes, four dimensions each, of which all lists are read. Returns (datastore, keys)."""
    made = store_of("IVF4,PQ4np")
    inverted_lists(made[0].index).nprobe = 4

    def make(with_keys):
        store, keys = made
        return Datastore(store.index, store.mean, store.values, store.example, None, [], keys if with_keys else None), keys
    return make


def brute(keys, picks, example, k):
    """Ascending squared distances (Q, K) to the entries of other examples, by sorting every distance."""
    exact = ((keys[picks, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(-1)
    exact[example[picks, None] == example[None]] = np.inf
    return np.sort(exact, 1)[:, :k]


def recall(store, keys, picks=slice(None, None, 7)):
    """Slow twin of Datastore.recall: found entries no farther than the last exact neighbour, one by one."""
    picks = np.arange(len(keys))[picks]
    _, I = store.search_others(keys[picks], store.example[picks], K)
    last, found = brute(keys, picks, store.example, K)[:, -1], 0
    for row, pick in enumerate(picks):
        for entry in I[row][I[row] >= 0]:
            found += ((keys[entry].astype(np.float64) - keys[pick].astype(np.float64)) ** 2).sum() <= last[row] * 1.0001 + 1e-6
    return found / I.size


@pytest.mark.parametrize("device", ["cpu"])
def test_exact_neighbours_are_those_of_brute_force_and_never_of_the_own_example(device, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 700)
    keys, example = clustered()
    picks = np.arange(5, 3000, 31)
    D, I = exact_neighbours(keys, picks, example, keys.astype(np.float32).mean(0), K, device)
    np.testing.assert_allclose(D, brute(keys, picks, example, K), atol=1e-3)
    np.testing.assert_allclose(key_distances(keys, keys[picks].astype(np.float32), I), D, atol=1e-3)
    assert (example[I] != example[picks, None]).all()


@pytest.mark.parametrize("asked", [0.5, 0.8, 0.95])
def test_a_search_reads_the_fewest_lists_that_reach_the_recall(lists, asked):
    store, keys = lists
    found, most = store.tune(keys, K, asked)
    ivf = inverted_lists(store.index)
    chosen = ivf.nprobe
    assert asked <= found <= most and 1 < chosen < ivf.nlist
    picks, exact = sample_of(store, keys)
    assert store.recall(keys, picks, exact) == found
    ivf.nprobe = chosen - 1
    assert store.recall(keys, picks, exact) < asked


def sample_of(store, keys, seed=0):
    """The sample that Datastore.tune draws, and its exact neighbours."""
    picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:512])
    return picks, exact_neighbours(keys, picks, store.example, store.mean, K)[1]


def test_recall_is_that_of_a_count_one_by_one(lists):
    store, keys = lists
    inverted_lists(store.index).nprobe = 3
    picks = np.arange(0, len(keys), 7)
    _, exact = exact_neighbours(keys, picks, store.example, store.mean, K)
    found = store.recall(keys, picks, exact)
    assert 0.2 < found < 1 and found == pytest.approx(recall(store, keys), abs=1e-3)


def test_a_recall_of_one_reads_all_lists_and_an_exact_index_reaches_it():
    store, keys = store_of("IVF64,Flat")
    assert store.tune(keys, K, 1.0) == (1, 1) and inverted_lists(store.index).nprobe == 64


def test_where_all_lists_do_not_reach_the_recall_a_search_reads_those_with_that_share_of_what_all_find(product):
    store, keys = product(with_keys=False)
    found, most = store.tune(keys, K, 0.99)
    assert 0.99 * most <= found <= most < 0.99
    assert store.tune(keys, K, 1) == (most, most) and inverted_lists(store.index).nprobe == 4


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_an_index_without_lists_stays_as_it_is_and_its_recall_is_told(factory):
    store, keys = store_of(factory)
    found, most = store.tune(keys, K, 0.5)
    assert found == most and (found == 1 if factory == "Flat" else 0.5 < found <= 1)


def test_a_saved_index_keeps_the_number_of_lists_to_read(lists, tmp_path):
    store, keys = lists
    store.tune(keys, K, 0.8)
    faiss.write_index(store.index, str(tmp_path / "index"))
    assert inverted_lists(faiss.read_index(str(tmp_path / "index"))).nprobe == inverted_lists(store.index).nprobe > 1


@pytest.mark.parametrize("most", [1, 2, 7, 64, 100])
def test_fewest_is_the_first_number_that_is_enough(most):
    for least in range(1, most + 3):
        assert fewest(lambda number, least=least: number >= least, most) == min(least, most)


def test_candidates_ranked_by_their_keys_give_exact_distances_and_more_of_the_nearest(product):
    (rough, keys), (ranked, _) = product(with_keys=False), product(with_keys=True)
    assert recall(rough, keys) + 0.1 < recall(ranked, keys)
    queries = keys[::50].astype(np.float32)
    D, I = ranked.search(queries, K)
    assert (np.diff(D, axis=1) >= 0).all() and D.shape == (60, K)
    np.testing.assert_allclose(D, ((queries[:, None] - keys[I].astype(np.float64)) ** 2).sum(-1), rtol=1e-5)


def test_a_ranked_search_is_exact_once_all_true_neighbours_are_candidates(product, monkeypatch):
    store, keys = product(with_keys=True)
    monkeypatch.setattr("datastore.CANDIDATES", len(keys) // K)
    picks = np.arange(0, len(keys), 90)
    D, I = store.search_others(keys[picks], store.example[picks], K)
    np.testing.assert_allclose(D, brute(keys, picks, store.example, K), rtol=1e-4, atol=1e-4)
    assert (store.example[I] != store.example[picks, None]).all()


def test_neighbours_that_a_ranked_search_cannot_find_are_marked():
    store, keys = store_of("PCA8,IVF64,SQ8", with_keys=True)
    D, I = store.search(keys[:50], 200)
    assert (I < 0).any() and (np.isinf(D) == (I < 0)).all() and (np.diff(np.where(I < 0, 1e9, D), axis=1) >= 0).all()


@pytest.mark.parametrize(("factory", "exact"), [
    ("Flat", True), ("IVF64,Flat", True), ("IVF64_HNSW32,SQfp16", True), ("HNSW32", True), ("IVF64,SQ8", False),
    ("PCA64,IVF64,Flat", False), ("OPQ8_32,IVF64,PQ8np", False), ("HNSW32,SQ8", False), ("IVF64,PQ8,RFlat", False)])
def test_an_index_that_keeps_whole_keys_is_exact(factory, exact):
    assert is_exact(factory) == exact


@pytest.mark.parametrize("factory", ["nonsense", "IVF100000,Flat"])
def test_an_index_that_faiss_cannot_build_is_refused_in_words(factory):
    with pytest.raises(UserError, match="faiss cannot build"):
        build_index(np.zeros((50, 8), np.float16), factory)


def test_the_index_gets_smaller_numbers_as_memory_gets_scarce():
    assert choose_index(10_000, 256, 0) == "Flat"
    assert choose_index(1_000_000, 256, 2**40) == "IVF4000,SQfp16"
    chosen = [choose_index(1_000_000, 2048, memory * 2**20) for memory in (5000, 1000, 200, 60, 40, 1)]
    assert chosen == ["IVF4000,SQfp16", "PCA256,IVF4000,SQ8", "OPQ64_256,IVF4000,PQ64np", "OPQ32_128,IVF4000,PQ32np",
                      "OPQ16_64,IVF4000,PQ16np", "OPQ16_64,IVF4000,PQ16np"]
    assert choose_index(1_000_000, 100, 40 * 2**20) == "OPQ16_64,IVF4000,PQ16np"  # at most as many dimensions as the keys have
    assert choose_index(1_000_000, 32, 1) == "PCA32,IVF4000,SQ8"


@pytest.mark.parametrize("entries", [50_001, 3_000_000])
@pytest.mark.parametrize("width", [64, 576, 2048])
def test_the_chosen_index_fits_and_a_byte_less_gives_another(entries, width):
    memory, sizes = 2**50, []
    for _ in range(8):
        sizes.append(index_bytes(entries, width, choose_index(entries, width, memory)))
        memory = sizes[-1] - 1
    smallest = sizes.index(min(sizes))
    assert sizes[:smallest + 1] == sorted(set(sizes), reverse=True) and smallest > 0
    assert set(sizes[smallest:]) == {min(sizes)}  # the smallest is taken even where it does not fit


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQfp16", "IVF16,SQ8", "PCA16,IVF16,SQ8", "OPQ2_8,IVF16,PQ2np",
                                     "IVF16,PQ8x4np"])
def test_an_index_takes_about_the_bytes_that_were_estimated(factory):
    keys = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float16)
    made, _ = build_index(keys, factory)
    assert index_bytes(len(keys), 64, factory) == pytest.approx(len(faiss.serialize_index(made)), rel=0.1)
