"""The chat: its parts in this process, its API through gradio_client, and how app.py ends when it cannot start."""

import collections
import copy
import html
import itertools
import json
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, make_decoder, make_tiny_gemma, run_script, with_any_topic
from gradio_client import Client
from gradio_client.exceptions import AppError

import app
import train_memory_decoder
from datastore import Template, UserError, open_keys
from generation import RULES, MemoryAugmentedLM
from memory_decoder import read_manifest

LAUNCH = gr.Blocks.launch
GOOD = {"alpha": 0.5, "temperature": 0, "top_k": 50, "max_new_tokens": 12, "k": 4, "rule": "logits"}
QUESTION = "Can my boss refuse to pay me overtime?"
TOPIC = re.compile(r"<li>(.*?) <small>(\d+) of \d+ tokens</small></li>")
PASSAGE = re.compile(r'<div class="passage">(?:… )?(.*?)<mark>(.*?)</mark>(.*?)'
                     r"<small>(.*?) · squared distance (.*?)</small></div>", re.DOTALL)


@contextmanager
def running_app(folder, log):
    """The address of `app.py --model_dir folder`, started as a user would and killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--model_dir", str(folder), "--server_port", str(port), "--device", "cpu"]
    with open(log, "w") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            wait_for(process, f"http://127.0.0.1:{port}/", log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.kill()


def wait_for(process, address, log):
    give_up = time.monotonic() + 240
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, f"app.py does not answer: {log.read_text()}"
        try:
            return httpx.get(address, timeout=5).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def chat(trained):
    return app.Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with running_app(trained, tmp_path_factory.mktemp("app") / "log.txt") as address:
        yield address


@pytest.fixture(scope="module")
def connection(server):
    client = Client(server, verbose=False, analytics_enabled=False)
    yield client
    client.close()


@pytest.fixture
def client(connection):
    """A client whose session begins with no history."""
    connection.reset_session()
    return connection


def ask(client, message=QUESTION, **changes):
    return client.predict(message=message, **{**GOOD, **changes}, api_name="/chat")


def answers(chat, message=QUESTION, history=(), **changes):
    return list(chat.answer(message, list(history), **{**GOOD, **changes}))


def said(role, content):
    return {"role": role, "content": content}


def blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


def launch_and_fail(page, **settings):
    LAUNCH(page, **settings, prevent_thread_lock=True)
    page.close()
    pytest.fail("app.py opened its page")


def main_in_process(monkeypatch, capsys, *arguments):
    """(exit code, lines of stderr that are not a progress bar) of app.py's main(), which must not open its page."""
    monkeypatch.setattr(gr.Blocks, "launch", launch_and_fail)
    monkeypatch.setattr(sys, "argv", ["app.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return ended.value.code, [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]


def assert_one_error(code, lines, *words):
    assert code == 2 and len(lines) == 1, (code, lines)
    assert lines[0].startswith("error: ") and lines[0].endswith(".")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def copied(trained, tmp_path):
    """The artefacts without the stages, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("stages"))


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
    assert len(set(texts)) > 5 and texts[-1]
    assert all("".join(token for token, _ in tokens) == text for text, tokens, *_ in steps)
    assert all(shown == gr.skip() for *_, shown in steps[:-1])
    assert 1 <= len(PASSAGE.findall(steps[-1][3])) <= GOOD["k"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0, 0.4, 1])
def test_an_answer_is_what_the_model_streams_after_the_earlier_turns(chat, alpha, rule):
    history = [said("user", blocks("May I go?")), said("assistant", blocks("You may."))]
    prompt = f"Question: May I go?\nAnswer: You may.\nQuestion: {QUESTION}\nAnswer:"
    expected = chat.model.stream(prompt, alpha, 0, 50, 12, rule, chat.template.stops)
    assert answers(chat, f"  {QUESTION}\n", history, alpha=alpha, rule=rule)[-1][0] == "".join(step.text for step in expected)


def test_a_bad_request_raises_an_error_that_the_page_shows(chat):
    for changes in ({"message": " "}, {"alpha": 1.5}, {"rule": "mean"}, {"message": "why " * 600}):
        with pytest.raises(gr.Error) as error:
            answers(chat, **changes)
        assert str(error.value).count("\n") == 0 and error.value.print_exception is False


def test_passages_stand_in_the_training_rows(chat, rows_file):
    template = Template(chat.template.pattern)
    texts = [template.render(json.loads(line)) for line in rows_file.read_text().splitlines()]
    found = PASSAGE.findall(answers(chat, max_new_tokens=40, k=32)[-1][3])
    assert len(found) > 8
    for before, token, after, title, _ in found:
        passage = html.unescape(before + token.replace("(end)", "") + after)
        assert any(passage in text and text.startswith(html.unescape(title)) for text in texts), passage


def nearest_passages(keys, chat, states, k):
    """Slow twin of Chat.passages: (title, distance) pairs by distances to every key."""
    best = {}
    for state in states:
        distances = ((keys - state) ** 2).sum(1)
        for entry in np.argsort(distances, kind="stable")[:k]:
            example = int(chat.store.example[entry])
            best[example] = min(best.get(example, np.inf), float(distances[entry]))
    nearest = sorted(best.items(), key=lambda pair: pair[1])[:k]
    return [(chat.store.texts[example].split("\n")[0][:120], distance) for example, distance in nearest]


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
    for entry in (0, 77, len(chat.store) - 1):
        ((before, token, _, _, distance),) = PASSAGE.findall(chat.passage(0.25, entry))
        remembered = chat.model.base.tokenizer.decode([int(chat.store.values[entry])], skip_special_tokens=True)
        assert html.unescape(token) == (remembered or "(end)") and distance == "0.25"
        text = chat.store.texts[chat.store.example[entry]]
        assert html.unescape(before) + remembered in text


@pytest.fixture
def led(chat):
    """The chat with a memory that has topics, drawn at random, one for every stored text."""
    decoder = with_any_topic(make_decoder(topic=len(chat.store.texts)))
    decoder.topic.entry.copy_(torch.from_numpy(np.unique(chat.store.example, return_index=True)[1]))
    other = copy.copy(chat)
    other.model = MemoryAugmentedLM(chat.model.base, decoder, chat.template.header)
    return other


def test_an_answer_names_the_texts_whose_topics_led_it(led):
    *_, (text, *_, sources) = answers(led)
    found = [(html.unescape(title), int(count)) for title, count in TOPIC.findall(sources)]
    steps = list(led.model.stream(led.prompt(QUESTION, [], 12), 0.5, 0, 50, 12, "logits", led.template.stops))
    ids = [*led.model.base.encode(led.prompt(QUESTION, [], 12)), *(step.token for step in steps[:-1])]
    examples = led.store.example[led.model.topics(ids)][-len(steps):]
    numbers = collections.Counter(led.store.texts[example].split("\n")[0] for example in examples)
    assert text and found and all(numbers[title] == count for title, count in found)
    assert sum(count for _, count in found) == sum(sorted(numbers.values(), reverse=True)[:3])
    assert PASSAGE.findall(sources)


def test_a_memory_without_topics_names_no_texts_that_led_it(chat):
    assert 'class="topics"' not in answers(chat)[-1][3]


def test_html_in_a_source_text_is_escaped(chat):
    other = copy.copy(chat)
    other.store = copy.copy(chat.store)
    evil = "<b>Title & co</b>: <i>\n" + "<script>alert('x')</script> & <img src=x onerror=\"y\"> " * 8
    other.store.texts = [evil] * len(chat.store.texts)
    for entry in (20, 60, 90):
        passage = other.passage(1.0, entry)
        assert "&lt;" in passage and "<b>" not in passage and "<script" not in passage and "<img" not in passage
        before, token, after, title, _ = PASSAGE.fullmatch(passage).groups()
        assert html.unescape(before + token + after) in evil and html.unescape(title) == evil.split("\n")[0]
        assert not set("<>\"'") & set(before + token + after + title)


def test_a_prompt_is_the_beginning_of_a_training_text(chat):
    for row in ROWS[:5]:
        assert chat.template.render(row).endswith(chat.prompt(row["Question"], [], 10) + " " + row["Answer"])


def test_a_prompt_drops_the_oldest_turns_until_the_rest_fits(chat):
    base = chat.model.base
    turns = [(f"Question number {i} of some length?", f"Answer number {i} of some length.") for i in range(12)]
    kept = []
    for most in (10, 100, 200, 300, 400):
        texts = ["".join(f"Question: {q}\nAnswer: {a}\n" for q, a in turns[i:]) + "Question: Why?\nAnswer:" for i in range(13)]
        fitting = [text for text in texts if len(base.encode(text)) + most <= base.max_positions]
        assert chat.prompt("Why?", turns, most) == fitting[0]
        kept.append(len(fitting) - 1)
    assert kept == sorted(kept, reverse=True) and 12 > kept[0] > kept[-1] > 0


def test_a_message_that_fits_to_the_last_position_is_answered(chat):
    prompt = len(chat.model.base.encode(chat.prompt(QUESTION, [], 1)))
    room = chat.model.base.max_positions - prompt
    turns = [said("user", "Why?"), said("assistant", "So.")]
    assert next(chat.answer(QUESTION, turns, **{**GOOD, "max_new_tokens": room}))
    with pytest.raises(gr.Error, match="shorten the question"):
        next(chat.answer(QUESTION, turns, **{**GOOD, "max_new_tokens": room + 1}))


@pytest.mark.parametrize("arguments", [[], ["--demo"], ["--model_dir", "other folder/of mine"]],
                         ids=["plain", "demo", "other folder"])
def test_the_untrained_page_names_the_command_that_trains_what_the_page_opens(arguments):
    options = app.parse_options(arguments)
    config = app.untrained_page(options).get_config_file()
    text = "\n".join(part["props"]["value"] for part in config["components"] if part["type"] == "markdown")
    command = shlex.split(re.search(r"^ {4}(python train_memory_decoder\.py.*)$", text, re.MULTILINE)[1])
    assert options.model_dir in text
    assert train_memory_decoder.parse_options(command[2:]).output_dir == options.model_dir


def test_demo_opens_what_training_with_demo_writes():
    options, demo = app.parse_options(["--demo"]), train_memory_decoder.parse_options(["--demo"])
    assert options.demo and (options.model_dir, options.base_model) == (demo.output_dir, demo.base_model)
    plain = app.parse_options([])
    assert not plain.demo and (plain.model_dir, plain.base_model) == ("trained_models", None)


def test_a_named_folder_goes_before_the_default_of_demo():
    assert app.parse_options(["--demo", "--model_dir", "mine"]).model_dir == "mine"


def test_the_api_has_one_parameter_for_the_message_and_each_control(client):
    (endpoint,) = client.view_api(return_format="dict", print_info=False)["named_endpoints"].items()
    assert endpoint[0] == "/chat"
    assert [parameter["parameter_name"] for parameter in endpoint[1]["parameters"]] == ["message", *GOOD, "seed"]


def test_an_answer_through_the_api_comes_with_tokens_and_passages(client, chat):
    text, tokens, alphas, passages = ask(client)
    assert text and "".join(token for token, _ in tokens) == text
    assert [token for token, _ in alphas] == [token for token, _ in tokens] and {alpha for _, alpha in alphas} == {GOOD["alpha"]}
    titles = {source.split("\n")[0][:120] for source in chat.store.texts}
    assert {html.unescape(title) for *_, title, _ in PASSAGE.findall(passages)} <= titles and "passage" in passages


def test_an_answer_through_the_api_streams(client):
    job = client.submit(message=QUESTION, **GOOD, api_name="/chat")
    final = job.result()[0]
    texts = [output[0] for output in job.outputs()]
    assert len(set(texts)) > 2 and texts[-1] == final
    assert all(final.startswith(text) for text in texts)


@pytest.mark.parametrize("rule", RULES)
def test_greedy_answers_repeat_and_depend_on_alpha(client, rule):
    given = []
    for alpha in (0, 1, 0, 1):
        client.reset_session()
        given.append(ask(client, alpha=alpha, rule=rule)[0])
    assert given[:2] == given[2:] and given[0] != given[1]


def test_auto_chooses_each_tokens_alpha_whatever_the_slider_says(client):
    first = ask(client, alpha=0, rule="auto")
    client.reset_session()
    second = ask(client, alpha=1, rule="auto")
    shares = [alpha for _, alpha in first[2]]
    assert first[0] == second[0] and all(0 <= share <= 1 for share in shares) and len(set(shares)) > 1
    # Not to the last bit: matrix products add in another order when memory is aligned otherwise.
    assert [alpha for _, alpha in second[2]] == pytest.approx(shares, abs=1e-5)


def test_a_memory_without_a_gate_offers_no_auto_and_refuses_it_in_words(trained):
    manifest = read_manifest(trained)
    del manifest["chosen"]["gate"]
    old = app.Chat.open(app.Options(model_dir=str(trained), device="cpu"), manifest)
    assert old.rules == list(RULES)
    with pytest.raises(gr.Error, match="no automatic alpha"):
        answers(old, rule="auto")


def test_a_seed_repeats_an_answer_and_no_seed_draws_anew(client):
    def drawn(**seed):
        client.reset_session()
        return ask(client, temperature=2, top_k=200, max_new_tokens=40, **seed)[0]
    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert drawn(seed=None) != drawn()


@pytest.mark.parametrize(("changes", "words"), [
    ({"seed": -1}, "seed"), ({"seed": 2**31}, "seed"), ({"seed": "1.5"}, "seed"), ({"seed": "9" * 5000}, "seed"),
    ({"alpha": 1.01}, "1"), ({"alpha": -0.5}, "0"), ({"temperature": 3}, "2"), ({"max_new_tokens": 100_000}, "1000"),
    ({"k": 0}, "1"), ({"top_k": 0}, "1"), ({"rule": "mean"}, "probabilities"),
    ({"message": ""}, "Type a question first."), ({"message": " \n"}, "Type a question first."),
    ({"message": "Why? " * 600}, "shorten the question")])
def test_a_bad_request_through_the_api_is_answered_in_words(client, changes, words):
    with pytest.raises(AppError) as error:
        ask(client, **changes)
    text = str(error.value)
    assert words in text and "Traceback" not in text and "show_error" not in text and "\n" not in text
    assert ask(client)[0]


def test_a_second_app_on_the_same_port_ends_with_one_line(server, trained):
    port = server.rstrip("/").rpartition(":")[2]
    done = run_script("app.py", "--model_dir", trained, "--server_port", port, "--device", "cpu")
    assert_one_error(done.code, [line for line in done.err.splitlines() if line and "%|" not in line], port, "--server_port")


def test_a_flipped_byte_in_any_artefact_ends_with_one_line(copied, monkeypatch, capsys):
    names = list(json.loads((copied / "config.json").read_text())["files"])
    assert len(names) >= 5
    for name in names:
        whole = (copied / name).read_bytes()
        half = len(whole) // 2
        (copied / name).write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:])
        assert_one_error(*main_in_process(monkeypatch, capsys, "--model_dir", copied), name, "train again")
        (copied / name).write_bytes(whole)


def test_a_missing_artefact_ends_with_one_line(copied, monkeypatch, capsys):
    for name in json.loads((copied / "config.json").read_text())["files"]:
        (copied / name).rename(copied / "away")
        assert_one_error(*main_in_process(monkeypatch, capsys, "--model_dir", copied), name, "missing")
        (copied / "away").rename(copied / name)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"files": []}', '{"files": {}}', "\x00\xff"])
def test_a_damaged_manifest_ends_with_one_line(copied, monkeypatch, capsys, text):
    (copied / "config.json").write_text(text, encoding="latin-1")
    assert_one_error(*main_in_process(monkeypatch, capsys, "--model_dir", copied), "config.json", "train again")


def test_another_base_model_ends_with_one_line(trained, tmp_path, monkeypatch, capsys):
    other = make_tiny_gemma(tmp_path / "other", seed=1)
    ended = main_in_process(monkeypatch, capsys, "--model_dir", trained, "--base_model", other, "--device", "cpu")
    assert_one_error(*ended, str(other), "--base_model")


def test_the_right_base_model_at_another_place_is_accepted(trained, tiny_gemma, tmp_path):
    moved = shutil.copytree(tiny_gemma, tmp_path / "moved")
    options = app.Options(model_dir=str(trained), base_model=str(moved), device="cpu")
    assert app.Chat.open(options, read_manifest(trained)).model.base.name == str(moved)


@pytest.mark.parametrize("max_turns", [0, 1])
def test_an_answer_reads_no_more_turns_than_allowed(chat, monkeypatch, max_turns):
    monkeypatch.setattr(chat, "max_turns", max_turns)
    history = [said("user", "one"), said("assistant", "two"), said("user", "three"), said("assistant", "four")]
    assert answers(chat, history=history)[-1][0] == answers(chat, history=history[len(history) - 2 * max_turns:])[-1][0]
    prompts = []
    monkeypatch.setattr(chat, "prompt", lambda message, turns, room: prompts.append(turns) or chat.template.prompt(message, turns))
    answers(chat, history=history)
    assert prompts == [[("one", "two"), ("three", "four")][2 - max_turns:]]


@pytest.mark.parametrize(("flag", "value"), [("--base_model", "no/such/folder"), ("--device", "abacus"),
                                             ("--server_port", "99999"), ("--temperature", "3.0"), ("--max_turns", "-1")])
def test_a_setting_that_cannot_work_ends_with_one_line(trained, monkeypatch, capsys, flag, value):
    code, lines = main_in_process(monkeypatch, capsys, "--model_dir", trained, flag, value)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and value in lines[0]
