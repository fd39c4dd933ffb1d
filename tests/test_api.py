"""The page's API as gradio_client calls it."""

import html

import pytest
from conftest import run_script
from gradio_client import Client
from gradio_client.exceptions import AppError
from runs import running_app, stored_rows, the_error
from test_app import GOOD, PASSAGE, QUESTION

from generation import RULES


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


def test_the_api_has_one_parameter_for_the_message_and_each_control(client):
    (endpoint,) = client.view_api(return_format="dict", print_info=False)["named_endpoints"].items()
    assert endpoint[0] == "/chat"
    assert [parameter["parameter_name"] for parameter in endpoint[1]["parameters"]] == ["message", *GOOD, "seed", "no_repeat"]


def test_an_answer_comes_with_tokens_and_passages(client, trained):
    text, tokens, alphas, passages = ask(client)
    assert text and "".join(token for token, _ in tokens) == text
    assert [token for token, _ in alphas] == [token for token, _ in tokens] and {alpha for _, alpha in alphas} == {GOOD["alpha"]}
    found = {html.unescape(title) for *_, title, _ in PASSAGE.findall(passages)}
    assert found and found <= {row["Title"][:120] for row in stored_rows(trained)}


def test_an_answer_streams(client):
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
    drawn = {"rule": "auto", "temperature": 2, "top_k": 200, "seed": 3}  # the best token of this small memory may be the end
    first = ask(client, alpha=0, **drawn)
    client.reset_session()
    second = ask(client, alpha=1, **drawn)
    shares = [alpha for _, alpha in first[2]]
    assert first[0] == second[0] and all(0 <= share <= 1 for share in shares) and len(set(shares)) > 1
    # Not to the last bit: matrix products add in another order when memory is aligned otherwise.
    assert [alpha for _, alpha in second[2]] == pytest.approx(shares, abs=1e-5)


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
def test_a_bad_request_is_answered_in_words(client, changes, words):
    with pytest.raises(AppError) as error:
        ask(client, **changes)
    text = str(error.value)
    assert words in text and "Traceback" not in text and "show_error" not in text and "\n" not in text
    assert ask(client)[0]


def test_a_second_app_on_the_same_port_ends_with_one_sentence(server, trained):
    port = server.rstrip("/").rpartition(":")[2]
    done = run_script("app.py", "--model_dir", trained, "--server_port", port, "--device", "cpu")
    sentence = the_error(done.code, done.err)
    assert port in sentence and "--server_port" in sentence
