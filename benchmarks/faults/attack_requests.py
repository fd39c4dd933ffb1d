"""Requests to the page that no visitor sends: files, values and bodies of every kind, and all of them without a login."""

import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import httpx

from faults import page as pages
from faults.common import ROOT, Outcome
from faults.page import API, call, questions

REQUESTS = {True: 450, False: 10_000}
ENDPOINTS = {"chat": 9, "candidates": 5, "passages": 4}  # and how many values they take
LARGEST = 4 * 2**20  # bytes of an answer to a request that is drawn
TRACES = ("Traceback (most recent", 'File "/', "site-packages", ".py\", line", str(ROOT))
SECRET = "the secret that lies beside the memory"
AT_ONCE = 20  # events of one session


def clean(text):
    """A sentence if a text for a client holds what is the server's own, else None."""
    return next((f"The client was told {trace!r}." for trace in TRACES if trace in text), None)


def drawn(place, page):
    """Requests that are drawn, to every endpoint and to every handler of the page."""
    draw, outcome, codes = random.Random(place.seed), Outcome("a request that is drawn"), Counter()
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
        functions = visitor.get("/config").json()["dependencies"]
        for number in range(REQUESTS[place.short]):
            try:
                answer = send(visitor, draw, functions, f"attack {number // AT_ONCE}")
                codes[answer.status_code] += 1
                outcome.add(complaint(answer))
            except httpx.TransportError:  # the server closes a connection of which it does not read all
                codes["a closed connection"] += 1
                outcome.add(page.fault())
            if number % AT_ONCE == AT_ONCE - 1:
                outcome.add(events_of(visitor, f"attack {number // AT_ONCE}"))
                wrong = page.fault()
                if wrong:
                    outcome.add(wrong)
                    break
        answer = call(visitor, "chat", [questions()[0], 0.5, 2, 200, 12, "logits", 3, 0, None])
        outcome.add(None if isinstance(answer, list) else f"Afterwards the page answers {answer}.")
    outcome.note = f"{len(functions)} handlers; " + ", ".join(f"{count} times {code}" for code, count in codes.most_common())
    return outcome


def complaint(answer):
    """A sentence if an answer shows what it must not, else None."""
    where = f"{answer.request.method} {answer.request.url.path[:80]} {answer.request.content[:160]!r}: "
    if answer.status_code == 500 and '"error"' not in answer.text:
        return f"{where}500 {answer.text[:100]}"
    if len(answer.content) > LARGEST:
        return f"{where}The answer has {len(answer.content)} bytes."
    wrong = clean(answer.text)
    return wrong and where + wrong


def send(visitor, draw, functions, session):
    """One request that is drawn. Returns its answer."""
    kind = draw.choices(("queue", "call", "run", "other"), (4, 3, 3, 2))[0]
    if kind == "other":
        return other(visitor, draw)
    function = draw.choice(functions)
    count = len(function["inputs"]) if kind != "call" else ENDPOINTS[name := draw.choice([*ENDPOINTS])]
    count = count if draw.random() < 0.8 else draw.randrange(12)
    body = {"data": [value(draw) for _ in range(count)]}
    if kind == "call":
        answer = visitor.post(f"{API}/call/{name}", **encoded(draw, body))
        with_event = answer.status_code == 200 and visitor.get(f"{API}/call/{name}/{answer.json()['event_id']}")
        return with_event or answer
    body |= {"session_hash": session, "fn_index": function["id"], "event_data": event_data(draw),
             "trigger_id": draw.choice((None, 1, function["targets"][0][0] if function["targets"] else 0, -1, "x"))}
    if draw.random() < 0.1:
        body[draw.choice([*body])] = value(draw)
        body["session_hash"] = session
    path = f"{API}/queue/join" if kind == "queue" else f"{API}/run/{draw.choice(('predict', 'chat', 'x', '%00'))}"
    return visitor.post(path, **encoded(draw, body))


def other(visitor, draw):
    """A request to a path of another kind, or with another method."""
    words = ("", "config", "info", "queue", "join", "data", "call", "chat", "run", "cancel", "reset", "heartbeat%2f", "login",
             "user", "assets", "static", "theme.css", "..", "%2e%2e", "%00", "a" * 200, "file=app.py", "\u00e9", "x" * 3000,
             "upload")
    path = "/" + "/".join(quote(draw.choice(words), safe="%=.") for _ in range(draw.randrange(1, 4)))
    path = draw.choice(("", API)) + path
    method = draw.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"))
    headers = {"origin": draw.choice(("http://evil.example", "null")), "range": "bytes=0-" + "9" * draw.randrange(30)}
    return visitor.request(method, path, params={"session_hash": "none", "deep_link": "../../x"}, headers=headers,
                           content=b"" if method in ("GET", "HEAD", "OPTIONS", "TRACE") else random_bytes(draw))


def encoded(draw, body):
    """A body as JSON. Now and then one that is not whole, or not JSON at all."""
    text = json.dumps(body).encode()
    how = draw.random()
    text = text[:draw.randrange(len(text))] if how < 0.03 else random_bytes(draw) if how < 0.06 else text
    kind = "application/json" if draw.random() < 0.95 else draw.choice(("text/plain", "multipart/form-data; boundary=a", "x"))
    return {"content": text, "headers": {"content-type": kind}}


def random_bytes(draw):
    return draw.choice((b"", b"null", b"[", b"{}", b"[" * 5000, draw.randbytes(50), b'{"data": [1e999]}', b'{"data": "\xff"}',
                        b"a=b&username=x&password=y"))


def value(draw, depth=0):
    """A value that is drawn: what a control may give, or nearly, or anything."""
    texts = ("", " ", "Why?", questions()[0], "x" * draw.randrange(3000), "\ud800", "\x00", "../../etc/passwd", "<b>", "${1+1}",
             "{{7*7}}", "logits", "probabilities", "auto", "kNN-LM", "alpha", "plain", "memory's effect", "precise", "1e400", "3",
             "-1", "NaN")
    numbers = (0, 1, -1, 0.5, 2, 3, 12, 50, 2**31, -2**63, 10**30, 1e308, float("nan"), float("inf"), True, False, None)
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(texts)
    if kind < 0.8 or depth > 2:
        return draw.choice(numbers)
    inner = [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = ("path", "url", "meta", "value", "tokens", "question", "role", "content", "__type__", "id", "rule", "sample")
    made = {draw.choice(names): one for one in inner}
    files = {"path": draw.choice(("/etc/passwd", "app.py", "http://127.0.0.1:9/x")), "meta": {"_type": "gradio.FileData"}}
    return draw.choice((inner, made, files, [inner, inner], [["a", "b"]], [made]))


def event_data(draw):
    made = {name: value(draw) for name in ("number", "token", "index", "value", "previous_value") if draw.random() < 0.7}
    return draw.choice((made, made, None, value(draw)))


def events_of(visitor, session):
    """A sentence if what a session's events answered holds what it must not, else None. Reads until all of them have ended."""
    try:
        text = visitor.get(f"{API}/queue/data", params={"session_hash": session}).text
    except httpx.TransportError as error:
        return f"The stream of a session's events broke off: {type(error).__name__}."
    return clean(text) or (f"The events answered {len(text)} bytes." if len(text) > AT_ONCE * LARGEST else None)


def files(place, page, folder):
    """Files of the server, asked for in every way that gradio has and some that it has not."""
    outcome = Outcome("a file that is not the page's own")
    secret = folder / "secret.txt"
    secret.write_text(SECRET)
    shared = Path(tempfile.gettempdir()) / "gradio"  # where gradio keeps files that it would give to anybody
    shared.mkdir(exist_ok=True)
    link = shared / f"link-{os.getpid()}.txt"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    known = [secret, link, folder / "examples.jsonl", folder / "config.json", ROOT / "app.py", ROOT / "web/page.py",
             Path("/etc/passwd"), Path("/proc/self/environ"), Path("/proc/self/cmdline"), folder / "faiss_index.bin"]
    try:
        with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
            for number, path in enumerate(known):
                for way in ways(path)[number % 4::4] if place.short else ways(path):
                    answer = visitor.get(httpx.URL(page.address, raw_path=way.encode()))
                    given = answer.status_code == 200 and (path.read_bytes()[:40] or b"\0") in answer.content
                    outcome.add(f"{way} gave the file." if given else clean(answer.text))
            outcome.add(upload_fault(visitor))
    finally:
        link.unlink()
    outcome.note = f"{len(known)} files and links in {len(ways(secret))} ways{' (a quarter)' if place.short else ''}, and an upload"
    return outcome


def ways(path):
    """Addresses that may lead to a file."""
    near, up = os.path.relpath(path, ROOT), "/".join([".."] * 12)
    coded = quote(str(path), safe="")
    plain = [f"{API}/file={path}", f"{API}/file={near}", f"{API}/file/{path}", f"{API}/file={coded}", f"/file={path}",
             f"/file/{near}", f"{API}/file=file://{path}", f"{API}/proxy=file://{path}", f"{API}/stream/{coded}/a/1/playlist.m3u8",
             f"{API}/custom_component/gradio/client/{coded}/x", f"/theme.css?v={path}", f"/config?deep_link={coded}", f"/{near}",
             f"{API}/run-history/records/{coded}/1/assets/1", f"{API}/upload_progress?upload_id={coded}"]
    climbing = [f"/{root}/{dots}{path}" for root in ("assets", "static", "svelte", "pwa_icon", "static/x", "gradio_api/file=.")
                for dots in (up, up.replace("/", "%2f"), up.replace("..", "%2e%2e"), up.replace("..", "%252e%252e"),
                             up.replace("/", "\\"), up.replace("..", "....//"), up.replace("..", "..%00"))]
    return plain + climbing


def upload_fault(visitor):
    """A sentence if a file can be left on the server, else None."""
    answer = visitor.post(f"{API}/upload", files={"files": ("a.html", b"<script>alert(1)</script>")})
    return None if answer.status_code in (403, 404) else f"An upload was answered with {answer.status_code}."


def large(page):
    """Bodies beyond every bound, and texts beyond what the model reads."""
    outcome, long = Outcome("a request that is far too large"), "a" * (17 * 2**20)
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
        before = page.memory
        for path in ("queue/join", "call/chat", "run/predict", "cancel"):
            for content in (long.encode(), iter([long.encode()] * 3)):
                answer = visitor.post(f"{API}/{path}", content=content, headers={"content-type": "application/json"})
                outcome.add(None if answer.status_code == 413 else f"{path}: {answer.status_code} {answer.text[:100]}")
        for name, data in (("chat", [long[:2**23], None, None, None, None, None, None, None, None]),
                           ("chat", ["Why?", None, None, None, 8, None, None, None, [[long[:2**18], "b"]] * 60]),
                           ("candidates", ["Why?", [1] * 2**21, None, None, None]),
                           ("passages", ["Why?", None, 3, [["a", "b"]] * 2**19])):
            began, answer = time.monotonic(), call(visitor, name, data)
            took = time.monotonic() - began
            size = len(json.dumps(answer))
            outcome.add(f"{name} took {took:.0f} s." if took > 60 else f"{name} answered {size} bytes." if size > LARGEST else None)
        outcome.note = f"the process grew from {before / 1e6:.0f} to {page.memory / 1e6:.0f} MB"
    return outcome


def without_login(page, login):
    """Everything that needs a login, without one, with a wrong one, and with somebody's forged cookie."""
    outcome, user = Outcome("a request without a login"), login.partition(":")[0]
    posts = [f"{API}/{way}/{name}" for way in ("call", "run", "api", "call/v2") for name in ENDPOINTS]
    gets = ["/config", f"{API}/info", f"{API}/openapi.json", f"{API}/queue/data?session_hash=a", f"{API}/queue/status",
            f"{API}/call/chat/1"]
    body = {"data": ["Why?"], "session_hash": "a", "fn_index": 0}
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
        app = visitor.get("/").text
        outcome.add(None if '"components":[]' in app and "texts (" not in app else "The page itself is shown.")
        for cookies in ({}, {"access-token": "x", "access-token-unsecure": "x"}):
            visitor.cookies.update(cookies)
            for method, path in (*(("POST", path) for path in [*posts, f"{API}/queue/join"]), *(("GET", path) for path in gets)):
                answer = visitor.request(method, path, **({"json": body} if method == "POST" else {}))
                outcome.add(None if answer.status_code == 401 else f"{method} {path}: {answer.status_code} {answer.text[:100]}")
        for name, password in ((user, ""), (user, "wrong"), ("", "a long secret"), (user, "a long secret" * 1000), ("\0", "\0"),
                               (user, "' or 1=1 --"), (user.upper(), "a long secret")):
            answer = visitor.post("/login", data={"username": name, "password": password})
            outcome.add(None if answer.status_code in (400, 422) else f"The login {name!r}: {answer.status_code}")
        right = visitor.post("/login", data={"username": user, "password": login.partition(":")[2]})
        inside = right.status_code == 200 and visitor.get("/config").status_code == 200
        outcome.add(None if inside else "The right login is refused.")
    outcome.note = f"{len(posts) + len(gets) + 1} addresses, with and without a forged cookie, and wrong passwords"
    return outcome
