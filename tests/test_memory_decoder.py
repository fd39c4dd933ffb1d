import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, make_decoder, with_any_topic

import memory_decoder
from datastore import UserError
from memory_decoder import (
    DecoderCache,
    MemoryDecoder,
    Topic,
    local_attention,
    memory_loss,
    merge_votes,
    read_manifest,
)


def sparse_case(P=12, K=5, V=40, C=8, seed=0):
    torch.manual_seed(seed)
    features, projection = torch.randn(P, C, requires_grad=True), torch.nn.Linear(C, V)
    tokens = torch.randint(0, 10, (P, K))  # repeats on purpose
    return features, projection, tokens, torch.softmax(torch.randn(P, K), 1), torch.randint(0, V, (P,))


def dense_loss(features, projection, tokens, weights, targets, kl_weight):
    """The original demo's way: a full row of probabilities for every position."""
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


# In one block or in several, fused or written out.
WAYS = [{"LEAST_BLOCK": block, "SCORES_AT_ONCE": scores} for block in (4, 128) for scores in (0, 2**25)]


def take(way, monkeypatch):
    """Make attention go one of the WAYS, whatever its size."""
    for name, value in way.items():
        monkeypatch.setattr(memory_decoder, name, value)


@pytest.mark.parametrize("context", [1, 3, 100])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_cached_decoding_equals_reading_the_whole_sequence(monkeypatch, context, norm_first, way):
    take(way, monkeypatch)
    decoder = with_any_topic(make_decoder(context=context, norm_first=norm_first, topic=8))
    hidden, read, cache = torch.randn(1, 20, 32), torch.randint(512, (1, 20)), DecoderCache()
    parts = [slice(0, 7), *(slice(i, i + 1) for i in range(7, 20))]
    pieces = [decoder(hidden[:, part], read[:, part], cache) for part in parts]
    torch.testing.assert_close(torch.cat(pieces, 1), decoder(hidden, read), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", [1, 5, 99])
def test_attention_is_the_same_in_whichever_way_it_is_worked_out(monkeypatch, context):
    decoder, hidden, given = make_decoder(context=context), torch.randn(3, 20, 32), []
    for way in WAYS:
        take(way, monkeypatch)
        logits = decoder(hidden)
        given.append((logits, *torch.autograd.grad(logits.square().mean(), list(decoder.parameters()), allow_unused=True)))
    for other in given[1:]:
        torch.testing.assert_close(given[0], other)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("T", "S", "context"), [(1, 1, 3), (1, 3, 3), (9, 9, 1), (9, 9, 3), (8, 12, 5), (13, 13, 6), (5, 5, 40)])
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
def test_a_decoder_that_starts_from_the_head_learns_under_dropout(base, norm_first):
    decoder = make_decoder(hidden=base.width, vocab=base.vocabulary, norm_first=norm_first, dropout=0.5)
    hidden = base.hidden(torch.tensor([base.encode(ROWS[0]["Answer"])[:40]]))
    decoder.start_from_head(base.head.weight, hidden[0])
    torch.logsumexp(decoder.train()(hidden), -1).mean().backward()
    norms = [p.grad.norm() for p in decoder.parameters() if p.grad is not None]
    assert 0 < max(norms) < 1e3


def test_dropout_acts_in_training_and_not_after_loading(tmp_path):
    decoder, hidden = make_decoder(dropout=0.5).train(), torch.randn(1, 6, 32)
    assert not torch.equal(decoder(hidden), decoder(hidden))
    decoder.save(tmp_path / "decoder.pt")
    torch.testing.assert_close(MemoryDecoder.load(tmp_path / "decoder.pt")(hidden), decoder.eval()(hidden))


def test_no_position_sees_a_later_one():
    decoder, hidden = make_decoder(context=8), torch.randn(1, 12, 32)
    changed = hidden.clone()
    changed[:, 7] += 1
    before, after = decoder(hidden), decoder(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


def test_a_topic_changes_where_a_token_changes_it_and_not_before():
    decoder, hidden = with_any_topic(make_decoder(context=1, topic=8)), torch.randn(1, 12, 32)
    read = torch.randint(512, (1, 12))
    changed = read.clone()
    with torch.no_grad():
        changed[:, 7], decoder.topic.table[5] = 5, 100 * decoder.topic.centres[3]  # a token that outweighs all others
    before, after = decoder(hidden, read), decoder(hidden, changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    torch.testing.assert_close(decoder.topic(changed)[0, 7:], decoder.topic.out.weight[3].expand(5, -1))
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).max() > 1e-4


def test_context_one_reads_every_position_alone_and_a_longer_one_does_not():
    hidden = torch.randn(1, 5, 32)
    alone, wide = make_decoder(context=1), make_decoder(context=5)
    torch.testing.assert_close(alone(hidden)[:, 4:], alone(hidden[:, 4:]), atol=1e-5, rtol=1e-5)
    assert (wide(hidden)[:, 4:] - wide(hidden[:, 4:])).abs().max() > 1e-3


def test_a_topic_is_the_centre_nearest_to_the_sum_of_the_tokens_so_far():
    topic, read = with_any_topic(make_decoder(topic=8)).topic, torch.randint(512, (2, 9))
    for b in range(2):
        for t in range(9):
            total = sum(topic.table[token] for token in read[b, :t + 1])
            scores = [float(total @ centre) for centre in topic.centres]
            torch.testing.assert_close(topic(read)[b, t], topic.out.weight[scores.index(max(scores))])


EMBEDDINGS = torch.randn(400, 48, generator=torch.Generator().manual_seed(3))
EMBEDDINGS[128:, :8] *= 8  # tokens that say nothing of a subject differ most


def texts_on(subjects, length=60, seed=0):
    """Tokens (N,) of one text for each of the subjects (texts,) 0 to 15, and offsets.

    Every second token is one of eight that belong to its subject, the first four in its first half, the others in its second.
    The rest come from five tokens, drawn anew for each half of each text, out of those that belong to none.
    """
    draw, texts = np.random.default_rng(seed), []
    for subject in subjects:
        for half in (0, 1):
            own = 8 * subject + 4 * half + draw.integers(0, 4, length // 2)
            other = draw.choice(draw.integers(128, 400, 5), length // 2)
            texts.append(np.where(draw.random(length // 2) < 1 / 2, own, other))
    return np.concatenate(texts), np.arange(len(subjects) + 1) * length


def fitted_topic(texts, count):
    tokens, offsets = texts
    topic = Topic(400, count, 16)
    topic.fit(EMBEDDINGS, tokens, Topic.windows(offsets))
    return topic


def topics_of(topic, tokens):
    """The topic (texts,) of the first 25 tokens of each text of 60."""
    return topic.nearest(torch.from_numpy(tokens).view(-1, 60)[:, :25])[:, -1]


def test_a_text_never_read_gets_the_topic_of_a_stored_one_on_its_subject():
    subjects = np.tile(np.arange(16), 20)
    known, new = texts_on(subjects), texts_on(np.arange(16), seed=1)[0]
    found = subjects[topics_of(fitted_topic(known, 320), new)]
    means = [EMBEDDINGS[tokens.reshape(-1, 60)[:, :25]].mean(1) for tokens in (new, known[0])]
    plain = subjects[F.cosine_similarity(means[0][:, None], means[1][None], dim=-1).argmax(1)]
    assert (found == np.arange(16)).sum() >= 13 and (plain == np.arange(16)).sum() <= 8


def test_fewer_topics_than_texts_are_clusters_of_texts_on_one_subject():
    subjects = np.tile(np.arange(16), 20)
    topic = fitted_topic(texts_on(subjects), 16)
    torch.testing.assert_close(topic.centres.norm(dim=1), torch.ones(16))
    found = topics_of(topic, texts_on(subjects)[0]).numpy()
    together = sum(np.bincount(subjects[found == number]).max() for number in np.unique(found))
    assert together >= 0.8 * len(subjects)


def test_a_topic_keeps_the_entry_at_which_its_text_begins():
    subjects = np.tile(np.arange(16), 20)
    texts = texts_on(subjects)
    assert fitted_topic(texts, 320).entry.tolist() == texts[1][:-1].tolist()
    clusters = fitted_topic(texts, 16)
    found = topics_of(clusters, texts[0]).numpy()
    assert set(clusters.entry.tolist()) <= set(texts[1].tolist())
    # Of a cluster it is mostly one on the subject of most of its texts.
    own = [subjects[clusters.entry[number] // 60] == np.bincount(subjects[found == number]).argmax() for number in np.unique(found)]
    assert sum(own) >= 0.75 * len(own) and len(own) > 10


def test_texts_too_short_for_topics_are_refused_in_words():
    with pytest.raises(UserError, match="at least 32 entries"):
        Topic.windows(np.arange(0, 41, 20))


def test_equal_texts_leave_topics_that_are_finite():
    topic = fitted_topic((np.ones(80, int), np.arange(0, 81, 40)), 2)
    assert topic(torch.randint(400, (1, 5))).isfinite().all() and topic.table.isfinite().all()


def test_a_topic_is_fitted_once_and_saved_with_the_decoder(tmp_path):
    decoder, hidden, read = with_any_topic(make_decoder(topic=8)), torch.randn(1, 6, 32), torch.randint(512, (1, 6))
    assert not {"topic.table", "topic.centres"} & {name for name, _ in decoder.named_parameters()}
    decoder.save(tmp_path / "decoder.pt")
    torch.testing.assert_close(MemoryDecoder.load(tmp_path / "decoder.pt")(hidden, read), decoder(hidden, read))


def test_a_file_of_another_shape_is_refused_in_words(tmp_path):
    make_decoder().save(tmp_path / "decoder.pt")
    saved = torch.load(tmp_path / "decoder.pt", weights_only=True)
    saved["weights"]["topic.map"] = torch.zeros(32, 8)  # as topics once were
    torch.save(saved, tmp_path / "decoder.pt")
    with pytest.raises(UserError, match="another version"):
        MemoryDecoder.load(tmp_path / "decoder.pt")


def test_a_file_from_before_there_were_topics_loads(tmp_path):
    decoder, hidden = make_decoder(), torch.randn(1, 6, 32)
    decoder.save(tmp_path / "decoder.pt")
    saved = torch.load(tmp_path / "decoder.pt", weights_only=True)
    del saved["sizes"]["topic"]
    torch.save(saved, tmp_path / "decoder.pt")
    torch.testing.assert_close(MemoryDecoder.load(tmp_path / "decoder.pt")(hidden), decoder(hidden))


def test_attention_learns_from_its_queries_and_keys():
    decoder = make_decoder(context=8)
    decoder(torch.randn(2, 8, 32)).square().mean().backward()
    assert decoder.blocks[0].qkv.weight.grad[:64].abs().max() > 0


def test_heads_that_do_not_divide_the_width_are_refused_in_words():
    with pytest.raises(UserError, match="do not divide"):
        MemoryDecoder(32, 100, decoder_dim=100)


def test_a_decoder_as_wide_as_the_base_starts_with_the_bases_own_opinion(base):
    ids = torch.randint(4, 512, (8, 64))
    keys = base.hidden(ids).flatten(0, 1)
    decoder = make_decoder(decoder_dim=32)
    decoder.start_from_head(base.head.weight, keys)
    expected = torch.log_softmax(base.logits(keys), -1)
    # LayerNorm fixes the length of the whitened state, so the copy is close and not exact.
    gap = F.kl_div(torch.log_softmax(decoder(keys[None])[0], -1), expected, log_target=True, reduction="batchmean")
    flat = F.kl_div(torch.full_like(expected, 1 / 512).log(), expected, log_target=True, reduction="batchmean")
    assert gap < 0.1 * flat


def test_a_narrower_decoder_starts_closer_to_the_base_than_any_random_projection(base):
    keys = base.hidden(torch.randint(4, 512, (8, 64))).flatten(0, 1)
    decoder = make_decoder(decoder_dim=16)
    decoder.start_from_head(base.head.weight, keys)
    W = base.head.weight - base.head.weight.mean(0)
    centred = (keys - keys.mean(0)) @ W.T

    def error(P, out):
        return (centred - (keys - keys.mean(0)) @ P.T @ out.T).square().mean()

    best = error(decoder.input_projection.weight, decoder.output_projection.weight)
    for seed in range(5):
        torch.manual_seed(seed)
        P = torch.linalg.qr(torch.randn(32, 16))[0].T
        states = (keys - keys.mean(0)) @ P.T
        assert best < error(P, torch.linalg.lstsq(states, centred).solution.T)


def test_a_decoder_wider_than_the_base_can_start_from_its_head(base):
    keys = base.hidden(torch.randint(4, 512, (4, 64))).flatten(0, 1)
    decoder = make_decoder(decoder_dim=64)
    decoder.start_from_head(base.head.weight, keys)
    agree = decoder(keys[None])[0].argmax(-1) == base.logits(keys).argmax(-1)
    assert agree.float().mean() > 0.7


def test_a_saved_decoder_comes_back_the_same(tmp_path):
    decoder, hidden = make_decoder(context=3, norm_first=False), torch.randn(1, 6, 32)
    decoder.save(tmp_path / "decoder.pt")
    torch.testing.assert_close(MemoryDecoder.load(tmp_path / "decoder.pt")(hidden), decoder(hidden))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_loading_runs_no_code_from_the_file(tmp_path):
    torch.save({"sizes": Evil(), "weights": {}}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        MemoryDecoder.load(tmp_path / "evil.pt")


def test_a_manifest_vouches_for_every_file(trained, tmp_path):
    import shutil
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
