"""What the server behind the page refuses, and what it does not keep."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from gradio_client import Client
from gradio_client.utils import QueueError
from test_chat import QUESTION
from test_session import COLOUR, OTHER, ask, controls, texts

import app
from chat import Chat
from memory_decoder import read_manifest
from web import limits, page, session
from web.session import Desk, Session

API = "/gradio_api"
PLAIN = {"data": [QUESTION, 0.5, 2, 200, 12, "logits", 3, 0, None]}
LONG = {"data": [QUESTION, 0.5, 2, 200, 400, "logits", 3, 0, None]}


@pytest.fixture(scope="module")
def chat(trained):
    return Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


@contextmanager
def opened(chat):
    """The page in this process. Yields its Blocks and a client of its server."""
    blocks = page.Page(chat, app.Options()).build()
    _, address, _ = page.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        with httpx.Client(base_url=address, timeout=60) as visitor:
            yield blocks, visitor
    finally:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def served(chat):
    with opened(chat) as both:
        yield both


@pytest.fixture(scope="module")
def visitor(served):
    return served[1]


def wait_until(holds):
    give_up = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def answered(visitor, body=PLAIN, name="chat"):
    """The last data that a call streams."""
    event = visitor.post(f"{API}/call/{name}", json=body).raise_for_status().json()["event_id"]
    return json.loads([line for line in visitor.get(f"{API}/call/{name}/{event}").text.splitlines() if line][-1][6:])


@pytest.mark.parametrize("path", [
    f"{API}/file=/etc/passwd", f"{API}/file=app.py", f"{API}/file/etc/passwd", f"{API}/file=http://127.0.0.1:9/",
    f"{API}/proxy=http://127.0.0.1:9/", "/monitoring", "/monitoring/summary", "/docs", "/openapi.json",
    f"{API}/deep_link?session_hash=a", "/runs", f"{API}/dev/reload",
    f"{API}/custom_component/a/client/b/c", f"{API}/stream/a/b/1/playlist.m3u8", "/etc/passwd",
    "/static/../routes.py", "/assets/%2e%2e/routes.py", f"{API}/upload_progress?upload_id=a", f"{API}/vibe-code", "//etc/passwd",
    f"{API}/run/%00"])
def test_what_the_page_does_not_need_is_not_there(visitor, path):
    found = visitor.get(httpx.URL(visitor.base_url, raw_path=path.encode()))
    assert (found.status_code, found.json()) == (404, {"detail": limits.NO_SUCH_ADDRESS})


@pytest.mark.parametrize("path", ["upload", "component_server", "process_recording", "vibe-edit/", "stream/a", "profiling/clear"])
def test_nothing_can_be_left_on_the_server(visitor, path):
    found = visitor.post(f"{API}/{path}", files={"files": ("a.html", b"<script>alert(1)</script>")})
    assert (found.status_code, found.json()) == (404, {"detail": limits.NO_SUCH_ADDRESS})


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/favicon.ico", f"{API}/info", f"{API}/startup-events"])
def test_what_the_page_needs_is_there_and_names_no_folder(visitor, trained, path):
    text = visitor.get(path).raise_for_status().text
    assert str(trained.parent.parent) not in text and str(app.HERE) not in text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_has_a_largest_size(visitor, streamed):
    for extra, code in ((0, 422), (1, 413)):
        body = b'"' + b"a" * (limits.BODY - 2 + extra) + b'"'
        found = visitor.post(f"{API}/queue/join", content=iter([body[:99], body[99:]]) if streamed else body,
                             headers={"content-type": "application/json"})
        assert found.status_code == code and found.json() == {"detail": limits.TOO_LARGE if extra else limits.NOT_READ}


@pytest.mark.parametrize(("path", "body", "words"), [
    ("queue/join", {"data": []}, "Session hash not found."), ("queue/join", {"data": 5, "session_hash": "a"}, limits.NOT_READ),
    ("queue/join", {"data": [], "session_hash": "a", "fn_index": 10**6}, limits.NO_SUCH_EVENT),
    ("queue/join", {"data": [], "session_hash": "a", "fn_index": "x"}, limits.NOT_READ), ("queue/join", [], limits.NOT_READ),
    ("call/nothing", {"data": []}, limits.NO_SUCH_EVENT), ("run/predict", {"data": []}, limits.NO_SUCH_EVENT),
    ("call/v2/nothing", {}, limits.NO_SUCH_EVENT), ("cancel", {"fn_index": 3}, limits.NOT_READ)], ids=str)
def test_a_malformed_request_gets_one_sentence(visitor, path, body, words):
    found = visitor.post(f"{API}/{path}", json=body)
    assert 400 <= found.status_code < 500 and found.json() == {"detail": words}


@pytest.mark.parametrize("data", [[], [QUESTION], [QUESTION] * 8])
def test_a_wrong_number_of_values_gets_one_sentence(visitor, data):
    assert answered(visitor, {"data": data})["error"] == limits.NOT_READ


def test_a_fault_of_the_page_is_told_without_its_traceback(chat, visitor, monkeypatch, capfd):
    def fail(*_):
        raise OSError("a secret of the server")
    monkeypatch.setattr(chat, "passages", fail)
    assert answered(visitor, {"data": [QUESTION, None, None, None]}, "passages")["error"] == limits.FAILED
    assert "a secret of the server" in capfd.readouterr().err


def test_an_error_that_quotes_a_value_holds_no_tag_and_is_short(visitor):
    data = [QUESTION, 0.5, 2, 200, 12, "logits", "<img src=//a.example/b>", 0, None]
    assert answered(visitor, {"data": data})["error"].endswith("not '‹img src=//a.example/b>'.")
    assert limits.plain("a" * 10**6) == "a" * limits.MESSAGE


@pytest.mark.parametrize("path", ["queue/data?session_hash=nobody", "call/chat/nothing"])
def test_a_stream_of_a_session_that_is_not_there_ends_whole(visitor, path):
    found = visitor.get(f"{API}/{path}")
    assert "404" in found.text and len(found.text.split("data:")) == 2


def test_the_queue_cannot_be_passed_by(visitor):
    assert visitor.post(f"{API}/run/chat", json=PLAIN).status_code == 404


def event_data(served, name, data):
    """What the page answers to an event of a handler with this name and this data."""
    blocks, visitor = served
    number = next(i for i, fn in blocks.fns.items() if getattr(fn.fn, "__name__", "") == name)
    values = [None, COLOUR, *controls()][:len(blocks.fns[number].inputs)]
    body = {"data": values, "event_data": data, "fn_index": number, "session_hash": f"{name} {data}"}
    if blocks.fns[number].queue:
        visitor.post(f"{API}/queue/join", json=body).raise_for_status()
        lines = visitor.get(f"{API}/queue/data", params={"session_hash": body["session_hash"]}).text.splitlines()
        return next(m["output"] for line in lines if line and (m := json.loads(line[6:]))["msg"] == "process_completed")
    return visitor.post(f"{API}/run/predict", json=body).json()


@pytest.mark.parametrize("name", ["edited", "go_on", "open_token"])
@pytest.mark.parametrize("data", [None, {}, [], 5, {"number": "x", "token": [], "index": {}},
                                  {"number": -1, "index": -7, "value": 3}], ids=str)
def test_event_data_of_another_kind_is_refused_in_words_or_ignored(served, name, data):
    found = event_data(served, name, data)
    assert "is_generating" in found if name == "open_token" else found["error"] in ("This is no place in the last answer.",
                                                                                    "Type a question first.")


def test_only_so_many_sessions_are_kept_and_one_call_leaves_none(served):
    blocks, visitor = served
    for number in range(limits.SESSIONS + 5):
        visitor.post(f"{API}/run/predict", json={"data": [], "fn_index": 10**6, "session_hash": f"visitor {number}"})
    kept = blocks.state_holder.session_data
    assert len(kept) == limits.SESSIONS and "visitor 5" in kept and "visitor 4" not in kept
    before, silent = set(kept), set(blocks._queue.pending_messages_per_session)
    assert all(answered(visitor)[0] for _ in range(3))
    wait_until(lambda: set(kept) < before and set(blocks._queue.pending_messages_per_session) <= silent)
    assert len(kept) >= limits.SESSIONS - 2


def test_a_full_queue_is_said_so(chat, monkeypatch):
    monkeypatch.setattr(limits, "WAITING", 2)
    free, real = threading.Event(), chat.write
    monkeypatch.setattr(chat, "write", lambda *more: (free.wait(60), (yield from real(*more)))[1])
    with opened(chat) as (blocks, visitor):
        client = Client(str(visitor.base_url), verbose=False, analytics_enabled=False)
        def submit():
            return client.submit(*PLAIN["data"], api_name="/chat")
        jobs = [submit()]
        wait_until(lambda: any(blocks._queue.active_jobs))
        jobs += [submit(), submit()]
        wait_until(lambda: len(blocks._queue) == 2)
        with pytest.raises(QueueError, match="Queue is full"):
            submit().result(timeout=60)
        free.set()
        assert len({job.result(timeout=60)[0] for job in jobs}) == 1
        client.close()


@pytest.fixture
def written(chat, monkeypatch):
    """How many tokens were written of each answer, and whether its writing has ended."""
    found, real = [], chat.write

    def write(*arguments):
        found.append([0, False])
        mine = found[-1]
        try:
            for answer in real(*arguments):
                mine[0] += 1
                time.sleep(0.01)
                yield answer
        finally:
            mine[1] = True
    monkeypatch.setattr(chat, "write", write)
    return found


def test_a_client_that_vanishes_frees_its_place_at_the_next_token(served, written):
    blocks, visitor = served
    event = visitor.post(f"{API}/call/chat", json=LONG).json()["event_id"]
    with visitor.stream("GET", f"{API}/call/chat/{event}") as stream:
        lines = stream.iter_lines()
        for _ in range(20):
            next(lines)
    wait_until(lambda: written[0][1])
    assert 5 < written[0][0] < 100 and answered(visitor)[0] and written[1] == [len(answered(visitor)[1]["content"]), True]
    wait_until(lambda: not blocks._queue.event_ids_to_events)


def test_an_event_to_which_nobody_ever_listens_is_dropped(chat, written, monkeypatch):
    monkeypatch.setattr(limits, "PATIENCE", 0.5)
    with opened(chat) as (blocks, visitor):
        for _ in range(3):
            visitor.post(f"{API}/call/chat", json=LONG).raise_for_status()
        wait_until(lambda: not blocks._queue.event_ids_to_events and not blocks._queue.pending_messages_per_session)
        assert written and all(tokens < 400 and ended for tokens, ended in written)


def joined(blocks, visitor, session):
    """Ask for a short answer in a session."""
    number = next(i for i, fn in blocks.fns.items() if fn.api_name == "chat")
    visitor.post(f"{API}/queue/join", json={**PLAIN, "fn_index": number, "session_hash": session}).raise_for_status()


def heard(visitor, session):
    """Read what a session is told, up to the end of its answers. Returns the kinds of messages."""
    found = []
    with visitor.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            found += [json.loads(line[6:])["msg"]] if line else []
            if found[-1:] == ["close_stream"]:
                return found


def test_a_client_that_leaves_once_all_is_said_may_ask_on_at_once(served):
    blocks, visitor = served
    for number in range(3):
        joined(blocks, visitor, f"asks on {number}")
        with visitor.stream("GET", f"{API}/queue/data", params={"session_hash": f"asks on {number}"}) as stream:
            next(line for line in stream.iter_lines() if "close_stream" in line)
            with httpx.Client(base_url=visitor.base_url, timeout=60) as other:
                joined(blocks, other, f"asks on {number}")
        assert "process_completed" in heard(visitor, f"asks on {number}")


def test_a_session_that_was_silent_for_long_may_ask_again(chat, monkeypatch):
    async def never(*_):
        pass
    monkeypatch.setattr(limits, "PATIENCE", 0.2)
    monkeypatch.setattr(limits.Limits, "watch", never)  # so that only the next question itself looks for silent sessions
    with opened(chat) as (blocks, visitor):
        for _ in range(3):
            joined(blocks, visitor, "again")
            assert "process_completed" in heard(visitor, "again")
            time.sleep(0.3)


def test_a_session_keeps_its_last_turns_and_the_candidates_of_its_last_tokens(chat, monkeypatch):
    desk, mine = Desk(chat), Session()
    monkeypatch.setattr(session, "MOST_TURNS", 3)
    monkeypatch.setattr(session, "DETAILED", 16)
    for number in range(5):
        ask(desk, mine, f"{OTHER} {number}", max_new_tokens=12)
    assert [question[-1] for question, _ in texts(mine)] == ["2", "3", "4"]
    kept = ["candidates" in answer.tokens[0] for answer in mine.answers]
    assert kept == [False, sum(len(a.tokens) for a in mine.answers[1:2]) <= 16, True]
    assert json.loads(desk.export(mine))["answers"][0]["tokens"][0]["passages"]


def test_far_too_long_a_text_is_refused_before_it_is_read(chat, monkeypatch):
    monkeypatch.setattr(chat.model.base, "encode", lambda *_: pytest.fail("it was read"))
    for refused in (lambda: chat.begin("a" * (chat.most_characters + 1)), lambda: chat.explore("a" * chat.most_characters, "b")):
        with pytest.raises(app.UserError, match="shorten it") as error:
            refused()
        assert str(chat.model.base.name) not in str(error.value)


def test_turns_that_cannot_fit_are_not_even_read(chat):
    long = ("a" * chat.most_characters, "b")
    answer = chat.begin(QUESTION, [long, ("One?", "Two."), ("Three?", "Four.")], max_new_tokens=5)
    assert answer.turns == [("One?", "Two."), ("Three?", "Four.")]


HTML = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize("change", [
    {"rule": HTML}, {"seed": HTML}, {"k": HTML}, {"kept": HTML}, {"knn_k": HTML}, {"k": -1}, {"kept": 99}, {"alpha": True},
    {"top_k": 1.5}, {"max_new_tokens": 10**9}, {"question": [HTML]},
    {"seconds": float("nan")}], ids=str)
def test_a_record_that_holds_html_in_place_of_a_number_gives_an_empty_chat(chat, change):
    desk, mine, again = Desk(chat), Session(), Session()
    ask(desk, mine)
    assert desk.restore([mine.records()[0] | change], again, COLOUR) == ([], "", "", "", "") and again.answers == []


@pytest.mark.parametrize("change", [{"id": HTML}, {"id": 512}, {"id": -1}, {"base": HTML}, {"alpha": 2}, {"candidates": []},
                                    {"neighbours": [[1.0, 10**9]]}, {"candidates": [{"id": HTML}]}, {"text": 5},
                                    {"end": "no"}], ids=str)
def test_a_record_with_a_token_that_is_nonsense_gives_an_empty_chat(chat, change):
    desk, mine, again = Desk(chat), Session(), Session()
    ask(desk, mine)
    (record,) = json.loads(json.dumps(mine.records()))
    record["tokens"][3] |= change
    assert desk.restore([record], again, COLOUR) == ([], "", "", "", "") and again.answers == []


def test_a_page_behind_a_proxy_that_keeps_its_prefix_answers_there(chat, monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/memory")
    with opened(chat) as (_, visitor):
        for path in ("/memory/", "/memory/config", f"/memory{API}/info"):
            assert visitor.get(path).status_code == 200, path
        assert visitor.get("/memory/gradio_api/upload").status_code == 404 == visitor.get("/memory/file=/etc/passwd").status_code
        begun = visitor.post(f"/memory{API}/call/chat", json=PLAIN).json()["event_id"]
        assert "event: complete" in visitor.get(f"/memory{API}/call/chat/{begun}").text
