"""What a Step shows, settings that change during an answer, answers that continue kept tokens, and kNN-LM."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROWS, SPECIAL, examples, make_decoder

import generation
from base_model import Literal
from datastore import Datastore, hidden_batches
from generation import AUTO, KNN, RULES, Gate, MemoryAugmentedLM, Settings
from index import build_index
from support.command import UserError
from texts import Template, entries_of, shared_prefix, windows_of

QA = Template.parse("Question: {q}\nAnswer: {a}")
PROMPT = QA.prompt("May I keep a goat?")
EVERY_RULE = (*RULES, AUTO, KNN)


@pytest.fixture(scope="module")
def keys_and_store(base):
    """Keys (N, H) and the exact datastore of four rows."""
    rows = [{"q": row["Question"], "a": row["Answer"]} for row in ROWS[1:40:10]]
    windows = windows_of(base, rows, QA, 64)
    values, example, position, _ = entries_of(windows)
    keys = torch.cat([hidden for _, hidden in hidden_batches(base, windows, 1)]).numpy()
    return keys, Datastore(*build_index(keys, "Flat"), values, example, position, examples(rows))


@pytest.fixture(scope="module")
def model(base, keys_and_store):
    gate = Gate([0.5, -0.4, 0.3, -0.2, 0.1, 0.8, -0.6, 0.7], -0.5)
    return MemoryAugmentedLM(base, make_decoder(context=6), QA, gate, keys_and_store[1])


def chosen(**values):
    """Settings under which every rule has an effect on the tiny model."""
    return Settings(**{"temperature": 0, "knn_k": 12, "knn_temperature": 6.0} | values)


def answer(model, settings, count=12, prompt=PROMPT, **more):
    """(ids of the prompt, steps of the answer)."""
    return model.base.encode(prompt), list(model.stream(prompt, settings, count, **more))


def tokens_of(steps):
    return [step.token for step in steps]


def nearest(keys, query, k):
    """(squared distance, entry) of the k nearest keys to a query (H,), by sorting every distance."""
    distances = ((keys.astype(np.float64) - query.double().numpy()) ** 2).sum(1)
    return [(distances[n], n) for n in np.argsort(distances, kind="stable")[:k]]


def slow_votes(keys, values, query, k, temperature):
    """The kNN distribution (V,) at a query (H,), neighbour by neighbour."""
    found, chances = nearest(keys, query, k), torch.zeros(512, dtype=torch.float64)
    weights = [math.exp((found[0][0] - distance) / temperature) for distance, _ in found]
    for weight, (_, entry) in zip(weights, found, strict=True):
        chances[values[entry]] += weight / sum(weights)
    return chances.float()


@torch.no_grad()
def slow_chances(model, keys, ids, settings, alpha):
    """Probabilities (3, V) under base, memory and blend after ids. Both models read the whole text at once."""
    base, hidden = model.base, model.base.hidden(torch.tensor([ids]))
    own, skip = base.logits(hidden[0]), shared_prefix(ids, base.encode([Literal("Question:")]))
    p = torch.softmax(own[-1], -1)
    if settings.rule == KNN:
        m = slow_votes(keys, model.store.values, hidden[0, -1], settings.knn_k, settings.knn_temperature)
    else:
        m = model.decoder.log_probabilities(model.decoder.features(hidden[:, skip:].float())[0], own[skip:])[-1].exp()
    mixed = torch.softmax((1 - alpha) * own[-1] + alpha * m.log(), -1) if settings.rule == "logits" else (1 - alpha) * p + alpha * m
    return torch.stack([p, m, mixed])


def force_tokens(monkeypatch, tokens):
    """Make the sampler give these tokens, one after another."""
    left = iter(tokens)
    monkeypatch.setattr(generation, "sample", lambda *_: next(left))


def always_prefer(monkeypatch):
    """Make 300 the best token at every place, then 301 and so on."""
    fixed = torch.full((512,), -50.0)
    fixed[300:400] = torch.arange(100.0, 0, -1)
    monkeypatch.setattr(generation, "blend", lambda *_: fixed)


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_candidates_are_the_ten_best_of_base_memory_and_blend_and_the_token_itself(model, keys_and_store, rule):
    settings, outside = chosen(alpha=0.4, rule=rule, temperature=2.0, top_k=300), 0
    ids, steps = answer(model, settings, seed=4)
    for step in steps:
        chances = slow_chances(model, keys_and_store[0], ids, settings, step.alpha)
        shown = [token for token, *_ in step.candidates]
        torch.testing.assert_close(torch.tensor([c for _, *c in step.candidates]).T, chances[:, shown], atol=1e-4, rtol=1e-3)
        tenth, eleventh = chances.sort(descending=True).values[:, 9:11, None].unbind(1)
        assert set((chances > eleventh + 1e-5).any(0).nonzero().flatten().tolist()) | {step.token} <= set(shown)
        among = (chances >= tenth - 1e-5).any(0)
        assert all(among[token] or token == step.token for token in shown) and 10 <= len(shown) == len(set(shown)) <= 31
        blended = [p for *_, p in step.candidates]
        assert blended == sorted(blended, reverse=True)
        (own,) = (c for token, *c in step.candidates if token == step.token)
        assert own == [step.base, step.memory, step.blended]
        outside += not among[step.token]
        ids.append(step.token)
    assert len(steps) > 5 and (rule == KNN or outside)  # under kNN-LM most tokens tie at probability 0


@pytest.mark.parametrize("top_k", [1, 7, 512, 1000])
def test_the_cut_is_the_probability_of_the_last_token_that_top_k_lets_through(model, keys_and_store, top_k):
    settings = chosen(temperature=1.0, top_k=top_k)
    ids, steps = answer(model, settings, 6, seed=0)
    for step in steps:
        blended = slow_chances(model, keys_and_store[0], ids, settings, 0.5)[2].sort(descending=True).values
        assert step.cut == pytest.approx(blended[min(top_k, 512) - 1].item(), rel=1e-2, abs=1e-7) and step.blended >= step.cut
        ids.append(step.token)


def test_the_seconds_of_a_step_leave_out_what_the_reader_does_between_two(model, monkeypatch):
    clock = [0.0]

    def work(logits, *_):
        clock[0] += 2
        return int(logits.argmax())
    monkeypatch.setattr(generation, "sample", work)
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for step in model.stream(PROMPT, chosen(), 4):
        assert step.seconds == 2
        clock[0] += 100


@pytest.mark.parametrize(("before", "change"), [
    ({"alpha": 0}, {"alpha": 1}), ({"alpha": 1, "rule": "probabilities"}, {"alpha": 0}), ({"alpha": 0, "rule": KNN}, {"alpha": 1}),
    ({"temperature": 3.0, "top_k": 512}, {"temperature": 0}), ({"temperature": 3.0, "top_k": 512}, {"top_k": 1})])
def test_what_changes_while_an_answer_is_written_counts_from_the_next_token_on(model, keys_and_store, before, change):
    settings = chosen(**before)
    ids, stream, best = model.base.encode(PROMPT), model.stream(PROMPT, settings, 12, seed=1), []
    for number, step in enumerate(stream):
        chances = slow_chances(model, keys_and_store[0], ids, settings, settings.alpha)
        assert step.alpha == settings.alpha and step.blended == pytest.approx(chances[2, step.token].item(), abs=1e-4)
        best.append(step.blended >= chances[2].max().item() - 1e-4)
        if number == 4:
            for name, value in change.items():
                setattr(settings, name, value)
        ids.append(step.token)
    assert all(best[5:]) and len(best) > 7 and (not settings.temperature or not all(best[:5]))


def test_no_repeat_and_top_k_that_change_on_the_way_count_from_the_next_token_on(model, monkeypatch):
    always_prefer(monkeypatch)
    settings, said, cuts = chosen(top_k=1), [], []
    for step in model.stream(PROMPT, settings, 7):
        said.append(step.token), cuts.append(step.cut)
        settings.no_repeat = (0, 0, 1, 1, 1, 0, 0)[len(said) - 1]
        settings.top_k = 1 if len(said) < 4 else 2
    assert said == [300, 300, 300, 301, 302, 303, 300]
    assert cuts == 4 * cuts[:1] + 3 * cuts[-1:] and cuts[-1] < cuts[0]


def test_neighbours_and_their_temperature_that_change_on_the_way_count_from_the_next_token_on(model, keys_and_store):
    settings, ids, before = chosen(rule=KNN), model.base.encode(PROMPT), []
    changes = iter([{"knn_k": 3}, {"knn_temperature": 0.5}, {"knn_k": 30, "knn_temperature": 40.0}, {}])
    for step in model.stream(PROMPT, settings, 4):
        memory = slow_chances(model, keys_and_store[0], ids, settings, 0.5)[1]
        assert [m for _, _, m, _ in step.candidates] == pytest.approx(memory[[c[0] for c in step.candidates]].tolist(), abs=1e-4)
        before.append(max(m for _, _, m, _ in step.candidates))
        for name, value in next(changes).items():
            setattr(settings, name, value)
        ids.append(step.token)
    assert len(before) == len(set(before)) == 4


def test_the_rule_stays_what_it_was_when_the_answer_began(model):
    settings, (_, whole) = chosen(), answer(model, chosen(), 5)
    stream = model.stream(PROMPT, settings, 5)
    said = [next(stream)]
    settings.rule = KNN
    said += stream
    assert [(s.token, s.blended) for s in said] == [(s.token, s.blended) for s in whole]


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_an_answer_goes_on_from_kept_tokens_as_if_it_had_not_stopped(model, rule):
    _, whole = answer(model, chosen(rule=rule))
    assert len(whole) > 7
    for count in range(0, len(whole), 3):
        _, rest = answer(model, chosen(rule=rule), kept=tokens_of(whole[:count]))
        assert tokens_of(rest) == tokens_of(whole[count:])  # also as many: max_new_tokens counts kept tokens
        assert "".join(s.text for s in whole[:count] + rest) == "".join(s.text for s in whole)
        for one, other in zip(rest, whole[count:], strict=True):
            assert one.alpha == pytest.approx(other.alpha, abs=1e-4) and one.blended == pytest.approx(other.blended, abs=1e-4)
    if rule == AUTO:
        assert np.ptp([step.alpha for step in whole]) > 0.01


@pytest.mark.parametrize("said", ["a 東 né 🙂 end", "  Yes.\nQuest.\nQuestion: no", "Yes.\nQuest"])
def test_characters_and_stop_texts_may_lie_across_the_end_of_what_was_kept(model, monkeypatch, said):
    ids = model.base.encode(said)[1:]
    force_tokens(monkeypatch, ids)
    _, whole = answer(model, chosen(), len(ids))
    text = "".join(step.text for step in whole)
    assert text == said.strip().partition("\nQuestion:")[0]
    for count in range(len(whole)):
        force_tokens(monkeypatch, ids[count:])
        _, rest = answer(model, chosen(), len(ids), kept=ids[:count])
        assert "".join(s.text for s in whole[:count] + rest) == text and len(rest) == len(whole) - count


def test_a_first_token_is_spoken_whatever_it_is_with_its_own_probabilities_and_the_answer_goes_on_behind_it(model, keys_and_store):
    ids, whole = answer(model, chosen())
    kept, settings = tokens_of(whole[:3]), chosen(top_k=1)
    forced = whole[3].candidates[-1][0]  # the least probable of those shown
    step, second, *_ = model.stream(PROMPT, settings, kept=kept, first=forced)
    chances = slow_chances(model, keys_and_store[0], ids + kept, settings, 0.5)
    assert step.token == forced != whole[3].token
    torch.testing.assert_close(torch.tensor([step.base, step.memory, step.blended]), chances[:, forced], atol=1e-5, rtol=1e-3)
    assert step.blended < step.cut == pytest.approx(chances[2].max().item(), abs=1e-4)
    behind = slow_chances(model, keys_and_store[0], [*ids, *kept, forced], settings, 0.5)[2]
    assert second.token == behind.argmax() and second.blended == pytest.approx(behind.max().item(), abs=1e-4)


def test_an_end_token_as_the_first_ends_the_answer(model):
    (step,) = model.stream(PROMPT, chosen(), kept=model.base.encode("No.")[1:], first=SPECIAL.index("<eos>"))
    assert step.text == "" and step.token in model.ends


@pytest.mark.parametrize(("kept", "most", "expected"), [(0, 4, 4), (5, 6, 1), (5, 5, 0), (5, 4, 0)])
def test_max_new_tokens_counts_the_kept_ones(model, monkeypatch, kept, most, expected):
    always_prefer(monkeypatch)
    for first in (None, 301):
        assert len(list(model.stream(PROMPT, chosen(), most, kept=[300] * kept, first=first))) == expected


def test_runs_of_kept_and_first_tokens_do_not_come_again(model, monkeypatch):
    always_prefer(monkeypatch)

    def goes_on(**more):
        return tokens_of(answer(model, chosen(no_repeat=2), **more)[1])

    assert goes_on(kept=[300, 300], count=6) == [301, 300, 302, 300]
    assert goes_on(kept=[300, 301], first=300, count=6) == [300, 300, 302, 300]
    assert goes_on(kept=[300, 300], first=300, count=4) == [300, 301]  # a given first token is used all the same


@pytest.mark.parametrize(("k", "temperature"), [(1, 6.0), (8, 6.0), (8, 0.3), (30, 1e9), (10**6, 20.0)])
def test_the_search_gives_what_the_neighbours_give_one_by_one(model, keys_and_store, k, temperature):
    keys, store = keys_and_store
    hidden = model.base.hidden(torch.tensor([model.base.encode(ROWS[7]["Answer"][:80])]))[0]
    for query in hidden[3::5]:
        found = model.search(query, chosen(knn_k=k, knn_temperature=temperature)).exp()
        torch.testing.assert_close(found, slow_votes(keys, store.values, query, k, temperature), atol=1e-4, rtol=1e-3)
        assert found.sum().item() == pytest.approx(1) and (found > 0).sum() <= k


def test_a_neighbour_that_was_not_found_has_no_vote(base):
    store = Datastore(None, None, np.array([70, 80, 90], np.int32), None, None, [])
    store.search = lambda queries, k: (np.array([[4.0, 5.0, np.inf]], np.float32), np.array([[1, 0, -1]]))
    found = MemoryAugmentedLM(base, make_decoder(), store=store).search(torch.zeros(32), Settings(knn_k=3)).exp()
    assert found[80].item() == pytest.approx(1 / (1 + math.exp(-1))) and found[[70, 80]].sum().item() == pytest.approx(1)


def test_knn_lm_at_alpha_zero_says_what_the_base_alone_says(model):
    ids, steps = answer(model, chosen(rule=KNN, alpha=0), 20)
    given = torch.tensor([ids])
    own = model.base.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=20, do_sample=False,
                                    eos_token_id=sorted(model.ends))
    assert tokens_of(steps) == own[0, len(ids):].tolist()


def test_knn_lm_at_alpha_one_says_only_what_some_neighbour_votes_for(model, keys_and_store):
    keys, store = keys_and_store
    _, steps = answer(model, chosen(rule=KNN, alpha=1, temperature=3.0, top_k=512, knn_k=6), 40, seed=2)
    for step in steps:
        assert step.token in {int(store.values[entry]) for _, entry in nearest(keys, step.hidden, 6)}
        assert step.memory == pytest.approx(step.blended, abs=1e-6) and step.memory > 0
    assert len(set(tokens_of(steps))) > 5


def test_knn_lm_without_a_datastore_is_refused_in_words(base):
    with pytest.raises(UserError, match="no datastore") as error:
        next(MemoryAugmentedLM(base, make_decoder()).stream("x", Settings(rule=KNN)))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
