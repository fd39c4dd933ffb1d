"""The MemoryDecoder, its attention, its probabilities over all tokens, its loss, its file and the manifest."""

import math
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, make_decoder

import memory_decoder
from memory_decoder import (
    DecoderCache,
    MemoryDecoder,
    TrainingLoss,
    local_attention,
    memory_loss,
    merge_votes,
    read_manifest,
)
from support.command import UserError


def read_logits(decoder, hidden, cache=None):
    """The decoder's own logits of the seen tokens, without the base's logits."""
    return decoder.output_projection(decoder.features(hidden, cache))


def sparse_case(P=12, K=5, V=40, C=8, seed=0):
    torch.manual_seed(seed)
    features, projection = torch.randn(P, C, requires_grad=True), torch.nn.Linear(C, V)
    tokens = torch.randint(0, 10, (P, K))  # repeats on purpose
    return features, projection, tokens, torch.softmax(torch.randn(P, K), 1), torch.randint(0, V, (P,))


def dense_loss(features, projection, tokens, weights, targets, kl_weight):
    """The loss as in the original demo, with a full row of probabilities for every position."""
    z = projection(features)
    p = torch.zeros_like(z).scatter_add_(1, tokens, weights)
    kl = F.kl_div(torch.log_softmax(z, 1), p, reduction="batchmean")
    return kl_weight * kl + (1 - kl_weight) * F.cross_entropy(z, targets), kl


@pytest.mark.parametrize("block", [2**26, 40 * 5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_sparse_loss_and_its_gradients_equal_the_dense_ones_in_one_block_or_several(monkeypatch, block, kl_weight):
    monkeypatch.setattr(memory_decoder, "LOGITS_AT_ONCE", block)
    case = sparse_case()
    expected, expected_kl = dense_loss(*case, kl_weight)
    wanted = torch.autograd.grad(expected, [case[0], *case[1].parameters()])
    loss, kl, _ = memory_loss(*case, kl_weight)
    torch.testing.assert_close((loss, kl), (expected, expected_kl.detach()))
    torch.testing.assert_close(torch.autograd.grad(loss, [case[0], *case[1].parameters()]), wanted)


def test_gradients_are_right_where_neighbours_were_lost():
    case = sparse_case()
    case[3][3], case[3][5] = 0, case[3][5] * 0.4
    variables = [case[0], *case[1].parameters()]
    wanted = torch.autograd.grad(dense_loss(*case, 0.5)[0], variables)
    torch.testing.assert_close(torch.autograd.grad(memory_loss(*case, 0.5)[0], variables), wanted)


def test_the_loss_in_training_is_the_dense_one_over_the_real_positions():
    decoder, hidden = make_decoder(), torch.randn(2, 9, 32)
    real = torch.arange(9) < torch.tensor([[9], [4]])
    _, _, tokens, weights, targets = sparse_case(P=13, V=len(decoder.seen))
    loss, kl, _ = TrainingLoss(decoder, 0.4)(hidden, real, tokens, weights, targets)
    expected = dense_loss(decoder.features(hidden)[real], decoder.output_projection, tokens, weights, targets, 0.4)
    torch.testing.assert_close((loss, kl), (expected[0], expected[1].detach()), atol=1e-4, rtol=1e-4)
    learned = list(decoder.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, learned), torch.autograd.grad(expected[0], learned), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("seen", "backoff"), [(range(2, 512, 3), 0.03), ([7], 0.3), (range(1, 512), 0.5), (range(512), 0.0)])
def test_the_memory_has_its_own_opinion_of_seen_tokens_and_the_bases_of_the_others(base, seen, backoff):
    decoder, hidden = make_decoder(seen=seen, backoff=backoff), base.hidden(torch.randint(6, 512, (1, 5)))
    decoder.scale.fill_(0.7)
    base_logits, features = base.logits(hidden), decoder.features(hidden)
    fast = decoder.log_probabilities(features, base_logits)
    torch.testing.assert_close(fast.exp().sum(-1), torch.ones(1, 5))
    for t in range(5):
        own = [math.exp(0.7 * z) for z in decoder.output_projection(features)[0, t].tolist()]
        rest = [0 if token in seen else math.exp(z) for token, z in enumerate(base_logits[0, t].tolist())]
        slow = [backoff * weight / (sum(rest) or 1) for weight in rest]
        for token, weight in zip(seen, own, strict=True):
            slow[token] = (1 - backoff) * weight / sum(own)
        torch.testing.assert_close(fast[0, t].exp(), torch.tensor(slow), atol=1e-6, rtol=1e-3)


def started(base, **sizes):
    """(decoder that starts from the base's head, keys (512, H), the base's log probabilities (512, V') of its seen tokens)."""
    torch.manual_seed(0)
    decoder, keys = make_decoder(**sizes), base.hidden(torch.randint(4, 512, (8, 64))).flatten(0, 1)
    decoder.start_from_head(base.head.weight[decoder.seen], keys)
    return decoder, keys, torch.log_softmax(base.logits(keys)[:, decoder.seen], -1)


def test_a_decoder_as_wide_as_the_base_starts_with_the_bases_own_opinion(base):
    decoder, keys, expected = started(base, decoder_dim=32)
    # LayerNorm fixes the length of the projected state, so the copy is close and not exact.
    gap = F.kl_div(torch.log_softmax(read_logits(decoder, keys[None])[0], -1), expected, log_target=True, reduction="batchmean")
    flat = F.kl_div(torch.full_like(expected, -math.log(len(decoder.seen))), expected, log_target=True, reduction="batchmean")
    assert gap < 0.1 * flat


def test_a_narrower_decoder_starts_as_the_best_copy_of_its_width(base):
    decoder, keys, _ = started(base, decoder_dim=16)
    W, states = base.head.weight[decoder.seen], keys - keys.mean(0)
    centred = states @ (W - W.mean(0)).T

    def error(P, out):
        return (centred - states @ P.T @ out.T).square().sum()

    start = error(decoder.input_projection.weight, decoder.output_projection.weight)
    best = torch.linalg.svdvals(centred)[16:].square().sum()  # Eckart and Young 1936
    assert best * (1 - 1e-3) < start < 1.02 * best
    torch.manual_seed(0)
    P = torch.linalg.qr(torch.randn(32, 16))[0].T
    assert error(P, torch.linalg.lstsq(states @ P.T, centred).solution.T) > 1.2 * best


def test_a_decoder_wider_than_the_base_can_start_from_its_head(base):
    decoder, keys, expected = started(base, decoder_dim=64)
    agree = read_logits(decoder, keys[None])[0].argmax(-1) == expected.argmax(-1)
    assert agree.float().mean() > 0.7


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_that_starts_from_the_head_reads_positions_alone_at_first_and_then_learns_to_look_back(base, norm_first):
    decoder, keys, _ = started(base, context=8, norm_first=norm_first)
    hidden, targets = keys[None, :12].clone(), torch.randint(len(decoder.seen), (12,))

    def gap():
        return (decoder.features(hidden)[0, 11] - decoder.features(hidden[:, 11:])[0, 0]).abs().max()

    loss, before, losses = TrainingLoss(decoder, 0.0), gap(), []
    batch = hidden, torch.ones(1, 12, dtype=torch.bool), targets[:, None], torch.ones(12, 1), targets
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-2)
    for _ in range(20):
        losses.append(loss(*batch)[0])
        optimizer.zero_grad(), losses[-1].backward(), optimizer.step()
    assert before < 1e-4 and gap() > 1e-2
    assert losses[-1] < 0.5 * losses[0] and decoder.blocks[0].qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("block", [2**26, 40 * 5])
def test_the_loss_in_bfloat16_is_near_the_one_in_float32(monkeypatch, block):
    monkeypatch.setattr(memory_decoder, "LOGITS_AT_ONCE", block)
    case = sparse_case()
    given = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = memory_loss(*case)[0]
        given.append((loss, *torch.autograd.grad(loss, [case[0], *case[1].parameters()])))
    torch.testing.assert_close(*given, rtol=0.05, atol=0.01)


def test_a_position_without_neighbours_adds_no_kl():
    features, projection, tokens, weights, targets = sparse_case()
    weights[3] = 0
    _, kl, _ = memory_loss(features, projection, tokens, weights, targets)
    others = [i for i in range(12) if i != 3]
    _, expected, _ = memory_loss(features[others], projection, tokens[others], weights[others], targets[others])
    torch.testing.assert_close(kl * 12, expected * 11)


def test_merging_votes_keeps_the_distribution_and_every_token_once():
    _, _, tokens, weights, _ = sparse_case()
    merged_tokens, merged = merge_votes(tokens, weights)
    before = torch.zeros(12, 40).scatter_add_(1, tokens, weights)
    after = torch.zeros(12, 40).scatter_add_(1, merged_tokens, merged)
    torch.testing.assert_close(after, before)
    for row, w in zip(merged_tokens, merged, strict=True):
        assert len(set(row[w > 0].tolist())) == int((w > 0).sum())


# Attention in one block or in several, fused or written out.
WAYS = [{"LEAST_BLOCK": block, "SCORES_AT_ONCE": scores} for block in (4, 128) for scores in (0, 2**25)]


def take(way, monkeypatch):
    """Make attention take one of the WAYS, whatever its size."""
    for name, value in way.items():
        monkeypatch.setattr(memory_decoder, name, value)


@pytest.mark.parametrize("context", [1, 3, 100])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_cached_decoding_equals_reading_the_whole_sequence(monkeypatch, context, norm_first, way):
    take(way, monkeypatch)
    decoder = make_decoder(context=context, norm_first=norm_first)
    hidden, cache = torch.randn(1, 20, 32), DecoderCache()
    parts = [slice(0, 7), *(slice(i, i + 1) for i in range(7, 20))]
    pieces = [decoder.features(hidden[:, part], cache) for part in parts]
    torch.testing.assert_close(torch.cat(pieces, 1), decoder.features(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", [1, 5, 99])
def test_attention_is_the_same_in_whichever_way_it_is_worked_out(monkeypatch, context):
    decoder, hidden, given = make_decoder(context=context), torch.randn(3, 20, 32), []
    for way in WAYS:
        take(way, monkeypatch)
        logits = read_logits(decoder, hidden)
        given.append((logits, *torch.autograd.grad(logits.square().mean(), list(decoder.parameters()), allow_unused=True)))
    for other in given[1:]:
        torch.testing.assert_close(given[0], other)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("T", "S", "context"), [(1, 1, 3), (1, 3, 3), (9, 9, 1), (9, 9, 3), (8, 12, 5), (13, 13, 6), (5, 5, 40),
                                                (60, 60, 21), (60, 75, 16), (90, 120, 33)])
def test_attention_equals_a_loop_over_what_each_position_sees(monkeypatch, way, T, S, context):
    take(way, monkeypatch)
    q, k, v = torch.randn(2, 3, T, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 8)
    expected = torch.empty_like(q)
    for t in range(T):
        last = S - T + t + 1
        near = slice(max(0, last - context), last)
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, near]) / 8**0.5
        expected[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, near])
    torch.testing.assert_close(local_attention(q, k, v, context), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_learns_under_dropout(base, norm_first):
    decoder = make_decoder(norm_first=norm_first, dropout=0.5)
    hidden = base.hidden(torch.tensor([base.encode(ROWS[0]["Answer"])[:40]]))
    torch.logsumexp(read_logits(decoder.train(), hidden), -1).mean().backward()
    norms = [p.grad.norm() for p in decoder.parameters()]
    assert min(norms) > 0 and max(norms) < 1e3


def test_a_grown_decoder_says_the_same_of_the_tokens_it_knew_and_guesses_the_new_ones_from_the_bases_rows(base):
    known, seen = [n for n in range(512) if n % 3], list(range(512))
    decoder, head = make_decoder(seen=known), base.head.weight.detach()
    with torch.no_grad():
        decoder.scale.fill_(0.5)
        decoder.output_projection.weight.copy_(head[known] @ torch.randn(32, 32))  # as a linear map of the head's rows
        decoder.output_projection.bias.copy_(head[known] @ torch.randn(32) + 2)
    grown, hidden = decoder.grown(np.array(seen), 0.03, head[seen], dropout=0.2), torch.randn(1, 7, 32)
    assert grown.seen.tolist() == seen and (float(grown.scale), round(float(grown.backoff), 6)) == (1, 0.03)
    assert grown.dropout.p == 0.2 and decoder.seen.tolist() == known
    before, after = read_logits(decoder, hidden), read_logits(grown.eval(), hidden)
    torch.testing.assert_close(after[..., known], before)
    rows = torch.linalg.lstsq(head[known], decoder.output_projection.weight.detach()).solution
    new = [n for n in seen[1:] if n % 3 == 0]  # the first is padding, a row of zeros
    assert F.cosine_similarity(grown.output_projection.weight[new], head[new] @ rows).min() > 0.9


def test_a_grown_decoder_without_new_tokens_is_the_same(base):
    decoder = make_decoder()
    grown = decoder.grown(decoder.seen.numpy(), float(decoder.backoff), base.head.weight.detach()[decoder.seen])
    assert all(torch.equal(value, grown.state_dict()[name]) for name, value in decoder.state_dict().items())


def test_dropout_acts_in_training_and_not_after_loading(tmp_path):
    decoder, hidden = make_decoder(dropout=0.5).train(), torch.randn(1, 6, 32)
    assert not torch.equal(decoder.features(hidden), decoder.features(hidden))
    decoder.save(tmp_path / "decoder.pt")
    torch.testing.assert_close(MemoryDecoder.load(tmp_path / "decoder.pt").features(hidden), decoder.eval().features(hidden))


def test_no_position_sees_a_later_one():
    decoder, hidden = make_decoder(context=8), torch.randn(1, 12, 32)
    changed = hidden.clone()
    changed[:, 7] += 1
    before, after = decoder.features(hidden), decoder.features(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


def test_context_one_reads_every_position_alone_and_a_longer_one_does_not():
    hidden = torch.randn(1, 5, 32)
    alone, wide = make_decoder(context=1), make_decoder(context=5)
    torch.testing.assert_close(alone.features(hidden)[:, 4:], alone.features(hidden[:, 4:]), atol=1e-5, rtol=1e-5)
    assert (wide.features(hidden)[:, 4:] - wide.features(hidden[:, 4:])).abs().max() > 1e-3


def test_a_file_of_another_shape_is_refused_in_words(tmp_path):
    make_decoder().save(tmp_path / "decoder.pt")
    saved = torch.load(tmp_path / "decoder.pt", weights_only=True)
    older = [{"sizes": {**saved["sizes"], "another": 1}, "weights": saved["weights"]},
             {"sizes": saved["sizes"], "weights": {**saved["weights"], "another.weight": torch.zeros(32, 8)}},
             *({"sizes": saved["sizes"], "weights": {k: v for k, v in saved["weights"].items() if k != name}}
               for name in ("seen", "backoff")),
             {"sizes": {**saved["sizes"], "decoder_dim": 64}, "weights": saved["weights"]}, {"weights": saved["weights"]}]
    for other in older:
        torch.save(other, tmp_path / "decoder.pt")
        with pytest.raises(UserError, match="another version"):
            MemoryDecoder.load(tmp_path / "decoder.pt")


def test_attention_learns_from_its_queries_and_keys():
    decoder = make_decoder(context=8)
    read_logits(decoder, torch.randn(2, 8, 32)).square().mean().backward()
    assert decoder.blocks[0].qkv.weight.grad[:64].abs().max() > 0


def test_heads_that_do_not_divide_the_width_are_refused_in_words():
    with pytest.raises(UserError, match="do not divide"):
        MemoryDecoder(32, 100, range(100), decoder_dim=100)


def test_a_saved_decoder_comes_back_the_same(tmp_path):
    decoder, hidden = make_decoder(context=3, norm_first=False, backoff=0.3), torch.randn(1, 6, 32)
    decoder.scale.fill_(0.4)  # as calibrate does
    decoder.save(tmp_path / "decoder.pt")
    loaded, base_logits = MemoryDecoder.load(tmp_path / "decoder.pt"), torch.randn(1, 6, 512)
    assert loaded.sizes == decoder.sizes and loaded.seen.tolist() == decoder.seen.tolist() and not loaded.training
    assert (loaded.scale, loaded.backoff) == (decoder.scale, decoder.backoff)
    torch.testing.assert_close(*(d.log_probabilities(d.features(hidden), base_logits) for d in (loaded, decoder)))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_loading_runs_no_code_from_the_file(tmp_path):
    torch.save({"sizes": Evil(), "weights": {}}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        MemoryDecoder.load(tmp_path / "evil.pt")


def test_a_manifest_vouches_for_every_file(trained, tmp_path):
    assert read_manifest(tmp_path / "nowhere") is None
    copy = shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("stages"))
    assert read_manifest(copy)["entries"] > 0
    (copy / "memory_decoder.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(copy)
    (copy / "memory_decoder.pt").unlink()
    with pytest.raises(UserError, match="missing"):
        read_manifest(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="manifest"):
        read_manifest(copy)
