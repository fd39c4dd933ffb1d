"""The soak test's checks of the page notice a page that fails them."""

import random
from collections import Counter

import httpx
import pytest
from conftest import ROOT

from browser import chromium
from faults import attack_requests, attack_scripts, load
from faults.common import Place
from faults.page import free_port


def answer(text="Yes.", ids=(5, 6), logprob=-0.5):
    """An answer as the endpoint chat returns it."""
    return text, {"content": [{"id": i, "token": str(i), "logprob": logprob, "base_logprob": -1.0, "top_logprobs": []}
                              for i in ids]}


def test_an_answer_that_belongs_to_another_client_is_noticed():
    own, other = (load.fingerprint(answer(text)) for text in ("Yes.", "No."))
    assert load.judged(answer("Yes."), own, [other]) is None
    assert load.judged(answer("No."), own, [other]) == "It is the answer to another one's question."
    for changed in (answer("Maybe."), answer(ids=(5, 7)), answer(ids=(5,)), answer(logprob=-0.6)):
        assert load.judged(changed, own, [other]) == "It is another answer."


def test_a_client_that_is_told_an_error_is_noticed_and_a_full_queue_is_not():
    class Visitor:
        def submit(self, *_, **__):
            raise self.error
    visitor = Visitor()
    for error, expected in ((load.QueueError("Queue is full! Try again."), None), (load.QueueError("no"), "no"),
                            (ValueError("oh"), "ValueError: oh")):
        visitor.error = error
        assert load.ask(visitor, "Why?", None, [])[0] == expected


WHOLE = "Visitor0, a? One. Visitor0, b? Two."


@pytest.mark.parametrize(("chat", "shown", "words"), [
    (WHOLE, ["One.", "Two."], None), ("Visitor0, a? One. Visitor0, b?", ["One.", "Two."], "does not show 'Two.'"),
    ("Visitor0, a? One. Two.", ["One.", "Two."], "does not show 'Visitor0, b?'"),
    (WHOLE, ["One.", "One."], "does not show 'One.'"),
    ("Visitor0, a? One. Visitor1, c? Visitor0, b? Two.", ["One.", "Two."], "a question of Visitor1"),
    ("Visitor0, a? Six. Visitor0, b? Two.", ["Six.", "Two."], "Its answer is 'Six.', and 'One.'")])
def test_a_browser_that_shows_what_is_another_ones_is_noticed(monkeypatch, chat, shown, words):
    answers = iter([answer("One."), answer("Two.")])
    monkeypatch.setattr(load, "call", lambda *_: next(answers))
    found = [*filter(None, load.conversation_faults(None, 0, ["Visitor0, a?", "Visitor0, b?"], chat, shown, 2))]
    assert bool(found) == bool(words) and (words is None or words in found[0])


def written(*steps):
    """The tokens of an answer. steps: of each token the text, and other candidates with their log probabilities."""
    return [{"id": 0, "token": text, "logprob": -0.5,
             "top_logprobs": [{"id": i, "token": t, "logprob": p} for i, (t, p) in enumerate([(text, -0.5), *others])]}
            for text, *others in steps]


@pytest.mark.parametrize(("second", "noticed"), [("Two.", False), ("Six.", True)])
def test_behind_an_answer_that_rounding_changed_the_next_one_is_compared_in_the_same_conversation(monkeypatch, second, noticed):
    read, answers = [], iter([("Pay the", {"content": written(("Pay",), (" the", (" a", -0.6)))}), answer("Two.")])
    monkeypatch.setattr(load, "call", lambda visitor, name, values: read.append([*values[-1]]) or next(answers))
    found = [*load.conversation_faults(None, 0, ["a?", "b?"], f"a? Pay a b? {second}", ["Pay a", second], 1)]
    assert found[0] is None and bool(found[1]) == noticed and read == [[], [["a?", "Pay a"]]]


def test_only_candidates_that_are_nearly_as_likely_may_be_exchanged_by_rounding():
    own = written(("Pay",), (" the", (" a", -0.6), (" no", -2.0)), (" fee", ("", -0.7)))
    assert load.near_tie("Pay·a·fine", own) and load.near_tie("Pay the", own)
    for other in ("Pay no fine", "Pay what", "Sue", "Pay the cost", "Pay the fee now"):
        assert not load.near_tie(other, own), other


def test_tokens_that_are_written_for_nobody_and_memory_that_grows_are_noticed():
    assert load.late(load.LISTENED, load.MOST_AFTER) is load.grown(100, 105) is None
    assert "5 tokens" in load.late(load.LISTENED, 5) and "ended after 3" in load.late(3, 0) and "1.06 times" in load.grown(100, 106)


def told(code, text):
    return httpx.Response(code, text=text, request=httpx.Request("POST", "http://127.0.0.1/x", content=b"{}"))


@pytest.mark.parametrize(("code", "text", "noticed"), [
    (200, "{}", False), (422, '{"detail": "no"}', False), (500, '{"error": "The page failed."}', False),
    (500, "Internal Server Error", True), (200, "Traceback (most recent call last):", True), (400, 'File "/a/b.py", line 3', True),
    (200, f"{ROOT}/web", True), (200, "x" * (attack_requests.LARGEST + 1), True)], ids=range(8))
def test_an_answer_that_shows_the_server_or_has_no_end_is_noticed(code, text, noticed):
    assert bool(attack_requests.complaint(told(code, text))) == noticed


class Generous(httpx.MockTransport):
    """A server that gives every file, takes every upload, and needs no login."""

    def __init__(self, content):
        super().__init__(lambda request: httpx.Response(200, content=content, request=request))


@pytest.fixture
def generous(monkeypatch):
    """Lets the checks talk to a server that gives this content for every request."""
    real = httpx.Client

    class Page:
        address = f"http://127.0.0.1:{free_port()}"
    def to(content):
        monkeypatch.setattr(attack_requests.httpx, "Client", lambda **more: real(transport=Generous(content), **more))
        return Page
    return to


def test_a_server_that_gives_its_files_is_noticed(generous, tmp_path):
    for name in ("examples.jsonl", "config.json", "faiss_index.bin"):
        (tmp_path / name).write_text(name * 9)
    found = attack_requests.files(Place(tmp_path, []), generous(attack_requests.SECRET.encode()), tmp_path)
    gave = [failure for failure in found.failures if "gave the file" in failure]
    assert len(gave) > 10 and "An upload was answered with 200." in found.failures and found.survived > 50


def test_a_server_that_needs_no_login_is_noticed(generous):
    found = attack_requests.without_login(generous(b"{}"), "ann:secret")
    assert found.survived == 1 < 40 < found.tried and "The page itself is shown." in found.failures  # the right login goes in


def test_the_same_seed_draws_the_same_requests_and_they_are_of_every_kind():
    drawn = [[attack_requests.value(draw) for _ in range(400)] for draw in (random.Random(1), random.Random(1), random.Random(2))]
    assert repr(drawn[0]) == repr(drawn[1]) != repr(drawn[2])
    assert {str, int, float, bool, type(None), list, dict} <= set(Counter(map(type, drawn[0])))


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def test_scripts_that_run_and_requests_to_elsewhere_are_noticed(browser):
    watched = attack_scripts.Watched(browser)
    watched.visit.route("**/*", lambda route: route.fulfill(body="<html></html>", content_type="text/html"))
    watched.visit.goto("http://127.0.0.1:9/")
    watched.visit.evaluate("document.body.innerHTML = ''")
    assert watched.faults() == []
    script = "<img src=x: onerror=hit(7)><img src=http://evil.example/a.png><svg onload=alert(1)>"
    watched.visit.set_content(script)
    watched.visit.wait_for_function("window.hits.length > 0")
    found = watched.faults()
    watched.close()
    assert "Script 7 ran." in found and "It asks for http://evil.example/a.png." in found and "A dialog says '1'." in found


def test_every_payload_is_live_where_a_page_shows_it_as_html(browser):
    """At least half of them run in a page that shows them raw. The others need an attribute, a link or a template around them."""
    ran = 0
    for script in attack_scripts.payloads(Place(ROOT, [], short=False)):
        watched = attack_scripts.Watched(browser)
        watched.visit.route("**/*", lambda route: route.fulfill(body="", content_type="text/html"))
        watched.visit.goto("http://127.0.0.1:9/")
        watched.visit.set_content(script)
        watched.visit.wait_for_timeout(50)
        ran += bool(watched.faults())
        watched.close()
    assert ran >= 20


def test_forty_payloads_differ_and_name_their_numbers():
    made = attack_scripts.payloads(Place(ROOT, [], short=False))
    assert len(set(made)) == 40 and all(str(number) in script for number, script in enumerate(made, 1))
