"""Which index is chosen, how large it is, and how it is refused."""

import faiss
import numpy as np
import pytest

from index import build_index, check_index, choose_index, index_bytes
from support.command import UserError


@pytest.mark.parametrize("factory", ["nonsense", "IVF100000,Flat"])
def test_an_index_that_faiss_cannot_build_is_refused_in_words(factory):
    with pytest.raises(UserError, match="faiss cannot build"):
        build_index(np.zeros((50, 8), np.float16), factory)


@pytest.mark.parametrize("factory", ["nonsense", "", "IVF51,Flat", "IVF99999999999,Flat", "PCA9,Flat", "PCA0,Flat", "HNSW0", "LSH0",
                                     "IVF0,Flat", "PQ7", "IVF4,PQ8x0"])
def test_an_index_that_cannot_work_is_refused_before_there_are_keys(factory):
    with pytest.raises(UserError) as error:
        check_index(factory, 8, 50)
    assert repr(factory) in str(error.value) and str(error.value).endswith(".") and ".cpp" not in str(error.value)


@pytest.mark.parametrize("factory", ["Flat", "IVF10,Flat", "IVF50,SQfp16", "PCA8,Flat", "PCA4,IVF10,SQ8", "OPQ2_8,IVF10,PQ2np"])
def test_an_index_that_can_work_is_accepted_before_there_are_keys(factory):
    check_index(factory, 8, 50)


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
