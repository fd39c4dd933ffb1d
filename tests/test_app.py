"""The chat's parts in this process: requests, answers, prompts and the passages that memories come from."""

import copy
import html
import inspect
import itertools
import json
import math
import re
import shlex

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import ROWS

import app
import train_memory_decoder
from command import UserError
from datastore import open_keys
from generation import RULES
from memory_decoder import read_manifest
from texts import encode_row

# Every control. Drawn with a seed, since the best first token of so small a memory may be the end.
GOOD = {"alpha": 0.5, "temperature": 2, "top_k": 200, "max_new_tokens": 12, "k": 4, "rule": "logits", "seed": 3, "no_repeat": 0}
QUESTION = "Can my boss refuse to pay me overtime?"
PASSAGE = re.compile(r'<div class="passage">(?:… )?(.*?)<mark>(.*?)</mark>(.*?)'
                     r"<small>(.*?) · squared distance (.*?)</small></div>", re.DOTALL)


@pytest.fixture(scope="module")
def chat(trained):
    return app.Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


def answers(chat, message=QUESTION, history=(), **changes):
    return list(chat.answer(message, list(history), **{**GOOD, **changes}))


def final(chat, *arguments, **changes):
    """The text of a whole answer, which may not be the words that stand for none."""
    text = answers(chat, *arguments, **changes)[-1][0]
    assert text and app.NO_ANSWER not in text
    return text


def said(role, content):
    return {"role": role, "content": content}


def blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("write", [str, lambda text: [text], lambda text: blocks(text), lambda text: blocks(*text)],
                         ids=["text", "list of texts", "one block", "block per letter"])
def test_turns_are_read_from_every_form_of_history(write):
    history = [said("user", write("one")), said("assistant", write("two")), said("user", write("three")),
               said("assistant", write("four"))]
    assert app.turns_of(history) == [("one", "two"), ("three", "four")]


def test_a_question_without_an_answer_is_no_turn():
    assert app.turns_of(None) == app.turns_of([]) == app.turns_of([said("user", "one")]) == []
    assert app.turns_of([said("assistant", "hello"), said("user", "one"), said("assistant", "two")]) == [("one", "two")]
    assert app.turns_of([said("user", "lost"), said("user", "one"), said("assistant", "two")]) == [("one", "two")]
    assert app.turns_of([said("user", "one"), said("assistant", app.NO_ANSWER)]) == []


def test_a_good_request_passes_at_both_ends_of_every_range():
    for end in (0, 1):
        for rule in RULES:
            app.check_request("?", rule, **{name: bounds[end] for name, bounds in app.RANGES.items()})


@pytest.mark.parametrize("message", ["", "  \n\t", None, 3, ["text"]])
def test_a_message_without_text_is_refused_in_one_sentence(message):
    with pytest.raises(UserError, match=r"^Type a question first\.$"):
        app.check_request(message, "logits", alpha=0.5)


@pytest.mark.parametrize("rule", ["", "Logits", None, 1, ["logits"]])
def test_an_unknown_rule_is_refused_with_the_names_of_those_known(rule):
    with pytest.raises(UserError, match=r"^[^\n]*logits, probabilities or auto[^\n]*\.$"):
        app.check_request("?", rule, alpha=0.5)


@pytest.mark.parametrize("name", app.RANGES)
@pytest.mark.parametrize("change", [-1e-6, math.nan, math.inf, -math.inf, None, "1", [1]])
def test_a_value_that_no_slider_gives_is_refused_by_name(name, change):
    low, high = app.RANGES[name]
    bad = [low + change, high - change] if change == -1e-6 else [change]
    for value in bad:
        with pytest.raises(UserError, match=rf"^{name} must be from {low} to {high}, not [^\n]*\.$"):
            app.check_request("?", "logits", **{name: value})


def test_merged_tokens_keep_all_text_and_the_changes_that_fit():
    tokens = [("", 0.1), ("", 0.2), ("a", 0.3), ("b c", -0.5), ("", 0.9), ("d", 0.8), ("", 0.4)]
    merged = app.merge_tokens(tokens)
    assert [text for text, _ in merged] == ["a", "b c", "d"]
    assert [change for _, change in merged] == pytest.approx([0.6, -0.5, 1.0])
    assert app.merge_tokens([]) == []


def test_an_answer_streams_growing_prefixes_and_passages_come_last(chat):
    steps = answers(chat)
    texts = [text for text, *_ in steps]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert len(set(texts)) > 5 and app.NO_ANSWER not in texts[-1]
    assert all("".join(token for token, _ in tokens) == text for text, tokens, *_ in steps)
    assert all(shown == gr.skip() for *_, shown in steps[:-1])
    assert 1 <= len(PASSAGE.findall(steps[-1][3])) <= GOOD["k"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0, 0.4, 1])
def test_an_answer_is_what_the_model_streams_after_the_earlier_turns(chat, alpha, rule):
    history = [said("user", blocks("May I go?")), said("assistant", blocks("You may."))]
    prompt = f"Question: May I go?\nAnswer: You may.\nQuestion: {QUESTION}\nAnswer:"
    expected = chat.model.stream(prompt, alpha, 2, 200, 12, rule, 3)
    assert final(chat, f"  {QUESTION}\n", history, alpha=alpha, rule=rule) == "".join(step.text for step in expected)


@pytest.mark.parametrize("change", [
    {"alpha": 0.1}, {"temperature": 0.5}, {"top_k": 5}, {"max_new_tokens": 5}, {"rule": "probabilities"}, {"rule": "auto"},
    {"seed": 4}, {"no_repeat": 1}], ids=str)
def test_every_control_changes_the_answer_to_what_the_model_streams_under_it(chat, change):
    given = {name: value for name, value in (GOOD | change).items() if name != "k"}  # K is of the passages
    steps = chat.model.stream(chat.prompt(QUESTION, [], 12), **given)
    assert final(chat, **change) == "".join(step.text for step in steps) != final(chat)


def test_the_page_hands_its_controls_over_in_the_order_in_which_answer_takes_them(chat):
    config = app.build_page(chat, app.Options()).get_config_file()
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    _, message, history, *controls = inspect.signature(app.Chat.answer).parameters
    assert (message, history, controls) == ("message", "history", list(GOOD))
    handed = [[names[part] for part in call["inputs"]] for call in config["dependencies"]]
    handed = [inputs for inputs in handed if set(inputs) & set(controls)]
    assert len(handed) > 1 and all(inputs[2:] == controls for inputs in handed)  # by enter, by retry, through the API


@pytest.mark.parametrize("words", ["", "\nQuestion: What else?", " \n"], ids=["end", "next question", "blank"])
def test_an_answer_that_ends_at_once_is_said_to_be_none(chat, monkeypatch, words):
    base = chat.model.base
    drawn = iter([*base.encode(words)[1:], base.eos])
    monkeypatch.setattr("generation.sample", lambda *_: next(drawn))
    *before, (text, tokens, alphas, passages) = answers(chat)
    assert text == app.NO_ANSWER and all(earlier == "" for earlier, *_ in before)
    assert tokens == alphas == [] and PASSAGE.findall(passages)


def base_greedy(base, ids, count):
    """[(token, its probability)] of the base model alone, read from the beginning for every token."""
    found = []
    while len(found) < count and (not found or found[-1][0] not in base.ends):
        chances = torch.softmax(base.model(torch.tensor([ids])).logits[0, -1].float(), -1)
        found.append((int(chances.argmax()), float(chances.max())))
        ids = [*ids, found[-1][0]]
    return found


@pytest.mark.parametrize("rule", RULES)
def test_alpha_0_is_the_bases_own_greedy_output_token_for_token(chat, rule):
    model, prompt = chat.model, chat.prompt(QUESTION, [("May I go?", "You may.")], 24)
    with torch.no_grad():
        expected = base_greedy(model.base, model.base.encode(prompt), 24)
    steps = list(model.stream(prompt, 0, 0, 50, 24, rule))
    assert len(steps) > 12 and [step.token for step in steps] == [token for token, _ in expected[:len(steps)]]
    assert [step.base for step in steps] == pytest.approx([chance for _, chance in expected[:len(steps)]], rel=1e-2)
    assert [step.blended for step in steps] == pytest.approx([step.base for step in steps], rel=1e-4)


def test_a_bad_request_raises_an_error_that_the_page_shows(chat):
    for changes in ({"message": " "}, {"alpha": 1.5}, {"rule": "mean"}, {"message": "why " * 600}, {"no_repeat": 51}):
        with pytest.raises(gr.Error) as error:
            answers(chat, **changes)
        assert str(error.value).count("\n") == 0 and error.value.print_exception is False


def test_passages_stand_in_the_training_rows(chat, rows_file):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    texts = {row["Title"]: "".join(chat.template.render(row)) for row in rows}
    found = PASSAGE.findall(answers(chat, max_new_tokens=40, k=32)[-1][3])
    assert len(found) > 8 and len(texts) == len(rows)
    for before, token, after, title, _ in found:
        assert html.unescape(before + token.replace("(end)", "") + after) in texts[html.unescape(title)]


def nearest_passages(keys, chat, states, k):
    """Slow twin of Chat.passages: (title, distance) pairs by distances to every key."""
    best = {}
    for state in states:
        distances = ((keys - state) ** 2).sum(1)
        for entry in np.argsort(distances, kind="stable")[:k]:
            example = int(chat.store.example[entry])
            best[example] = min(best.get(example, np.inf), float(distances[entry]))
    nearest = sorted(best.items(), key=lambda pair: pair[1])[:k]
    return [(chat.store.rows[example]["Title"][:120], distance) for example, distance in nearest]


def test_passages_are_the_nearest_of_each_example(chat, trained):
    (file,) = trained.glob("stages/datastore-*/keys.f16")
    keys = open_keys(file, chat.model.base.width).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=(3, keys.shape[1])).astype(np.float32)
    states = keys[[50, 400, 900]] + 0.1 * noise
    for k in (1, 5, 32):
        html_text = chat.passages(torch.from_numpy(states), k)
        found = [(html.unescape(title), float(distance)) for *_, title, distance in PASSAGE.findall(html_text)]
        expected = nearest_passages(keys, chat, states, k)
        assert [title for title, _ in found] == [title for title, _ in expected]
        assert [distance for _, distance in found] == pytest.approx([distance for _, distance in expected], rel=0.02)


def test_a_marked_token_is_the_one_that_the_entry_remembers(chat):
    for entry in range(0, len(chat.store), 77):
        ((before, token, _, title, distance),) = PASSAGE.findall(chat.passage(0.25, entry))
        remembered = chat.model.base.tokenizer.decode([int(chat.store.values[entry])], skip_special_tokens=True)
        assert html.unescape(token) == (remembered or "(end)") and distance == "0.25"
        row = chat.store.rows[chat.store.example[entry]]
        assert html.unescape(before) + remembered in "".join(chat.template.render(row))
        assert html.unescape(title) == row["Title"]


def test_the_end_of_a_row_is_shown_in_words(chat):
    ids = [encode_row(chat.model.base, chat.template, row) for row in chat.store.rows]
    last = [n for n, (row, position) in enumerate(zip(chat.store.example, chat.store.position, strict=True))
            if position == len(ids[row]) - 2]
    assert len(last) == len(ids)
    assert all(PASSAGE.fullmatch(chat.passage(1.0, entry))[2] == "(end)" for entry in last)


def test_html_in_a_source_text_is_escaped(chat):
    other = copy.copy(chat)
    other.store = copy.copy(chat.store)
    evil = {"Title": "<b>Title & co</b>: <i>", "Question": "<script>alert('x')</script> & <img src=x onerror=\"y\"> " * 4,
            "Answer": "<script>alert('x')</script> & <img src=x onerror=\"y\"> " * 8}
    other.store.rows = [evil] * len(chat.store.rows)
    near = [n for n, position in enumerate(chat.store.position) if position < 100][::40]
    assert len(near) > 3
    for entry in near:
        passage = other.passage(1.0, entry)
        assert "&lt;" in passage and "<b>" not in passage and "<script" not in passage and "<img" not in passage
        before, token, after, title, _ = PASSAGE.fullmatch(passage).groups()
        assert html.unescape(before + token + after) in "".join(chat.template.render(evil))
        assert html.unescape(title) == evil["Title"]
        assert not set("<>\"'") & set(before + token + after + title)


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
    prompt = len(chat.model.base.encode(chat.prompt(QUESTION, [], 1)))
    room = chat.model.base.max_positions - prompt
    turns = [said("user", "Why?"), said("assistant", "So.")]
    assert next(chat.answer(QUESTION, turns, **{**GOOD, "max_new_tokens": room}))
    with pytest.raises(gr.Error, match="shorten the question"):
        next(chat.answer(QUESTION, turns, **{**GOOD, "max_new_tokens": room + 1}))


@pytest.mark.parametrize("max_turns", [0, 1])
def test_an_answer_reads_no_more_turns_than_allowed(chat, monkeypatch, max_turns):
    monkeypatch.setattr(chat, "max_turns", max_turns)
    history = [said("user", "one"), said("assistant", "two"), said("user", "three"), said("assistant", "four")]
    assert final(chat, history=history) == final(chat, history=history[len(history) - 2 * max_turns:])
    prompts = []
    monkeypatch.setattr(chat, "prompt", lambda message, turns, room: prompts.append(turns) or chat.template.prompt(message, turns))
    answers(chat, history=history)
    assert prompts == [[("one", "two"), ("three", "four")][2 - max_turns:]]


@pytest.mark.parametrize("arguments", [[], ["--demo"], ["--model_dir", "other folder/of mine"]],
                         ids=["plain", "demo", "other folder"])
def test_the_untrained_page_names_the_command_that_trains_what_the_page_opens(arguments):
    options = app.parse_options(arguments)
    config = app.untrained_page(options).get_config_file()
    text = "\n".join(part["props"]["value"] for part in config["components"] if part["type"] == "markdown")
    command = shlex.split(re.search(r"^ {4}(python train_memory_decoder\.py.*)$", text, re.MULTILINE)[1])
    assert options.model_dir in text and ("add `--demo`" in text) == (arguments != ["--demo"])
    assert train_memory_decoder.parse_options(command[2:]).output_dir == options.model_dir


def test_demo_opens_what_training_with_demo_writes():
    options = app.parse_options(["--demo"])
    assert options.demo and options.model_dir == train_memory_decoder.parse_options(["--demo"]).output_dir
    assert options.base_model is None  # the manifest names it
    plain = app.parse_options([])
    assert not plain.demo and (plain.model_dir, plain.base_model) == ("trained_models", None)


def test_a_named_folder_goes_before_the_default_of_demo():
    assert app.parse_options(["--demo", "--model_dir", "mine"]).model_dir == "mine"


def test_the_page_starts_with_the_rule_and_the_alpha_that_training_chose(chat):
    for rule, alpha in (("logits", "alpha_logits"), ("probabilities", "alpha_probabilities"), ("auto", "alpha_probabilities")):
        other = copy.copy(chat)
        other.chosen = {**chat.chosen, "alpha_logits": 0.25, "alpha_probabilities": 0.75}
        config = app.build_page(other, app.Options(rule=rule, temperature=0.3, no_repeat=6)).get_config_file()
        parts = {part["props"].get("elem_id"): part["props"] for part in config["components"]}
        assert parts["rule"]["value"] == rule and parts["alpha"]["value"] == other.chosen[alpha]
        assert parts["temperature"]["value"] == 0.3 and parts["no_repeat"]["value"] == 6
