"""Answers and their explanations, in this process: requests, prompts, records, passages, voices, the explorer."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROWS, rows_of

import app
from chat import EVERY_RULE, RANGES, VOICES, Answer, Chat, check_ranges, logprobs
from datastore import knn_weights, open_keys
from generation import KNN, RULES, Evidence, Settings, blend, opinions
from memory_decoder import read_manifest
from support.command import UserError
from texts import encode_row

# Sampled with a seed, since the best first token of such a small memory may be the end.
GOOD = {"alpha": 0.5, "temperature": 2, "top_k": 200, "max_new_tokens": 12, "k": 4, "rule": "logits", "seed": 3, "no_repeat": 0}
QUESTION = "Can my boss refuse to pay me overtime?"


@pytest.fixture(scope="module")
def chat(trained):
    return Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


@pytest.fixture(scope="module")
def keys(chat, trained):
    return open_keys(next(trained.glob("stages/datastore-*/keys.f16")), chat.model.base.width).astype(np.float32)


def write(chat, message=QUESTION, turns=(), **changes):
    """A whole answer, traced."""
    answer = chat.begin(message, turns, **GOOD | changes)
    for _ in chat.write(answer):
        pass
    return chat.trace(answer)


def streamed(chat, prompt, **changes):
    """The Steps that the model gives for the same request."""
    given = GOOD | changes
    names = {f.name for f in dataclasses.fields(Settings)}
    return list(chat.model.stream(prompt, Settings(**{n: v for n, v in given.items() if n in names}), given["max_new_tokens"],
                                  given["seed"]))


def test_a_good_request_passes_at_both_ends_of_every_range(chat):
    for end, rule in itertools.product((0, 1), EVERY_RULE):
        values = {name: bounds[end] for name, bounds in RANGES.items()}
        chat.begin("?", rule=rule, **values | {"max_new_tokens": (1, 400)[end]})  # as many as such a small base reads


@pytest.mark.parametrize("message", ["", "  \n\t", None, 3, ["text"]])
def test_a_message_without_text_is_refused_in_one_sentence(chat, message):
    with pytest.raises(UserError, match=r"^Type a question first\.$"):
        chat.begin(message)


@pytest.mark.parametrize("rule", ["", "Logits", None, 1, ["logits"]])
def test_an_unknown_rule_is_refused_with_the_names_of_those_known(chat, rule):
    with pytest.raises(UserError, match=r"^[^\n]*logits, probabilities, auto, kNN-LM[^\n]*\.$"):
        chat.begin("?", rule=rule)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("change", [-1e-6, math.nan, math.inf, -math.inf, None, "1", [1], True])
def test_a_value_that_no_slider_gives_is_refused_by_name(name, change):
    low, high = RANGES[name]
    bad = [low + change, high - change] if change == -1e-6 else [change]
    for value in bad:
        with pytest.raises(UserError, match=rf"^{name} must be from {low:g} to {high:g}, not [^\n]*\.$".replace("+", r"\+")):
            check_ranges(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "max_new_tokens", "k", "no_repeat", "knn_k"])
def test_half_a_number_is_refused_where_a_whole_one_is_asked_for(chat, name):
    with pytest.raises(UserError, match=rf"^{name} must be a whole number, not 3\.5\.$"):
        chat.begin("?", **{name: 3.5})


@pytest.mark.parametrize("value", [10**30, 10**400, 10**5000, -10**5000], ids=["30", "400", "5000", "-5000"])
@pytest.mark.parametrize("name", [*RANGES, "seed", "rule"])
def test_a_number_of_any_length_is_refused_in_one_short_sentence(chat, name, value):
    with pytest.raises(UserError, match=rf"^[^\n]*{name}[^\n]*, not [^\n]{{1,40}}\.$"):
        chat.begin("?", **{name: value})


def test_a_whole_number_in_float_form_is_taken_for_what_it_is(chat):
    given = chat.begin("?", **{name: float(value) if isinstance(value, int) else value for name, value in GOOD.items()}, knn_k=1e2)
    assert given == chat.begin("?", **GOOD, knn_k=100)
    kinds = [type(value) for value in (given.settings.top_k, given.settings.no_repeat, given.settings.knn_k, given.max_new_tokens,
                                       given.k, given.seed)]
    assert set(kinds) == {int} and type(given.settings.alpha) is type(given.settings.temperature) is float


@pytest.mark.parametrize("seed", [3, 3.0, "3", " 3 ", "3.0", "3e0"])
def test_a_seed_may_be_given_in_any_form(chat, seed):
    assert chat.begin("?", seed=seed).seed == 3


HALF, MARK = "\ud800 a\udc00\x00\x1b[0m \ud83d\ude42", "\ufffd a\ufffd\x00\x1b[0m 🙂"


def test_halves_of_surrogates_and_control_characters_are_answered_as_their_marks_are(chat):
    given, expected = write(chat, HALF, [(HALF, HALF)]), write(chat, MARK, [(MARK, MARK)])
    assert (given.question, given.turns) == (MARK, [(MARK, MARK)]) and given.text == expected.text
    json.dumps(given.record(), ensure_ascii=False).encode()
    assert chat.explore(HALF, HALF) == chat.explore(MARK, MARK)


@pytest.mark.parametrize("seed", [-1, 2**31, "1.5", "x", "9" * 5000, 1.5, True, "1\n2", [3], math.nan, math.inf, "nan"])
def test_a_bad_seed_is_refused_in_one_sentence(chat, seed):
    with pytest.raises(UserError, match=r"^seed must be empty or a whole number from 0 to 2147483647, not [^\n]{1,40}\.$"):
        chat.begin("?", seed=seed)


def test_without_a_seed_one_is_drawn_and_noted(chat):
    seeds = {chat.begin("?", seed=seed).seed for seed in (None, "", " ", None)}
    assert len(seeds) == 4 and chat.begin("?", seed="7").seed == 7
    drawn = write(chat, seed=None)
    assert write(chat, seed=drawn.seed).text == drawn.text


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0, 0.4, 1])
def test_an_answer_is_what_the_model_streams_after_the_earlier_turns(chat, alpha, rule):
    prompt = f"Question: May I go?\nAnswer: You may.\nQuestion: {QUESTION}\nAnswer:"
    answer = write(chat, f"  {QUESTION}\n", [("May I go?", "You may.")], alpha=alpha, rule=rule)
    steps = streamed(chat, prompt, alpha=alpha, rule=rule)
    assert answer.text == "".join(step.text for step in steps) and answer.question == QUESTION
    for token, step in zip(answer.tokens, steps, strict=True):
        assert (token["id"], token["text"], token["alpha"]) == (step.token, step.text, pytest.approx(step.alpha, rel=1e-4))
        assert [token[name] for name in ("base", "memory", "blended", "cut")] == pytest.approx(
            [step.base, step.memory, step.blended, step.cut], rel=1e-4)
        assert [c["id"] for c in token["candidates"]] == [c[0] for c in step.candidates]


@pytest.mark.parametrize("change", [
    {"alpha": 0.1}, {"temperature": 0.5}, {"top_k": 5}, {"max_new_tokens": 5}, {"rule": "probabilities"}, {"rule": "auto"},
    {"rule": KNN, "knn_k": 4, "knn_temperature": 30.0}, {"seed": 4}, {"no_repeat": 1}], ids=str)
def test_every_setting_changes_the_answer_to_what_the_model_streams_under_it(chat, change):
    steps = streamed(chat, chat.prompt(QUESTION, [], 12), **change)
    assert write(chat, **change).text == "".join(step.text for step in steps) != write(chat).text


def test_an_answer_grows_token_by_token(chat):
    answer = chat.begin(QUESTION, **GOOD)
    seen = [(len(a.tokens), a.text) for a in chat.write(answer)]
    assert [count for count, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) > 5
    assert all(later.startswith(earlier) for (_, earlier), (_, later) in itertools.pairwise(seen))
    assert answer.seconds > 0 and answer.speed == pytest.approx(len(seen) / answer.seconds)


def test_a_prompt_is_the_beginning_of_a_training_text(chat):
    for row in ROWS[:5]:
        text, prompt = "".join(chat.template.render(row)), "".join(chat.prompt(row["Question"], [], 10))
        assert prompt.startswith("Question: ") and text.endswith(prompt + " " + row["Answer"])


def test_a_prompt_drops_the_oldest_turns_until_the_rest_fits(chat):
    base = chat.model.base
    turns = [(f"Question number {i} of some length?", f"Answer number {i} of some length.") for i in range(12)]
    kept = []
    for most in (10, 100, 200, 300, 400):
        texts = ["".join(f"Question: {q}\nAnswer: {a}\n" for q, a in turns[i:]) + "Question: Why?\nAnswer:" for i in range(13)]
        fitting = [text for text in texts if len(base.encode(text)) + most <= base.max_positions]
        assert "".join(chat.prompt("Why?", turns, most)) == fitting[0]
        kept.append(len(fitting) - 1)
    assert kept == sorted(kept, reverse=True) and 12 > kept[0] > kept[-1] > 0


def test_a_message_that_fits_to_the_last_position_is_answered(chat):
    room = chat.model.base.max_positions - len(chat.model.base.encode(chat.prompt(QUESTION, [], 1)))
    turns = [("Why?", "So.")]
    assert next(chat.write(chat.begin(QUESTION, turns, **GOOD | {"max_new_tokens": room})))
    with pytest.raises(UserError, match="shorten the question"):
        chat.begin(QUESTION, turns, **GOOD | {"max_new_tokens": room + 1})


@pytest.mark.parametrize("most", [0, 1, 5])
def test_an_answer_reads_no_more_turns_than_allowed(chat, monkeypatch, most):
    turns = [("one", "two"), ("three", "four")]
    monkeypatch.setattr(chat, "max_turns", most)
    assert chat.begin(QUESTION, turns).turns == turns[max(0, 2 - most):]


def nearest(keys, state, k):
    """Slow twin of the search: squared distances to every key."""
    return np.sort(((keys - state) ** 2).sum(1))[:k]


@pytest.mark.parametrize("stopped", [False, True])
def test_every_token_has_the_entries_nearest_to_its_own_place(chat, keys, stopped):
    answer = chat.begin(QUESTION, **GOOD)
    writing = chat.write(answer)
    for _ in range(4):
        next(writing)
    if not stopped:
        assert len([*writing]) > 1
    chat.trace(answer)
    ids = [*chat.model.base.encode(chat.prompt(QUESTION, [], 12)), *(token["id"] for token in answer.tokens)]
    hidden = chat.model.base.hidden(torch.tensor([ids]))[0].float().numpy()[-len(answer.tokens) - 1:]
    assert len(answer.tokens) == 4 or not stopped
    for token, state in zip(answer.tokens, hidden, strict=False):
        assert [distance for distance, _ in token["neighbours"]] == pytest.approx(nearest(keys, state, 4), rel=0.02)
    assert not answer.states


def test_a_passage_marks_the_token_that_the_entry_remembers(chat):
    for entry in range(0, len(chat.store), 77):
        passage = chat.passage(entry)
        remembered = chat.model.base.tokenizer.decode([int(chat.store.values[entry])], skip_special_tokens=True)
        row = rows_of(chat.store)[chat.store.example[entry]]
        assert passage["token"] == (remembered or "(end)") and passage["title"] == row["Title"]
        text = passage["before"].removeprefix("… ") + remembered + passage["after"]
        assert text in "".join(chat.template.render(row))
        assert (passage["entry"], passage["row"]) == (entry, chat.store.example[entry])


def test_the_end_of_a_row_is_shown_in_words(chat):
    ids = [encode_row(chat.model.base, chat.template, row) for row in rows_of(chat.store)]
    last = [n for n, (row, position) in enumerate(zip(chat.store.example, chat.store.position, strict=True))
            if position == len(ids[row]) - 2]
    assert len(last) == len(ids) and all(chat.passage(entry)["token"] == "(end)" for entry in last)


def test_passages_weigh_as_the_knn_distribution_does(chat):
    neighbours = write(chat, k=8).tokens[3]["neighbours"]
    passages = chat.passages(neighbours)
    expected = knn_weights(np.array([[d for d, _ in neighbours]], np.float32), chat.chosen["knn_temperature"])[0]
    assert [p["weight"] for p in passages] == pytest.approx(expected.tolist(), rel=1e-3) and len(passages) == 8
    assert [p["distance"] for p in passages] == sorted(d for d, _ in neighbours) and chat.passages([]) == []


def test_an_answer_outlives_its_record(chat):
    answer = write(chat, rule="auto")
    again = Answer.of_record(json.loads(json.dumps(answer.record())), answer.turns)
    assert again.record() == json.loads(json.dumps(answer.record())) and again.text == answer.text
    assert again.settings == answer.settings and again.record()["rule"] == "auto"


def test_going_on_keeps_the_first_tokens_and_takes_the_one_chosen(chat):
    old = write(chat, turns=[("May I go?", "You may.")])
    other = next(c["id"] for c in old.tokens[5]["candidates"] if c["id"] != old.tokens[5]["id"] and c["id"] not in chat.model.ends)
    new = old.going_on(5, chat.begin(QUESTION, **GOOD | {"alpha": 1.0}))
    list(chat.write(new, other))
    assert new.tokens[:5] == old.tokens[:5] and new.tokens[5]["id"] == other and (new.kept, new.turns) == (5, old.turns)
    with pytest.raises(UserError, match="raise max new tokens"):
        old.going_on(5, chat.begin(QUESTION, **GOOD | {"max_new_tokens": 5}))
    assert new.settings.alpha == 1 and len(new.tokens) <= 12 and old.tokens[5]["id"] != other


def base_greedy(base, ids, count):
    """The base model's own greedy tokens. The whole text is read again for each of them."""
    found = []
    while len(found) < count and not (found and found[-1] in base.ends):
        found.append(int(base.model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_three_voices_are_base_blend_and_memory_under_one_seed(chat, rule):
    asked = chat.begin(QUESTION, **GOOD | {"rule": rule, "temperature": 0})
    *_, voices = chat.voices(asked)
    assert len(voices) == len(VOICES) == 3 and {voice.seed for voice in voices} == {3}
    base, memory = chat.model.base, KNN if rule == KNN else "probabilities"
    with torch.no_grad():
        expected = base_greedy(base, base.encode(chat.prompt(QUESTION, [], 12)), 12)
    assert [token["id"] for token in voices[0].tokens] == expected[:len(voices[0].tokens)]
    assert voices[1].text == write(chat, rule=rule, temperature=0).text
    assert voices[2].text == write(chat, rule=memory, alpha=1, temperature=0).text
    assert voices[0].changed == 0 and all(0 <= voice.changed <= 1 for voice in voices)


def test_the_voices_take_turns_and_may_be_stopped(chat):
    seen = [[len(voice.tokens) for voice in voices] for voices in itertools.islice(chat.voices(chat.begin(QUESTION, **GOOD)), 3)]
    assert seen == [[1] * 3, [2] * 3, [3] * 3]


def test_the_share_changed_counts_where_the_first_choice_is_another(chat):
    answer = write(chat, alpha=1)
    ids = [*chat.model.base.encode(chat.prompt(QUESTION, [], 12)), *(token["id"] for token in answer.tokens)]
    with torch.no_grad():
        best = chat.model.base.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()[-len(answer.tokens) - 1:-1]
    other = [first != token["candidates"][0]["id"] for first, token in zip(best, answer.tokens, strict=True)]
    assert answer.changed == sum(other) / len(other) > 0


def test_the_explorer_measures_what_teacher_forcing_gives(chat):
    text, model = "Your boss may not. Ask in writing.", chat.model
    base, found = model.base, chat.explore(QUESTION, text)
    prompt = f"Question: {QUESTION}\nAnswer:"
    ids = [*base.encode(f"{prompt} {text}"), base.eos]
    hidden = base.hidden(torch.tensor([ids]))[0]
    skip, begin = model.skipped(ids), len(base.encode(prompt))
    z = base.logits(hidden)[skip:].log_softmax(-1)
    with torch.no_grad():
        m = model.decoder.log_probabilities(model.decoder.features(hidden[None, skip:].float())[0], z)
    for rule, alpha in itertools.product(RULES, (0, 0.5, 1)):
        logs = torch.log_softmax(blend(z, m, alpha, rule), -1)
        own = [float(logs[i - skip - 1, ids[i]]) for i in range(begin, len(ids))]
        place = found["alpha"].index(alpha)
        assert found[rule][place] == pytest.approx(math.exp(-np.mean(own)), rel=1e-3)
    assert found["tokens"] == len(ids) - begin and 0 < found["mean_auto_alpha"] < 1 and found["auto"] > 1


@pytest.mark.parametrize(("question", "text", "words"), [
    ("", "So.", "Type a question and an answer"), ("Why?", " ", "Type a question and an answer"),
    ("Why?", "so " * 600, "at most 512")])
def test_the_explorer_refuses_what_it_cannot_measure(chat, question, text, words):
    with pytest.raises(UserError, match=words):
        chat.explore(question, text)


def test_log_probabilities_have_the_usual_shape(chat):
    answer = write(chat)
    found = json.loads(json.dumps(logprobs(answer.tokens)))["content"]
    assert len(found) == len(answer.tokens)
    for entry, token in zip(found, answer.tokens, strict=True):
        assert entry["token"] == token["text"] and bytes(entry["bytes"]).decode() == token["text"] and entry["id"] == token["id"]
        assert math.exp(entry["logprob"]) == pytest.approx(token["blended"])
        assert math.exp(entry["base_logprob"]) == pytest.approx(token["base"])
        tops, candidates = entry["top_logprobs"], token["candidates"]
        assert [top["token"] for top in tops] == [c["text"] for c in candidates]
        assert [math.exp(top["logprob"]) for top in tops] == pytest.approx([c["blended"] for c in candidates])


def test_a_model_without_a_store_refuses_the_search(chat):
    other = copy.copy(chat)
    other.model = copy.copy(chat.model)
    other.model.store = None
    with pytest.raises(UserError, match="no datastore"):
        next(other.write(other.begin("?", rule=KNN)))


@pytest.mark.parametrize("temperature", [0, 1])
def test_where_no_other_token_has_a_vote_a_run_may_come_twice(chat, temperature):
    answer = write(chat, rule=KNN, alpha=1, temperature=temperature, no_repeat=1, knn_k=1, max_new_tokens=40)
    assert all(token["memory"] > 0 for token in answer.tokens)


def test_the_neighbours_named_are_the_entries_at_those_distances(chat, keys):
    answer = write(chat)
    ids = chat.model.base.encode(chat.prompt(QUESTION, [], 12))
    for token in answer.tokens:
        state = chat.model.base.hidden(torch.tensor([ids]))[0, -1].float().numpy()
        distances, entries = zip(*token["neighbours"], strict=True)
        assert ((keys[list(entries)] - state) ** 2).sum(1) == pytest.approx(distances, rel=0.02) and len(set(entries)) == 4
        ids.append(token["id"])


def test_a_passage_of_an_answer_begins_no_earlier_than_the_answer(chat):
    inside = 0
    for entry in range(0, len(chat.store), 50):
        ids = encode_row(chat.model.base, chat.template, rows_of(chat.store)[chat.store.example[entry]])
        before = chat.passage(entry)["before"]
        said = chat.model.base.tokenizer.decode(ids[:int(chat.store.position[entry]) + 1], skip_special_tokens=True)
        said = said.partition("\nAnswer:")[2]
        if len(said) > 1:
            assert said.endswith(before.removeprefix("… ")) and before.startswith("… ") == (before != said)
            inside += 1
    assert inside > 20


@pytest.mark.parametrize("words", ["", "\nQuestion: What else?", " \n"], ids=["end", "next question", "blank"])
def test_an_answer_that_ends_at_once_has_no_text_and_is_traced(chat, monkeypatch, words):
    base = chat.model.base
    drawn = iter([*base.encode(words)[1:], base.eos])
    monkeypatch.setattr("generation.sample", lambda *_: next(drawn))
    answer = write(chat)
    assert answer.text == "" and all(len(token["neighbours"]) == 4 for token in answer.tokens)


def test_the_explorers_gate_reads_the_text_token_by_token(chat):
    text, model = "Your boss may not.", chat.model
    prompt, ids = (model.base.encode(f"Question: {QUESTION}\nAnswer:{end}") for end in ("", " " + text))
    ids, skip, evidence, logs = [*ids, model.base.eos], model.skipped(ids), Evidence(), []
    with torch.no_grad():
        for place in range(skip + 1, len(ids)):
            hidden = model.base.hidden(torch.tensor([ids[:place]]))[0, skip:]
            own = model.base.logits(hidden[-1]).log_softmax(-1)
            memory = model.decoder.log_probabilities(model.decoder.features(hidden[None].float())[0, -1], own)
            alpha = float(model.gate.alpha(opinions(own, memory).numpy(), evidence.means))
            evidence.add(float(memory[ids[place]] - own[ids[place]]))
            logs.append(float(blend(own, memory, alpha, "probabilities")[ids[place]]))
    assert chat.explore(QUESTION, text)["auto"] == pytest.approx(math.exp(-np.mean(logs[len(prompt) - skip - 1:])), rel=1e-3)


def test_a_training_whose_neighbours_no_slider_can_name_is_chatted_with_all_the_same(chat):
    other = copy.copy(chat)
    other.metrics, other.chosen = {**chat.metrics, "k": 1000}, {**chat.chosen, "knn_temperature": 1e-5}
    for one, expected in ((other, (256, 1e-3)), (chat, (8, chat.chosen["knn_temperature"]))):
        settings = one.begin("?").settings
        assert (settings.knn_k, settings.knn_temperature) == expected


@pytest.mark.parametrize(("rule", "expected"), [("logits", 0.25), ("probabilities", 0.75), ("auto", 0.75), (KNN, 0.75)])
def test_the_alpha_of_a_rule_is_the_one_that_training_chose_for_its_mixture(chat, rule, expected):
    other = copy.copy(chat)
    other.chosen = {**chat.chosen, "alpha_logits": 0.25, "alpha_probabilities": 0.75}
    assert other.chosen_alpha(rule) == expected


def test_the_log_of_nothing_is_a_number_that_json_knows():
    token = {"id": 1, "text": "a", "base": 0.0, "memory": 0.0, "blended": 0.0, "alpha": 1.0, "candidates": []}
    assert -110 < json.loads(json.dumps(logprobs([token]), allow_nan=False))["content"][0]["logprob"] < -100
