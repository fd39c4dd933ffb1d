"""What a memory answers: to app.py in the terminal, and to a page that stays open while a training replaces its files."""

import json
import socket
import time
from contextlib import contextmanager

import httpx

import app
from faults.common import TIMEOUT, Outcome
from faults.runs_beside import SHOWN, STAGES, Beside, complaint, stage_of, tell, training, wait_for_stage
from faults.same import differences

QUESTION = "Can my landlord keep my deposit?"
SETTINGS = ("--device", "cpu", "--seed", "3", "--rule", "auto", "--temperature", "0.5")
TOKENS = 24  # of the answer that is compared
NEWS = "This memory was trained again."
# In the order in which the endpoint takes them: alpha, temperature, top_k, max_new_tokens, rule, seed, no_repeat, history.
OF_THE_PAGE = (QUESTION, 0.5, 0.5, 50, TOKENS, "auto", 3, 0, [])


def answered(place, folder):
    """app.py --ask in a copy of this process, which prints all that a page can show of an answer. Returns the finished process."""
    def work():
        app.ask = tell_all
        app.sys.argv = ["app.py", "--model_dir", str(folder), "--ask", QUESTION, *SETTINGS]
        app.main()
    with Beside(place.work / "answered.logs", work, "app.py") as run:
        return run.ended()


def tell_all(chat, options):
    """In place of app.ask: print an answer with all numbers of its tokens, their passages, and what the page shows beside it."""
    answer = chat.begin(options.ask, max_new_tokens=TOKENS, rule=options.rule, alpha=0.5, temperature=options.temperature,
                        seed=options.seed)
    for _ in chat.write(answer):
        pass
    record = chat.trace(answer).record() | {"seconds": 0}
    passages = [chat.passages(token["neighbours"]) for token in answer.tokens]
    print(json.dumps([record, passages, chat.metrics, chat.manifest]))


def no_answer(place, folder):
    """A sentence if app.py does not answer from a folder, else None."""
    if place.short:
        done = answered(place, folder)
    else:
        with Beside(place.work / "asked.logs", False, "app.py", "--model_dir", folder, "--device", "cpu", "--ask", QUESTION) as run:
            done = run.ended()
    return None if done.returncode == 0 else f"app.py ended with exit code {done.returncode}: {done.stderr[-300:]}"


class OpenPage:
    """A page over a folder, asked as a program and as a browser do."""

    def __init__(self, address):
        self.client = httpx.Client(base_url=address, timeout=TIMEOUT)
        config = self.client.get("config").raise_for_status().json()
        [news] = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "news"]
        # What a browser calls when it opens the page.
        self.news = next(call["id"] for call in config["dependencies"] if call["outputs"] == [news])

    def call(self, name, *values):
        """The last output of an endpoint."""
        event = self.client.post(f"gradio_api/call/{name}", json={"data": values}).raise_for_status().json()["event_id"]
        lines = self.client.get(f"gradio_api/call/{name}/{event}").raise_for_status().text.splitlines()
        assert lines[-3:-2] == ["event: complete"], lines[-3:]
        return json.loads(lines[-2].removeprefix("data: "))

    def answer(self):
        """(text of an answer, ids of its tokens, the passages at its end)."""
        text, logprobs = self.call("chat", *OF_THE_PAGE)
        ids = [token["id"] for token in logprobs["content"]]
        [passages] = self.call("passages", QUESTION, ids, 8, [])
        return text, ids, [[passage[name] for name in ("entry", "row", "title", "before", "token")] for passage in passages]

    def tells_news(self):
        """Whether the page says that its memory was trained again."""
        done = self.client.post("gradio_api/run/predict", json={"fn_index": self.news, "data": [], "session_hash": "soak"})
        return NEWS in json.dumps(done.raise_for_status().json()["data"])


@contextmanager
def opened(place, folder):
    """An OpenPage of a folder. The page ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("--model_dir", folder, "--server_port", port, "--device", "cpu")
    with Beside(place.work / "page.logs", place.short, "app.py", *arguments) as run:
        yield OpenPage(wait_for_page(run, f"http://127.0.0.1:{port}/"))


def wait_for_page(run, address):
    """Wait until a page answers at an address, and return the address."""
    limit = time.monotonic() + TIMEOUT
    while run.process.poll() is None and time.monotonic() < limit:
        try:
            httpx.get(f"{address}config", timeout=5).raise_for_status()
            return address
        except httpx.HTTPError:
            time.sleep(0.05)
    raise RuntimeError(f"app.py does not open its page: {run.done.stderr[-1000:]}")


def page_open(place, folder, expected, *more):
    """A page that is asked in every stage of a training which replaces its files, and afterwards. It goes on with what it loaded.

    folder: holds a memory, which the training with these further arguments replaces by the expected one.
    """
    outcome, names, asked = Outcome("a page open during a training"), {path.name for path in folder.glob("stages/*-*")}, []
    tell("asking: a page stays open during a training")
    with opened(place, folder) as page:
        before = page.answer()
        outcome.add("The page says at once that its memory was trained again." if page.tells_news() else None)
        with training(place, folder, *more) as run:
            for name in STAGES:
                if wait_for_stage(run, folder, name, names):
                    asked.append(SHOWN.get(stage := stage_of(folder, names), stage))
                    outcome.add(None if page.answer() == before else f"The answer was another one in {asked[-1]}.")
            done = run.ended()
        outcome.add(complaint(done) or " ".join(differences(expected, folder)))
        outcome.add(None if page.answer() == before else "The answer was another one after the training.")
        outcome.add(None if page.tells_news() else "The page does not say that its memory was trained again.")
    outcome.note = f"asked in {', '.join(dict.fromkeys(asked))}, and afterwards"
    return outcome
