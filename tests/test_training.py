"""Batches of windows, and the share of them that each of several processes takes."""

import numpy as np
import pytest
import torch
from conftest import make_decoder
from runs import stored_rows

import datastore
import training
from datastore import knn_weights
from memory_decoder import TrainingLoss
from texts import ORIGINAL, Template, entries_of, windows_of
from training import Batches, epoch_batches, share_of

TEMPLATE = Template.parse(ORIGINAL)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (37, 4), (129, 4), (1000, 7), (64, 1)])
def test_every_window_is_visited_once_an_epoch(count, batch_size):
    lengths = np.random.default_rng(0).integers(8, 96, count)
    for epoch in range(3):
        batches = epoch_batches(lengths, batch_size, 0, epoch)
        assert sorted(n for batch in batches for n in batch) == list(range(count))
        assert max(map(len, batches)) <= batch_size


def test_epochs_differ_and_one_seed_gives_one_order():
    lengths = np.random.default_rng(0).integers(8, 96, 200)
    orders = [np.concatenate(epoch_batches(lengths, 8, *which)).tolist() for which in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[3] == orders[4]


@pytest.mark.parametrize(("known", "fresh", "again"), [(100, 10, 10 * training.REPLAYED), (10, 30, 10)])
def test_a_pass_over_added_text_has_all_of_it_and_a_changing_share_of_the_old(known, fresh, again):
    lengths = np.random.default_rng(0).integers(8, 96, known + fresh)
    passes = [np.concatenate(epoch_batches(lengths, 8, 0, epoch, known)).tolist() for epoch in range(2)]
    for order in passes:
        assert len(set(order)) == len(order) == again + fresh and set(range(known, known + fresh)) <= set(order)
    assert (again == known) == (set(passes[0]) == set(passes[1]))


def test_windows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(8, 512, 512)
    padded = sum(len(batch) * lengths[batch].max() for batch in epoch_batches(lengths, 16, 0, 0))
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(-1, 16)
    assert padded < 1.1 * lengths.sum() < (16 * shuffled.max(1)).sum()


def test_a_batch_names_tokens_by_their_places_among_those_seen(trained, base):
    entries = entries_of(windows_of(base, stored_rows(trained), TEMPLATE, 96))
    keys = datastore.open_keys(next(trained.glob("stages/datastore-*/keys.f16")), base.width)
    neighbours, seen = next(trained.glob("stages/neighbours-*")), np.unique(entries.values)
    numbers = [3, 0, 7]
    hidden, real, tokens, weights, targets = Batches(keys, entries, neighbours, 2.0, seen)(numbers, "cpu")
    rows = np.concatenate([np.arange(entries.offsets[b], entries.offsets[b + 1]) for b in numbers])
    found = np.load(neighbours / "neighbours_I.npy")[rows]
    assert real.sum() == len(rows) and real.sum(1).tolist() == [entries.offsets[b + 1] - entries.offsets[b] for b in numbers]
    assert (hidden[real].numpy() == keys[rows].astype(np.float32)).all()
    assert (seen[targets] == entries.values[rows]).all() and (seen[tokens] == entries.values[found]).all()
    np.testing.assert_allclose(weights, knn_weights(np.load(neighbours / "neighbours_D.npy")[rows], 2.0), rtol=1e-5)
    assert weights.sum(1).numpy() == pytest.approx(1, abs=1e-5) and weights.std() > 0.01


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_the_mean_gradient_of_all_processes_is_that_of_the_whole_batch(world, count, trained, base):
    entries = entries_of(windows_of(base, stored_rows(trained), TEMPLATE, 96))
    keys = datastore.open_keys(next(trained.glob("stages/datastore-*/keys.f16")), base.width)
    seen, lengths = np.unique(entries.values), np.diff(entries.offsets)
    batches = Batches(keys, entries, next(trained.glob("stages/neighbours-*")), 2.0, seen)
    numbers, model = np.argsort(lengths, kind="stable")[::len(lengths) // count][:count], TrainingLoss(make_decoder(seen=seen), 0.5)

    def gradient(numbers, weight=1.0):
        model.zero_grad()
        (weight * model(*batches(numbers, "cpu"))[0]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    shares = [share_of(numbers, lengths, rank, world) for rank in range(world)]
    assert sorted(n for own, weight in shares if weight for n in own) == sorted(numbers) and all(len(own) for own, _ in shares)
    found = sum(gradient(*share) for share in shares) / world
    torch.testing.assert_close(found, gradient(numbers), rtol=1e-4, atol=1e-6)
