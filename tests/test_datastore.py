"""Keys, neighbour search, kNN weights, seen tokens, and the stored rows."""

import json

import faiss
import numpy as np
import pytest
import torch
from conftest import ROWS, examples, rows_of

import datastore
from base_model import BaseLM
from datastore import (
    Datastore,
    copy_keys,
    default_temperature,
    hidden_batches,
    knn_weights,
    open_keys,
    seen_tokens,
    write_examples,
    write_keys,
)
from index import build_index, inverted_lists
from stages import NEW_MANIFEST, finish_publishing
from support.command import UserError
from texts import Entries, Template, encode_row, entries_of, windows_of

TEMPLATE = Template.parse("Title: {Title}\nQuestion: {Question}\nAnswer: {Answer}")


def keys_on_disk(base, windows, path, batch_size=4):
    write_keys(base, windows, entries_of(windows).offsets, path, batch_size)
    return open_keys(path, base.width)


def random_store(count=500, width=16, examples=25, factory="Flat", seed=0):
    """(store, keys): entries with keys around a large common offset, several of them equal."""
    rng = np.random.default_rng(seed)
    keys = (20 + rng.standard_normal((count, width))).astype(np.float16)
    keys[::7] = keys[0]
    index, mean = build_index(keys, factory)
    example = np.sort(rng.integers(examples, size=count)).astype(np.int32)
    values = rng.integers(100, size=count).astype(np.int32)
    return Datastore(index, mean, values, example, np.arange(count), []), keys


def test_keys_in_batches_equal_keys_one_by_one(base):
    windows = windows_of(base, ROWS[:6], TEMPLATE, 64)
    batched = torch.cat([hidden for _, hidden in hidden_batches(base, windows, 5)])
    single = torch.cat([base.hidden(torch.tensor([w.ids]))[0, w.skip:-1] for w in windows])
    torch.testing.assert_close(batched, single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 6])
def test_keys_of_a_run_that_was_killed_go_on_where_it_stopped(stopped, base, tmp_path, monkeypatch):
    monkeypatch.setattr(datastore, "SHARD_BATCHES", 2)
    windows, read, real = windows_of(base, ROWS[:6], TEMPLATE, 64), [], base.hidden
    whole = np.array(keys_on_disk(base, windows, tmp_path / "whole"))
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut/keys"

    def hidden(ids):
        read.append(len(ids))
        if len(read) == stopped:
            cut.write_bytes(cut.read_bytes() + b"half a batch")
            raise KeyboardInterrupt
        return real(ids)
    monkeypatch.setattr(base, "hidden", hidden)
    with pytest.raises(KeyboardInterrupt):
        keys_on_disk(base, windows, cut)
    read.clear(), read.extend([0] * 9)
    np.testing.assert_array_equal(keys_on_disk(base, windows, cut), whole)
    assert sum(read) == len(windows) - 8 * ((stopped - 1) // 2) and len(windows) > 20


def test_complete_keys_are_not_computed_again(base, tmp_path, monkeypatch):
    windows = windows_of(base, ROWS[:2], TEMPLATE, 64)
    whole = np.array(keys_on_disk(base, windows, tmp_path / "keys"))
    monkeypatch.setattr(BaseLM, "hidden", lambda *_: pytest.fail("the base model ran"))
    np.testing.assert_array_equal(keys_on_disk(base, windows, tmp_path / "keys"), whole)


def test_bfloat16_models_give_finite_half_precision_keys(tiny_gemma, base, tmp_path):
    low = BaseLM.load(str(tiny_gemma), dtype="bfloat16", device="cpu")
    windows = windows_of(low, ROWS[:1], TEMPLATE, 64)
    near, exact = (torch.from_numpy(keys_on_disk(model, windows, tmp_path / name).astype(np.float32))
                   for name, model in (("low", low), ("exact", base)))
    assert torch.cosine_similarity(near, exact).mean() > 0.99


def test_search_finds_what_brute_force_finds_despite_a_large_common_offset():
    store, keys = random_store()
    queries = keys[:300].astype(np.float32)
    D, I = store.search(queries, 9)
    exact = ((queries[:, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(-1)
    np.testing.assert_allclose(D, np.sort(exact, 1)[:, :9], atol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(exact, I, 1), D, atol=1e-3)


def test_one_query_and_many_queries_find_the_same():
    store, keys = random_store()
    many, _ = store.search(keys[:40], 5)
    one, _ = store.search(keys[3:4], 5)
    np.testing.assert_allclose(one[0], many[3], atol=1e-4)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "PCA16,IVF8,SQ8"])
def test_an_open_store_finds_the_same_after_another_training_has_replaced_its_files(factory, tmp_path):
    made, keys = random_store(factory=factory)
    np.savez(tmp_path / "datastore_entries.npz", example=made.example, position=made.position, mean=made.mean)
    np.save(tmp_path / "datastore_values.npy", made.values)
    write_examples([], tmp_path / "examples.jsonl")
    faiss.write_index(made.index, str(tmp_path / "faiss_index.bin"))
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    store = Datastore.open(tmp_path)  # the inverted lists stay on disk, and no search has read them yet
    (tmp_path / "stages").mkdir()
    for name, size in files.items():
        (tmp_path / f"{name}.part").write_bytes(bytes(size))
    (tmp_path / NEW_MANIFEST).write_text(json.dumps({"files": files, "stages": {}}))
    finish_publishing(tmp_path)
    assert not any((tmp_path / "faiss_index.bin").read_bytes())
    for found, expected in zip(store.search(keys[:50], 9), made.search(keys[:50], 9), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_copied_keys_stand_in_front_and_only_the_others_are_read(base, tmp_path, monkeypatch):
    windows = windows_of(base, ROWS[:6], TEMPLATE, 64)
    offsets, known = entries_of(windows).offsets, 5
    whole, read, real = np.array(keys_on_disk(base, windows, tmp_path / "whole")), [], base.hidden
    for size in (0, 100, None):  # copied from the start, and again where a kill cut the copy
        wanted, path = np.arange(offsets[known]), tmp_path / f"grown {size}"
        path.write_bytes((tmp_path / "whole").read_bytes()[:size] if size is not None else b"")
        copy_keys(tmp_path / "whole", wanted, path, base.width)
        monkeypatch.setattr(base, "hidden", lambda ids, *more: read.append(len(ids)) or real(ids, *more))
        write_keys(base, windows, offsets, path, 4, known)
        monkeypatch.undo()
        grown = np.array(open_keys(path, base.width))
        np.testing.assert_array_equal(grown[:offsets[known]], whole[:offsets[known]])
        np.testing.assert_allclose(grown, whole, rtol=2e-3, atol=1e-3)
        assert sum(read) == len(windows) - known
        read.clear()


@pytest.mark.parametrize("factory", ["IVF16,SQfp16", "PCA16,IVF16,SQ8"])
def test_an_approximate_index_finds_the_same_once_it_is_on_disk(factory, tmp_path):
    keys = np.random.default_rng(0).normal(size=(2000, 32)).astype(np.float16)
    index, mean = build_index(keys, factory)
    inverted_lists(index).nprobe = 7
    values, example = np.arange(2000) % 100, np.arange(2000) // 20
    save_store(tmp_path, index, mean, values, example, np.arange(2000) % 20, [{"a": str(n)} for n in range(100)])
    made, opened = Datastore(index, mean, values, example, np.arange(2000) % 20, []), Datastore.open(tmp_path)
    assert inverted_lists(opened.index).nprobe == 7
    queries = keys[::40].astype(np.float32) + np.random.default_rng(1).normal(0, 0.1, (50, 32))
    (D, I), (expected_D, expected_I) = opened.search(queries, 9), made.search(queries, 9)
    np.testing.assert_allclose(D, expected_D, rtol=1e-5)
    assert np.array_equal(I, expected_I) and I.min() >= 0
    assert (opened.search(queries, 1)[1][:, 0] == np.arange(0, 2000, 40)).all()
    assert opened.example[40] == 2 and opened.examples[opened.example[40]].row == {"a": "2"}


def test_weights_are_a_softmax_of_negative_distances():
    D = np.random.default_rng(0).random((4, 6)) * 5
    np.testing.assert_allclose(knn_weights(D, 2.0), torch.softmax(torch.from_numpy(-D / 2), 1).numpy())


def test_infinite_temperature_gives_equal_votes_and_missing_neighbours_none():
    weights = knn_weights(np.array([[1.0, 50.0, np.inf], [np.inf] * 3]), np.inf)
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [0, 0, 0]])


def test_weights_survive_huge_distances():
    np.testing.assert_allclose(knn_weights(np.array([[1e7, 1e7 + 1]]), 0.1), [[1, 0]], atol=1e-4)


def test_the_default_temperature_is_half_the_median_distance():
    assert default_temperature(np.array([[1.0, 2.0, 9.0], [np.inf, 2.0, 2.0]])) == 1.0


def plain_seen(values, example):
    """Slow twin of seen_tokens: the tokens, and the share of positions whose token no other example has."""
    alone = 0
    for token, own in zip(values, example, strict=True):
        alone += not any(other == token and e != own for other, e in zip(values, example, strict=True))
    return sorted(set(values)), max(alone, 1) / (len(values) + 1)


@pytest.mark.parametrize(("values", "example"), [
    ([7, 7, 9, 3, 9, 7], [0, 0, 0, 1, 1, 2]), ([5, 5, 5], [4, 4, 4]), ([1, 2, 1, 2], [0, 0, 1, 1]), ([3], [0])])
def test_the_share_of_unseen_tokens_is_that_of_tokens_that_one_example_alone_has(values, example):
    entries = Entries(np.array(values, np.int32), np.array(example, np.int32), None, None)
    tokens, share = seen_tokens(entries)
    assert (tokens.tolist(), share) == plain_seen(values, example) and 0 < share < 1


def test_the_seen_tokens_are_those_that_some_row_of_text_holds(base):
    entries = entries_of(windows_of(base, ROWS[:5], TEMPLATE, 64))
    tokens, share = seen_tokens(entries)
    assert (tokens.tolist(), share) == plain_seen(entries.values.tolist(), entries.example.tolist())
    assert set(tokens) == {token for row in ROWS[:5] for token in encode_row(base, TEMPLATE, row)[len(base.encode("Title:")) + 1:]}


def save_store(folder, index, mean, values, example, position, rows):
    """The files of a datastore as training leaves them."""
    faiss.write_index(index, str(folder / "faiss_index.bin"))
    np.savez(folder / "datastore_entries.npz", example=example, position=position, mean=mean)
    np.save(folder / "datastore_values.npy", values)
    write_examples(examples(rows), folder / "examples.jsonl")


def test_a_stored_row_may_hold_any_line_separator(tmp_path):
    keys, rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16), [{"a": "x\u2028y\u0085z"}, {"a": "b\nc"}]
    save_store(tmp_path, *build_index(keys, "Flat"), [4, 5, 6], [0, 1, 1], [1, 1, 2], rows)
    store = Datastore.open(tmp_path)
    assert store.examples == examples(rows) and len(store) == 3 and store.search(keys[2:], 1)[1] == [[2]]


def test_entries_trace_back_to_their_text(trained, base):
    store = Datastore.open(trained)
    for entry in range(0, len(store), 97):
        ids = encode_row(base, TEMPLATE, rows_of(store)[store.example[entry]])
        assert ids[store.position[entry] + 1] == store.values[entry]


def test_a_stored_key_finds_its_own_entry(trained, base):
    store = Datastore.open(trained)
    hidden = base.hidden(torch.tensor([encode_row(base, TEMPLATE, rows_of(store)[0])[:60]]))[0]
    D, I = store.search(hidden[50:51].numpy(), 1)
    assert D[0, 0] < 1e-2
    assert (store.example[I[0, 0]], store.position[I[0, 0]]) == (0, 50)


def test_keys_that_are_not_finite_are_refused_in_words(base, tmp_path, monkeypatch):
    windows = windows_of(base, ROWS[:1], TEMPLATE, 64)
    real = BaseLM.hidden
    monkeypatch.setattr(BaseLM, "hidden", lambda self, ids: 1e5 * real(self, ids))
    with pytest.raises(UserError, match="not finite or above 65504"):
        keys_on_disk(base, windows, tmp_path / "keys")


def test_a_search_for_few_queries_leaves_torch_its_threads():
    keys = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float16)
    store = Datastore(*build_index(keys, "Flat"), np.arange(40), np.arange(40), np.arange(40), [])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        store.search(keys[:1], 2), store.search(keys[:20], 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
