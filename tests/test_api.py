"""The page's endpoints as gradio_client calls them."""

import json
import re

import httpx
import pytest
from conftest import ROOT
from gradio_client import Client
from gradio_client.exceptions import AppError
from runs import stored_rows
from test_chat import QUESTION

import app
import chat as chat_module
from chat import Chat
from generation import AUTO, RULES
from memory_decoder import read_manifest

# Sampled with a seed, since the best first token of such a small memory may be the end.
GOOD = {"alpha": 0.5, "temperature": 2, "top_k": 200, "max_new_tokens": 12, "rule": "logits", "seed": 3, "no_repeat": 0}


@pytest.fixture(scope="module")
def client(address):
    client = Client(address, verbose=False, analytics_enabled=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def chat(trained):
    return Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


def ask(client, message=QUESTION, **changes):
    """(text, tokens with their log probabilities) of an answer that has some text."""
    text, logprobs = client.predict(message=message, **{**GOOD, **changes}, api_name="/chat")
    assert text.strip()
    return text, logprobs["content"]


def ids(content):
    return [entry["id"] for entry in content]


def close_to(entries):
    """Approximate numbers to compare with. Matrix products add in another order when memory is aligned otherwise."""
    return [pytest.approx(entry, rel=1e-3, abs=1e-6) for entry in entries]


def test_there_are_three_endpoints_whose_parameters_have_names_and_descriptions(client):
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {name: [p["parameter_name"] for p in endpoint["parameters"]] for name, endpoint in found.items()}
    assert names == {
        "/chat": ["message", "alpha", "temperature", "top_k", "max_new_tokens", "rule", "seed", "no_repeat", "history"],
        "/candidates": ["message", "tokens", "alpha", "rule", "history"], "/passages": ["message", "tokens", "k", "history"]}
    assert all(endpoint["description"] for endpoint in found.values())


def test_an_answer_streams_and_its_log_probabilities_come_last(client):
    job = client.submit(message=QUESTION, **GOOD, api_name="/chat")
    text, logprobs = job.result()
    outputs = job.outputs()
    texts = [output[0] for output in outputs]
    assert len(set(texts)) > 5 and texts[-1] == text and all(text.startswith(earlier) for earlier in texts)
    assert all(output[1] == {} for output in outputs[:-1]) and len(logprobs["content"]) == len(texts) - 1
    assert "".join(entry["token"] for entry in logprobs["content"]) == text


def test_an_answer_is_the_chats_own_with_its_log_probabilities(client, chat):
    text, content = ask(client, rule="probabilities")
    *_, answer = chat.write(chat.begin(QUESTION, **{**GOOD, "rule": "probabilities"}))
    assert text == answer.text and ids(content) == [token["id"] for token in answer.tokens]
    for entry, expected in zip(content, chat_module.logprobs(answer.tokens)["content"], strict=True):
        assert entry["logprob"] == pytest.approx(expected["logprob"], abs=1e-3) and len(entry["top_logprobs"]) >= 10
        assert max(c["logprob"] for c in entry["top_logprobs"]) == entry["top_logprobs"][0]["logprob"]


def test_a_setting_that_is_not_given_stands_as_the_page_opens_with_it(client, chat):
    text, logprobs = client.predict(message=QUESTION, seed=3, api_name="/chat")
    *_, answer = chat.write(chat.begin(QUESTION, alpha=chat.chosen_alpha("logits"), temperature=0.7, seed=3))
    assert text == answer.text and ids(logprobs["content"]) == [token["id"] for token in answer.tokens]


@pytest.mark.parametrize("rule", RULES)
def test_answers_repeat_and_depend_on_alpha(client, rule):
    given = [ask(client, alpha=alpha, rule=rule)[0] for alpha in (0, 1, 0, 1)]
    assert given[:2] == given[2:] and given[0] != given[1]


def test_auto_chooses_each_tokens_alpha_whatever_alpha_says(client):
    (first, some), (second, others) = (ask(client, alpha=alpha, rule=AUTO) for alpha in (0, 1))
    shares = [entry["alpha"] for entry in some]
    assert first == second and all(0 <= share <= 1 for share in shares) and len(set(shares)) > 1
    assert close_to(shares) == [entry["alpha"] for entry in others]


def test_a_seed_repeats_an_answer_and_no_seed_draws_anew(client):
    def drawn(**seed):
        return ask(client, **{**GOOD, "max_new_tokens": 40, **seed})[0]
    assert drawn(seed=3) == drawn(seed="3") != drawn(seed=4)
    assert drawn(seed=None) != drawn(seed="")


def test_the_earlier_turns_are_read(client, chat):
    history = [["May I go?", "You may."]]
    *_, answer = chat.write(chat.begin(QUESTION, [("May I go?", "You may.")], **GOOD))
    assert ask(client, history=history)[0] == answer.text != ask(client)[0] == ask(client, history=[])[0]


def test_one_call_leaves_no_history_for_the_next(client):
    assert ask(client) == ask(client)


@pytest.mark.parametrize("rule", [*RULES, AUTO])
def test_candidates_are_what_the_log_probabilities_of_an_answer_say_at_that_place(client, rule):
    history = [["May I go?", "You may."]]
    _, content = ask(client, rule=rule, alpha=0.3, history=history)
    for count in (0, 1, 7):
        found = client.predict(message=QUESTION, tokens=ids(content)[:count], rule=rule, alpha=0.3, history=history,
                               api_name="/candidates")
        assert found["alpha"] == pytest.approx(content[count]["alpha"], abs=1e-4)
        candidates = {c["id"]: c for c in found["candidates"]}
        top = {entry["id"]: entry for entry in content[count]["top_logprobs"]}
        assert set(candidates) <= set(top) <= {*candidates, content[count]["id"]}  # the answer's own token may be no candidate
        for token in candidates:
            chances = [candidates[token][name] for name in ("base", "memory", "blended")]
            logs = [top[token][name] for name in ("base_logprob", "memory_logprob", "logprob")]
            assert chances == [pytest.approx(2.718281828459045**log, rel=1e-2, abs=1e-6) for log in logs]
            assert top[token]["token"] == (candidates[token]["text"] if top[token]["bytes"] else "")


def test_more_tokens_than_an_answer_can_have_are_refused_by_their_name(client):
    with pytest.raises(AppError, match="tokens has at most 999 tokens, not 1000"):
        client.predict("Why?", [5] * 1000, api_name="/candidates")


def test_candidates_of_no_tokens_are_those_of_the_first_place_whoever_asks(client):
    found = [client.predict(message=QUESTION, api_name="/candidates", **more)["candidates"] for more in ({}, {"tokens": []}) * 3]
    assert {tuple(c["id"] for c in candidates) for candidates in found} == {tuple(c["id"] for c in found[0])}
    blended = [c["blended"] for c in found[0]]
    assert blended == sorted(blended, reverse=True) and len(blended) >= 10


@pytest.mark.parametrize("count", [0, 3])
def test_passages_are_those_behind_the_token_at_that_place(client, chat, trained, count):
    answer = chat.begin(QUESTION, **GOOD, k=5)
    *_, answer = chat.write(answer)
    token = chat.trace(answer).tokens[count]
    tokens = [token["id"] for token in answer.tokens[:count]]
    found = client.predict(message=QUESTION, tokens=tokens, k=5, api_name="/passages")
    expected = chat.passages(token["neighbours"])
    assert [p["entry"] for p in found] == [p["entry"] for p in expected] and len(found) == 5
    assert [p["distance"] for p in found] == pytest.approx([p["distance"] for p in expected], rel=1e-3)
    assert sum(p["weight"] for p in found) == pytest.approx(1, abs=1e-3)
    assert [(p["title"], p["before"], p["token"]) for p in found] == [(p["title"], p["before"], p["token"]) for p in expected]
    assert all(p["title"] == stored_rows(trained)[p["row"]]["Title"] for p in found)


@pytest.mark.parametrize("tiny", [1e-40, 1e-5])
def test_a_temperature_near_zero_works_as_zero(client, tiny):
    greedy = client.predict(message=QUESTION, **{**GOOD, "temperature": 0}, api_name="/chat")
    found = client.predict(message=QUESTION, **{**GOOD, "temperature": tiny}, api_name="/chat")
    assert ids(found[1]["content"]) == ids(greedy[1]["content"])


FLOATS = {name: float(value) if isinstance(value, int) else value for name, value in GOOD.items()}


def test_whole_numbers_in_float_form_give_the_same_answer(client):
    text, content = ask(client)
    assert ask(client, **FLOATS)[0] == ask(client, seed="3.0", top_k=2e2)[0] == text
    for endpoint, more in (("/candidates", {}), ("/passages", {"k": 5})):
        given = [client.predict(message=QUESTION, tokens=[kind(token) for token in ids(content)[:3]],
                                **{name: kind(value) for name, value in more.items()}, api_name=endpoint) for kind in (int, float)]
        assert given[0] == given[1]


def test_none_for_a_value_means_its_default(client):
    nothing = dict.fromkeys(("alpha", "temperature", "top_k", "max_new_tokens", "rule", "no_repeat", "history"))
    assert ask(client, **nothing) == client_default(client)
    for endpoint, names in (("/candidates", ("tokens", "alpha", "rule", "history")), ("/passages", ("tokens", "k", "history"))):
        given = [client.predict(message=QUESTION, **more, api_name=endpoint) for more in (dict.fromkeys(names), {})]
        assert given[0] == given[1]


def client_default(client):
    text, logprobs = client.predict(message=QUESTION, seed=3, api_name="/chat")
    return text, logprobs["content"]


@pytest.mark.parametrize(("odd", "read"), [("\ud800 hello", "\ufffd hello"), ("\ud83d\ude42 hello", "🙂 hello")], ids=ascii)
def test_halves_of_surrogates_are_read_as_marks_and_pairs_as_characters(address, client, odd, read):
    history = [[odd, f"yes {odd}"]]
    for name, data, more in (("chat", [0.5, 2, 200, 12, "logits", 3, 0, history], {**GOOD, "history": [[read, f"yes {read}"]]}),
                             ("candidates", [None, None, None, history], {"history": [[read, f"yes {read}"]]}),
                             ("passages", [None, None, history], {"history": [[read, f"yes {read}"]]})):
        expected = client.predict(message=read, **more, api_name=f"/{name}")
        last = posted(address, name, json.dumps([odd, *data]))
        assert json.loads(last) == (list(expected) if name == "chat" else [expected])


def posted(address, name, data):
    """The last data that an endpoint returns for a list of JSON values, or its error."""
    url = f"{address}gradio_api/call/{name}"
    event = httpx.post(url, content=f'{{"data": {data}}}', headers={"content-type": "application/json"}).raise_for_status().json()
    with httpx.stream("GET", f"{url}/{event['event_id']}", timeout=60) as answer:
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")][-1]


@pytest.mark.parametrize(("place", "value"), [
    (2, "1e400"), (2, "NaN"), (2, "-Infinity"), (2, "1" + "0" * 30), (2, "true"), (2, "[1]"), (2, '"3"'), (2, "50.5"), (5, "1e400"),
    (5, "NaN"), (5, "{}"), (5, "0.5"), (4, "3"), (4, '["auto"]'), (4, '"\\ud800"'), (3, "12.5"), (6, "0.5"), (0, "true")])
def test_json_that_is_no_such_number_is_refused_in_one_sentence(address, place, value):
    data = ["0.5", "2", "200", "12", '"logits"', "3", "0", "null"]
    data[place] = value
    error = json.loads(posted(address, "chat", f'["Why?", {", ".join(data)}]'))["error"]
    name = ["alpha", "temperature", "top_k", "max_new_tokens", "blend rule", "seed", "no_repeat"][place]
    assert name in error and error.endswith(".") and "\n" not in error and "Traceback" not in error


BAD_VALUES = [
    ({"seed": -1}, "seed"), ({"seed": 2**31}, "seed"), ({"seed": "1.5"}, "seed"), ({"seed": "9" * 5000}, "seed"),
    ({"alpha": 1.01}, "alpha must be from 0 to 1"), ({"alpha": -0.5}, "alpha must be from 0 to 1"), ({"alpha": "x"}, "alpha"),
    ({"temperature": 3}, "temperature must be from 0 to 2"), ({"max_new_tokens": 100_000}, "1 to 1000"),
    ({"top_k": 50.5}, "top_k must be a whole number, not 50.5."), ({"no_repeat": True}, "no_repeat"), ({"seed": True}, "seed"),
    ({"top_k": 0}, "top_k must be from 1"), ({"no_repeat": 51}, "50"), ({"rule": "mean"}, "probabilities"),
    ({"message": ""}, "Type a question first."), ({"message": " \n"}, "Type a question first."),
    ({"message": 3}, "Type a question first."), ({"message": "Why? " * 600}, "shorten the question"),
    *(({"history": bad}, "pairs of message and answer") for bad in ("text", 5, [["one"]], [["one", 3]], ["ab"], [[None, None]]))]


@pytest.mark.parametrize(("changes", "words"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_answered_in_words(client, changes, words):
    with pytest.raises(AppError) as error:
        ask(client, **changes)
    text = str(error.value)
    assert words in text and "Traceback" not in text and "show_error" not in text and "\n" not in text
    ask(client)


@pytest.mark.parametrize(("endpoint", "changes", "words"), [
    ("/candidates", {"tokens": [512]}, "0 to 511"), ("/candidates", {"tokens": [-1]}, "0 to 511"),
    ("/candidates", {"tokens": ["a"]}, "whole numbers"), ("/candidates", {"tokens": [[1]]}, "whole numbers"),
    ("/candidates", {"tokens": [1.5]}, "whole numbers"), ("/candidates", {"tokens": [True]}, "whole numbers"),
    ("/candidates", {"tokens": [10**30]}, "whole numbers"), ("/passages", {"k": 2.5}, "k must be a whole number"),
    ("/candidates", {"tokens": 5}, "whole numbers"), ("/candidates", {"tokens": "12"}, "whole numbers"),
    ("/candidates", {"tokens": [300] * 600}, "reads at most 512"), ("/candidates", {"alpha": 2}, "alpha must be"),
    ("/candidates", {"rule": "mean"}, "probabilities"), ("/candidates", {"message": ""}, "Type a question first."),
    ("/passages", {"k": 0}, "k must be from 1 to 32"), ("/passages", {"k": 33}, "k must be"),
    ("/passages", {"tokens": [512]}, "0 to 511"),
    ("/passages", {"history": [["one"]]}, "pairs of message and answer")], ids=lambda value: str(value)[:40])
def test_a_bad_request_for_one_place_is_answered_in_words(client, endpoint, changes, words):
    with pytest.raises(AppError) as error:
        client.predict(**{"message": QUESTION, **changes}, api_name=endpoint)
    assert words in str(error.value) and "show_error" not in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def snippets():
    pages = (ROOT / "README.md", ROOT / "docs/page.md")
    return [code for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]


def test_the_readmes_call_of_the_page_works(address, snippets):
    (code,) = (code for code in snippets if "gradio_client" in code)
    assert code.count("http://127.0.0.1:7860") == 1
    given = {}
    exec(code.replace("http://127.0.0.1:7860", address), given)
    assert given["text"] and "".join(entry["token"] for entry in given["logprobs"]["content"]) == given["text"]


def test_the_documented_way_without_a_page_gives_the_same_answer(address, snippets, trained, capsys):
    (calling,) = (code for code in snippets if "gradio_client" in code)
    (code,) = (code for code in snippets if "gradio_client" not in code)
    assert code.count("--demo") == 1 and len(code.strip().splitlines()) <= 8
    page, given = {}, {}
    exec(calling.replace("http://127.0.0.1:7860", address), page)
    capsys.readouterr()
    exec(code.replace('"--demo"', f'"--model_dir", {str(trained)!r}, "--device", "cpu"'), given)
    assert given["answer"].text == page["text"] and capsys.readouterr().out.rstrip("\n") == page["text"].rstrip("\n")
