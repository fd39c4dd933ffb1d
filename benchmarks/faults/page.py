"""app.py as a process of its own, for the faults that come from its visitors."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import httpx
import psutil

from faults.common import ROOT
from faults.runs_beside import last_line

API = "/gradio_api"
LONG = 100  # tokens from which on an answer is written at the pace of a model of some size
PACE = 0.03  # seconds a token
# app.py as it is, but that it notes every token that it writes, and writes long answers at a pace at which tokens can be counted.
COUNTED = f"""
import os, sys, time
import app, chat
real = chat.Chat.write
tokens = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def write(self, answer, *more):
    for each in real(self, answer, *more):
        os.write(tokens, b".")
        if answer.max_new_tokens >= {LONG}:
            time.sleep({PACE})
        yield each
chat.Chat.write = write
app.main()
"""
WAIT = 120  # seconds


class Page:
    """A page that is open: its address, its process, and a file with a byte for each token that it has written."""

    def __init__(self, address, process, tokens, errors):
        self.address, self.process, self.tokens, self.errors = address, process, tokens, errors

    @property
    def written(self):
        return os.path.getsize(self.tokens) if self.tokens.exists() else 0

    @property
    def memory(self):
        """Bytes that the process holds. Pages of files that it reads do not count, since the system can drop them at any time."""
        held = psutil.Process(self.process.pid).memory_info()
        return held.rss - getattr(held, "shared", 0)

    def fault(self):
        """A sentence if the process has ended or does not answer any more, else None."""
        if self.process.poll() is not None:
            return f"app.py ended: {last_line(self.errors.read_text(errors='replace'))}"
        try:
            return None if httpx.get(self.address, timeout=WAIT).status_code == 200 else "The page does not open any more."
        except httpx.HTTPError as error:
            return f"The page does not answer any more: {type(error).__name__}."


def free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(folder, work, *more):
    """Open the page over a trained folder, with more arguments. work: a folder for what it prints."""
    work.mkdir(parents=True, exist_ok=True)
    port, tokens, errors = free_port(), work / "tokens", work / "err.txt"
    tokens.unlink(missing_ok=True)
    command = [sys.executable, "-c", COUNTED, tokens, "--model_dir", folder, "--device", "cpu", "--server_port", port, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(work / "out.txt", "w") as out, open(errors, "w") as err:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=out, stderr=err)
    try:
        page = Page(f"http://127.0.0.1:{port}", process, tokens, errors)
        wait_for(page)
        yield page
    finally:
        process.kill()
        process.wait()


def wait_for(page):
    limit = time.monotonic() + 300
    while time.monotonic() < limit and page.process.poll() is None:
        try:
            httpx.get(page.address, timeout=WAIT)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"app.py did not open its page: {page.errors.read_text(errors='replace')[-2000:]}")


def said(visit, text):
    """Wait until a browser shows a question in its conversation, and the whole answer to it."""
    visit.wait_for_function("text => document.querySelector('#chat').innerText.replace(/\\s/g, '').includes(text)",
                            arg="".join(text.split()))
    visit.wait_for_selector("#passages .passage")  # they go when an answer begins, and come when it has ended
    visit.wait_for_selector("#stop:disabled")


def questions():
    """The demo's questions, each once: text that any model can be asked."""
    rows = (json.loads(line) for line in (ROOT / "demo/legal_qa.jsonl").read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(row["Question"] for row in rows))


def last_data(lines):
    """The data of the last message of a stream of one call, from its lines."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return json.loads(found[-1]) if found else None


def call(visitor, name, data):
    """What an endpoint returns to a list of values, or {"error": ...}."""
    event = visitor.post(f"{API}/call/{name}", json={"data": data}).raise_for_status().json()["event_id"]
    return last_data(visitor.get(f"{API}/call/{name}/{event}").text.splitlines())


def trained_folder(place):
    if place.trained:
        return place.trained
    from faults.killed import reference

    return reference(place)
