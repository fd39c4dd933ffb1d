"""The held-out report: scores against slow twins, the half on which values are chosen, and the files written."""

import json
import math
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROWS, examples, make_decoder, rows_of

import evaluation
from datastore import Datastore, hidden_batches, seen_tokens
from evaluation import ALPHAS, TEMPERATURES, mix_probabilities, score_positions, summarise, sweep_logits, write_report
from generation import blend
from index import build_index
from memory_decoder import TrainingLoss
from texts import Template, entries_of, windows_of

TEMPLATE = Template.parse("Title: {Title}\nQuestion: {Question}\nAnswer: {Answer}")
K, TEMPERATURE, LENGTH = 5, 6.0, 64


@pytest.fixture(scope="module")
def keys_and_store(base):
    """Keys (N, H) and the exact datastore of four rows."""
    windows = windows_of(base, ROWS[1:40:10], TEMPLATE, LENGTH)
    values, example, position, _ = entries_of(windows)
    keys = torch.cat([hidden for _, hidden in hidden_batches(base, windows, 1)]).to(torch.float16).numpy()
    index, mean = build_index(keys, "Flat")
    return keys, Datastore(index, mean, values, example, position, examples(ROWS[1:40:10]))


@pytest.fixture(scope="module")
def held_windows(base):
    """Windows of two rows that the datastore does not hold. Each row gives several, of different lengths."""
    windows = windows_of(base, ROWS[5:200:150], TEMPLATE, LENGTH)
    assert {w.example for w in windows} == {0, 1} and len({len(w.ids) for w in windows}) > 1
    return windows


@pytest.fixture(scope="module", params=["some seen", "all seen"])
def decoder(request, base, keys_and_store):
    """A decoder that has seen the datastore's tokens, or every token. Its scale is not the initial one."""
    seen, share = seen_tokens(entries_of(windows_of(base, rows_of(keys_and_store[1]), TEMPLATE, LENGTH)))
    if request.param == "all seen":
        seen = range(base.vocabulary)
    made = make_decoder(seed=1, context=16, seen=seen, backoff=share)
    made.scale.fill_(0.8)
    return made


def brute_knn(keys, values, query, token):
    """Probabilities of `token` among the K nearest keys to query (H,) at every temperature, by sorting every distance."""
    distances = ((keys.astype(np.float64) - query.astype(np.float64)) ** 2).sum(1)
    nearest = np.argsort(distances, kind="stable")[:K]
    chances = []
    for factor in TEMPERATURES:
        weights = [math.exp(-(distances[n] - distances[nearest[0]]) / (factor * TEMPERATURE)) for n in nearest]
        chances.append(sum(w for w, n in zip(weights, nearest, strict=True) if values[n] == token) / sum(weights))
    return chances


def slow_memory(decoder, z, own):
    """The memory's log probabilities (V,) at one position, token by token, from the base's logits and its own (V',)."""
    scale, backoff = float(decoder.scale), float(decoder.backoff)
    votes = {token: math.exp(scale * value) for token, value in zip(decoder.seen.tolist(), own.tolist(), strict=True)}
    rest = [math.exp(value) for value in z.tolist()]
    total_votes, total_rest = sum(votes.values()), sum(value for token, value in enumerate(rest) if token not in votes)
    backoff = backoff if total_rest else 0
    chances = [(1 - backoff) * votes[token] / total_votes if token in votes else backoff * rest[token] / total_rest
               for token in range(len(z))]
    return torch.tensor(chances, dtype=torch.float64).log()


@torch.no_grad()
def slow_scores(base, decoder, keys, store, windows):
    """What score_positions returns, one window and one position at a time, as probabilities."""
    rows = {"base": [], "memory": [], "blend_logits": [], "knn": [], "example": [], "position": [], "opinions": []}
    for window in windows:
        ids = torch.tensor([window.ids])
        logits = base.model(ids).logits[0].double()
        hidden = base.decoder(ids).last_hidden_state[0]
        read = hidden[None, window.skip:-1].float()
        own = decoder.output_projection(decoder.features(read))[0].double()
        for t in range(window.skip, len(window.ids) - 1):
            token, z = window.ids[t + 1], logits[t]
            m = slow_memory(decoder, z, own[t - window.skip])
            rows["base"].append(torch.softmax(z, 0)[token].item())
            rows["memory"].append(torch.softmax(m, 0)[token].item())
            rows["blend_logits"].append([torch.softmax((1 - a) * z + a * m, 0)[token].item() for a in ALPHAS.tolist()])
            rows["knn"].append(brute_knn(keys, store.values, hidden[t].numpy(), token))
            rows["example"].append(window.example)
            rows["position"].append(window.position + t - window.skip)
            p, q = torch.softmax(m, 0), torch.softmax(z, 0)
            rows["opinions"].append([-(q * q.log()).sum().item(), -(p * p.log()).sum().item(), q.log().max().item(),
                                     p.log().max().item(), (p * (p / q).log()).sum().item()])
    return {name: np.array(column) for name, column in rows.items()}


@pytest.fixture(scope="module")
def slow(base, decoder, keys_and_store, held_windows):
    return slow_scores(base, decoder, *keys_and_store, held_windows)


@pytest.mark.parametrize("positions_at_once", [10_000, 7])
def test_scores_are_those_of_one_position_at_a_time(base, decoder, keys_and_store, held_windows, slow, monkeypatch,
                                                        positions_at_once):
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 4 * base.vocabulary * positions_at_once)
    scores = score_positions(base, decoder, held_windows, 3, keys_and_store[1], K, TEMPERATURE, sweep=True)
    assert scores.keys() == slow.keys()
    assert np.array_equal(scores["example"], slow["example"]) and np.array_equal(scores["position"], slow["position"])
    assert 0 < (slow["knn"] > 0).mean() < 1  # both hits and misses are compared
    for name in ("base", "memory", "blend_logits", "knn"):
        np.testing.assert_allclose(np.exp(scores[name]), slow[name], atol=2e-4, rtol=2e-3, err_msg=name)
    np.testing.assert_allclose(scores["opinions"], slow["opinions"], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("count", "backoff"), [(1, 0.02), (200, 0.02), (200, 0.4), (512, 0.4), (512, 0.0)])
def test_the_sweep_equals_blending_every_token_for_seen_and_unseen_targets(count, backoff):
    torch.manual_seed(count)
    seen = torch.randperm(512)[:count].sort()[0]
    decoder = make_decoder(seen=seen, backoff=backoff)
    base_logits, targets = 3 * torch.randn(40, 512), torch.randint(512, (40, 1))
    targets[:10, 0] = seen[torch.randint(count, (10,))]
    memory = decoder.log_probabilities(decoder.features(torch.randn(1, 40, 32))[0], base_logits).detach()
    assert count == 512 or not torch.isin(targets, seen).all()
    fast = sweep_logits(base_logits, memory, targets, seen, backoff)
    for column, alpha in enumerate(ALPHAS.tolist()):
        slow = torch.log_softmax(blend(base_logits, memory, alpha), -1).gather(1, targets)[:, 0]
        torch.testing.assert_close(fast[:, column], slow, atol=1e-4, rtol=1e-4)


def learned(base, windows, steps=25):
    """A decoder after some training steps on the windows' next tokens, so that its logits mean something."""
    decoder = make_decoder(context=16, seen=np.unique(entries_of(windows).values))
    loss, optimizer = TrainingLoss(decoder, 0.0), torch.optim.AdamW(decoder.parameters(), 3e-3)
    for _ in range(steps):
        for window in windows:
            hidden = base.hidden(torch.tensor([window.ids]))[:, window.skip:-1].clone()
            y = torch.searchsorted(decoder.seen, torch.tensor(window.ids[window.skip + 1:]))
            total, _, _ = loss(hidden, torch.ones(1, len(y), dtype=torch.bool), y[:, None], torch.ones(len(y), 1), y)
            optimizer.zero_grad(), total.backward(), optimizer.step()
    return decoder.eval()


@pytest.mark.parametrize("positions_at_once", [10_000, 7])
def test_calibration_chooses_the_best_scale_and_leaves_the_backoff(
        base, held_windows, keys_and_store, monkeypatch, positions_at_once):
    known = windows_of(base, rows_of(keys_and_store[1]), TEMPLATE, LENGTH)[:4]
    decoder, windows, table = learned(base, known), [known[0], held_windows[0], held_windows[-1]], {}
    for scale in evaluation.SCALES.tolist():
        decoder.scale.fill_(scale)
        table[scale] = score_positions(base, decoder, windows)["memory"].mean()
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 8 * base.vocabulary * positions_at_once)
    decoder.scale.fill_(1)
    before = float(decoder.backoff)
    evaluation.calibrate(base, decoder, windows, 2)
    assert float(decoder.scale) == pytest.approx(max(table, key=table.get)) and float(decoder.backoff) == before
    assert evaluation.SCALES[0] < decoder.scale < evaluation.SCALES[-1]  # so that a search that tries only the ends fails


@pytest.mark.parametrize(("search", "sweep"), [(False, False), (True, False), (False, True)])
def test_scores_without_a_datastore_or_a_sweep_are_the_same_but_for_what_these_give(base, decoder, held_windows, keys_and_store,
                                                                                     search, sweep):
    found = keys_and_store[1], K, TEMPERATURE
    whole = score_positions(base, decoder, held_windows, 3, *found, sweep=True)
    part = score_positions(base, decoder, held_windows, 3, *(found if search else ()), sweep=sweep)
    assert whole.keys() - part.keys() == {name for name, given in (("knn", search), ("blend_logits", sweep)) if not given}
    for name in part:
        np.testing.assert_allclose(part[name], whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3, 20])
def test_the_scores_and_the_scale_of_several_processes_are_those_of_one(world, base, held_windows, keys_and_store, monkeypatch):
    found = keys_and_store[1], K, TEMPERATURE
    processes = [SimpleNamespace(process_index=rank, num_processes=world, is_main_process=not rank) for rank in range(world)]
    decoder = make_decoder(context=16)
    evaluation.calibrate(base, decoder, held_windows, 2)
    scale, decoder.scale = float(decoder.scale), torch.ones(())
    totals = []
    for all_gathered in (lambda own: totals.extend(own) or own, lambda own: totals):
        monkeypatch.setattr(evaluation, "gather_object", all_gathered)
        for process in processes:
            evaluation.calibrate(base, decoder, held_windows, 2, process)
    assert float(decoder.scale) == scale
    whole = score_positions(base, decoder, held_windows, 2, *found, sweep=True)
    parts = [score_positions(base, decoder, evaluation.own_windows(held_windows, 2, process), 2, *found, sweep=True)
             for process in processes]
    monkeypatch.setattr(evaluation, "gather_object", lambda own: parts)
    together = score_positions(base, decoder, held_windows, 2, *found, sweep=True, accelerator=processes[-1])
    assert max(len(part["base"]) for part in parts) < len(whole["base"])
    assert together.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(together[name], whole[name], rtol=1e-5, atol=1e-6)


def test_a_search_that_finds_fewer_than_k_gives_the_votes_to_what_it_found(keys_and_store):
    keys, store = keys_and_store
    few = Datastore(build_index(keys[:3], "Flat")[0], keys[:3].astype(np.float32).mean(0), store.values[:3], None, None, [])
    hidden, last = torch.from_numpy(keys[:1]).float(), store.values[2:3]
    found = np.exp(evaluation.knn_log_probabilities(few, hidden, last, 8, TEMPERATURE))
    distances = ((keys[:3].astype(np.float64) - keys[0].astype(np.float64)) ** 2).sum(1)
    for column, factor in enumerate(TEMPERATURES):
        weights = np.exp(-distances / (factor * TEMPERATURE))
        expected = weights[few.values == last[0]].sum() / weights.sum()
        assert found[0, column] == pytest.approx(expected, abs=1e-5)


def test_mixing_at_alpha_zero_is_exactly_the_first_and_at_one_the_second():
    rng = np.random.default_rng(0)
    first, second = -rng.exponential(3, 50), -rng.exponential(3, 50)
    second[:5] = -np.inf  # kNN gives most tokens no probability at all
    mixed = mix_probabilities(first, second)
    assert mixed.shape == (50, len(ALPHAS)) and (ALPHAS[0], ALPHAS[-1]) == (0, 1)
    assert np.array_equal(mixed[:, 0], first)
    assert np.array_equal(mixed[:, -1], second)


def test_mixing_is_the_logarithm_of_mixed_probabilities():
    first, second = np.log([0.5, 0.01]), np.array([math.log(0.2), -np.inf])
    mixed = mix_probabilities(first, second)
    for column, a in enumerate(ALPHAS):
        assert np.exp(mixed[0, column]) == pytest.approx((1 - a) * 0.5 + a * 0.2)
        assert np.exp(mixed[1, column]) == pytest.approx((1 - a) * 0.01)


def random_scores(positions=400, seed=0):
    """Log probabilities on which the best alphas lie inside (0, 1)."""
    rng = np.random.default_rng(seed)
    draw = {name: -rng.exponential(3, (positions, *shape)) for name, shape in (("base", ()), ("memory", ()), ("knn", (5,)))}
    bowl = -3 - 2 * (ALPHAS - 0.4) ** 2
    return {**draw, "blend_logits": bowl + rng.normal(0, 0.1, (positions, 1)), "opinions": rng.normal(0, 1, (positions, 5)),
            "example": rng.integers(0, 6, positions), "position": rng.permutation(positions)}


def summary_of(scores):
    return summarise(scores, random_scores(80, seed=5), 3.0)


def moved(scores, parity, seed=9):
    """The same scores, but those of the even (0) or odd (1) examples favour other choices."""
    rows = scores["example"] % 2 == parity
    rng = np.random.default_rng(seed)
    changed = {name: array.copy() for name, array in scores.items()}
    changed["base"][rows], changed["memory"][rows] = -9.0, -1.0
    changed["knn"][rows] = [-8, -8, -8, -8, -0.5]
    changed["blend_logits"][rows] = ALPHAS - 5 + rng.normal(0, 0.1, (rows.sum(), 1))
    return changed


def test_what_is_chosen_depends_on_the_even_examples_only():
    scores = random_scores()
    before = summary_of(scores)
    after_odd, after_even = (summary_of(moved(scores, parity)) for parity in (1, 0))
    torch.testing.assert_close(after_odd["chosen"], before["chosen"], rtol=1e-4, atol=1e-6)
    assert after_odd["held_out"] != before["held_out"]
    names = ("alpha_logits", "alpha_probabilities", "knn_lambda", "knn_temperature")
    assert all(after_even["chosen"][name] != before["chosen"][name] for name in names)


def test_what_is_reported_depends_on_the_odd_examples_only():
    scores = random_scores()
    before = summary_of(scores)
    after_even, after_odd = (summary_of(moved(scores, parity)) for parity in (0, 1))
    for name in ("base", "memory", "positions"):
        assert after_even["held_out"][name] == pytest.approx(before["held_out"][name])
    torch.testing.assert_close(after_even["alpha_sweep"], before["alpha_sweep"], rtol=1e-6, atol=0)
    assert after_odd["held_out"]["base"] == pytest.approx(math.exp(9))
    assert after_odd["held_out"]["memory"] == pytest.approx(math.exp(1))


def slow_mix(first, second, a):
    return math.log((1 - a) * math.exp(first) + a * math.exp(second))


def slow_perplexity(scores, parity, one):
    """exp of the mean of -one(position) over the examples of one parity."""
    terms = [-one(p) for p, example in enumerate(scores["example"]) if example % 2 == parity]
    return math.exp(sum(terms) / len(terms))


def test_the_summary_is_the_best_of_every_setting_tried_one_by_one():
    scores = random_scores(60)
    base, memory, knn = scores["base"], scores["memory"], scores["knn"]
    tables = {
        "blend_logits": {(a,): lambda p, a=a: scores["blend_logits"][p, a] for a in range(21)},
        "blend_probabilities": {(a,): lambda p, a=a: slow_mix(base[p], memory[p], ALPHAS[a]) for a in range(21)},
        "knn_lm": {(a, s): lambda p, a=a, s=s: slow_mix(base[p], knn[p, s], ALPHAS[a]) for a in range(21) for s in range(5)},
    }
    summary = summary_of(scores)
    best = {name: min(table, key=lambda at, t=table: slow_perplexity(scores, 0, t[at])) for name, table in tables.items()}
    for name, table in tables.items():
        assert summary["held_out"][name] == pytest.approx(slow_perplexity(scores, 1, table[best[name]]))
    assert summary["held_out"]["base"] == pytest.approx(slow_perplexity(scores, 1, lambda p: base[p]))
    chosen = summary["chosen"]
    assert chosen["alpha_logits"] == pytest.approx(ALPHAS[best["blend_logits"][0]])
    assert chosen["alpha_probabilities"] == pytest.approx(ALPHAS[best["blend_probabilities"][0]])
    assert chosen["knn_lambda"] == pytest.approx(ALPHAS[best["knn_lm"][0]])
    assert chosen["knn_temperature"] == 3.0 * TEMPERATURES[best["knn_lm"][1]]
    assert chosen["positions"] + summary["held_out"]["positions"] == 60


def test_neighbours_that_never_hit_are_given_no_weight():
    scores = random_scores()
    scores["knn"] = np.full_like(scores["knn"], -np.inf)
    summary = summary_of(scores)
    assert summary["chosen"]["knn_lambda"] == 0
    assert summary["held_out"]["knn_lm"] == pytest.approx(summary["held_out"]["base"])


@pytest.fixture
def metrics():
    measured = {"entries": 12_345, "k": 8, "seconds": {"datastore": 1.4, "decoder": 22.6}, "resumed": ["decoder"],
                "peak_memory_bytes": 3 * 2**30}
    return summary_of(random_scores()) | measured


@pytest.mark.parametrize("losses", [[[1, 3.0, 2.0, 4.0]], [[10, 3.0, 2.0, 4.0], [20, 2.5, 1.8, 3.2]]])
def test_the_report_is_four_files_that_say_what_was_measured(metrics, losses, tmp_path, monkeypatch):
    drawn, real = [], evaluation.plot_losses
    monkeypatch.setattr(evaluation, "plot_losses", lambda rows, path: drawn.append(rows) or real(rows, path))
    metrics["losses"] = losses
    write_report(metrics, tmp_path)
    assert drawn == [losses]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.md", "loss_curve.png", "alpha_sweep.png"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    report = (tmp_path / "report.md").read_text()
    for said in ("12,345 entries", "K 8", "datastore 1, decoder 23 since it went on.", "3.00 GiB", "(loss_curve.png)",
                 "(alpha_sweep.png)"):
        assert said in report
    for name in ("loss_curve.png", "alpha_sweep.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.01


def test_every_line_of_the_table_has_its_perplexity_and_its_share_of_the_base(metrics):
    table = evaluation.report_table(metrics).splitlines()[2:]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    held = metrics["held_out"]
    names = ("base", "knn_lm", "memory", "blend_logits", "blend_probabilities", "blend_auto")
    assert [line[1] for line in lines] == [f"{held[name]:.2f}" for name in names]
    assert [line[2] for line in lines] == [f"{held[name] / held['base']:.2f}" for name in names]
    assert f"{metrics['chosen']['alpha_logits']:g}" in lines[3][3]


def test_evidence_is_of_earlier_tokens_of_the_same_example_only():
    scores = random_scores(60)
    gains = np.clip(scores["memory"] - scores["base"], -5, 5)
    evidence = evaluation.evidence_before(scores)
    for p in range(60):
        same = np.flatnonzero(scores["example"] == scores["example"][p])
        earlier = sorted((q for q in same if scores["position"][q] < scores["position"][p]), key=lambda q: scores["position"][q])
        for column, decay in enumerate((0.6, 0.9, 0.98)):
            expected = sum((1 - decay) * decay**ago * gains[q] for ago, q in enumerate(reversed(earlier)))
            assert evidence[p, column] == pytest.approx(expected)


def told_apart(positions, seed=0):
    """Scores on which the memory is right exactly where its entropy, the second opinion, is negative."""
    rng = np.random.default_rng(seed)
    scores = random_scores(positions, seed)
    knows = rng.random(positions) < 0.5
    scores["opinions"][:, 1] = np.where(knows, -1, 1) + rng.normal(0, 0.1, positions)
    scores["memory"], scores["base"] = np.where(knows, -0.5, -6.0), np.where(knows, -5.0, -1.0)
    return scores, knows


def test_the_gate_finds_where_the_memory_is_right_and_beats_every_fixed_alpha():
    (fitted, _), (other, knows) = told_apart(400), told_apart(400, seed=1)
    gate = evaluation.fit_gate([(fitted, evaluation.evidence_before(fitted), 1)])
    mixed, alpha = evaluation.gated(gate, other, evaluation.evidence_before(other))
    assert alpha[knows].min() > 0.9 and alpha[~knows].max() < 0.1
    np.testing.assert_allclose(np.exp(mixed), (1 - alpha) * np.exp(other["base"]) + alpha * np.exp(other["memory"]))
    fixed = evaluation.perplexities(mix_probabilities(other["base"], other["memory"]))
    assert evaluation.perplexity(mixed) < 0.8 * fixed.min()


def test_a_gate_that_is_told_nothing_is_the_best_fixed_alpha():
    scores = random_scores(400)
    scores["opinions"][:], nothing = 0, np.zeros((400, 3))
    mixed, alpha = evaluation.gated(evaluation.fit_gate([(scores, nothing, 1)]), scores, nothing)
    assert np.ptp(alpha) < 1e-9
    fixed = evaluation.perplexities(mix_probabilities(scores["base"], scores["memory"]))
    assert evaluation.perplexity(mixed) <= fixed.min() * (1 + 1e-3)


def test_texts_on_which_the_base_is_right_make_the_gate_more_careful():
    scores, samples = random_scores(400), random_scores(100, seed=3)
    samples["memory"] = samples["base"] - 3
    evidence = evaluation.evidence_before(samples)
    own = scores, evaluation.evidence_before(scores), 1
    gates = [evaluation.fit_gate([own, (samples, evidence, weight)]) for weight in (0, 1)]
    alphas = [evaluation.gated(gate, samples, evidence)[1].mean() for gate in gates]
    assert alphas[1] < alphas[0] - 0.05


def test_the_bases_own_texts_take_part_in_the_gate_with_their_weight():
    scores, (own, _) = random_scores(), told_apart(80, seed=5)
    even = scores["example"] % 2 == 0
    chosen = {name: array[even] for name, array in scores.items()}, evaluation.evidence_before(scores)[even], 1
    given = summarise(scores, own, 3.0)["chosen"]["gate"]
    parts = chosen, (own, evaluation.evidence_before(own), evaluation.SAMPLES_WEIGHT)
    whole, less = evaluation.fit_gate(parts), evaluation.fit_gate(parts[:1])
    np.testing.assert_allclose([*given["weights"], given["bias"]], [*whole.weights, whole.bias], rtol=1e-4, atol=1e-6)
    assert np.abs(whole.weights - less.weights).max() > 1e-2


def test_the_bases_own_texts_surprise_it_as_much_as_its_entropy_says(base):
    scores = score_positions(base, make_decoder(), evaluation.sample_windows(base, 200))
    entropy, surprise = scores["opinions"][:, 0], -scores["base"]
    assert len(surprise) == evaluation.SAMPLES * 199
    # At every position the difference is 0 on average. Sampling at temperature 0.8, for example, is further off.
    assert abs((surprise - entropy).mean()) < 4 * (surprise - entropy).std() / len(surprise) ** 0.5 < 0.1 * entropy.mean()


def test_the_base_writes_its_own_texts_the_same_for_a_seed(base):
    first, again, other = (evaluation.sample_windows(base, 12, seed) for seed in (0, 0, 1))
    assert [w.ids for w in first] == [w.ids for w in again] != [w.ids for w in other]
    assert len(first) == evaluation.SAMPLES and all(w.ids[0] == base.bos and len(w.ids) == 12 for w in first)
