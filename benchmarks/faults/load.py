"""The page under load: many clients at once, browsers beside each other, clients that vanish, and memory over many answers.

An answer at temperature 0 is known beforehand, so one that belongs to somebody else is noticed.
"""

import contextlib
import threading
import time
from collections import defaultdict

import httpx
from gradio_client import Client
from gradio_client.utils import QueueError

from browser import chromium
from faults import page as pages
from faults.common import Outcome
from faults.page import API, call, questions, said, served, trained_folder
from faults.runs_beside import tell

# In the short form and in the long one:
CLIENTS, SECONDS = {True: 8, False: 50}, {True: 6, False: 60}
BROWSERS, TURNS = {True: 2, False: 5}, {True: 2, False: 3}
VANISH = {True: 4, False: 20}
ANSWERS, WARM = {True: 48, False: 500}, {True: 24, False: 60}
TOKENS = 8  # of a short answer
LONG = 250  # tokens of an answer whose client vanishes
LISTENED = 6  # messages that such a client reads
MOST_AFTER = 4  # tokens that are still written for it
TIE = 0.3  # nats between two candidates that rounding in bfloat16 can exchange
FLAT = 1.05  # times the memory after the first answers
WAITING = 128  # events that the queue takes
FULL = "Queue is full"
START = ("--temperature", "0", "--seed", "3", "--alpha", "0.5")


def outcomes(place):
    folder = trained_folder(place)
    with served(folder, place.work / "load", *START) as page:
        found = []
        for part in (clients, browsers, vanished, full_queue, memory):
            found.append(part(place, page))
            if wrong := page.fault():
                found[-1].add(wrong)
            tell(f"load: {found[-1].fault}, {found[-1].note}")
        return found


def values(question, tokens=TOKENS, history=None):
    """The values of the endpoint chat, in order."""
    return [question, 0.5, 0, 50, tokens, "logits", 3, 0, history]


def fingerprint(answer):
    """What tells an answer from others: its text, and its tokens with their probabilities."""
    text, logprobs = answer
    return text, [(entry["id"], entry["logprob"], entry["base_logprob"]) for entry in logprobs["content"]]


def same(one, other):
    """Whether two fingerprints are those of one answer. Its numbers may differ in their last digits."""
    near = all(a[0] == b[0] and abs(a[1] - b[1]) < 0.01 and abs(a[2] - b[2]) < 0.01 for a, b in zip(one[1], other[1], strict=False))
    return one[0] == other[0] and len(one[1]) == len(other[1]) and near


def judged(answer, own, others):
    """A sentence if an answer is not its question's own, else None."""
    found = fingerprint(answer)
    if same(found, own):
        return None
    return "It is the answer to another one's question." if any(same(found, other) for other in others) else "It is another answer."


def clients(place, page):
    """Many clients at once, each with a question of its own."""
    count = CLIENTS[place.short]
    outcome, asked = Outcome(f"an answer among {count} clients"), [f"{n}. {text}" for n, text in enumerate(questions()[:count], 1)]
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as alone:
        expected = [fingerprint(call(alone, "chat", values(question))) for question in asked]
    unlike = sum(not any(same(one, other) for other in expected[:n]) for n, one in enumerate(expected))
    visitors = [Client(page.address, verbose=False, analytics_enabled=False) for _ in asked]
    ranks, lock, end = set(), threading.Lock(), time.monotonic() + SECONDS[place.short]

    def visit(number):
        while time.monotonic() < end:
            wrong, rank = ask(visitors[number], asked[number], expected[number], expected[:number] + expected[number + 1:])
            with lock:
                outcome.add(wrong and f"client {number}: {wrong}")
                ranks.update(rank)
    threads = [threading.Thread(target=visit, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for visitor in visitors:
        visitor.close()
    if not ranks:
        outcome.add("No client was told its place in the queue.")
    outcome.note = f"{unlike} unlike questions, {SECONDS[place.short]} s, up to place {max(ranks, default=0) + 1} in the queue"
    return outcome


def ask(visitor, question, own, others):
    """(a sentence if an answer is wrong, the places in the queue that the client was told) of one question."""
    ranks = set()
    try:
        job = visitor.submit(*values(question), api_name="/chat")
        while not job.done():
            rank = job.status().rank
            ranks |= {rank} if rank is not None else set()
            time.sleep(0.05)
        return judged(job.result(timeout=pages.WAIT), own, others), ranks
    except QueueError as error:
        return (None if FULL in str(error) else str(error)), ranks
    except Exception as error:
        return f"{type(error).__name__}: {error}", ranks


def browsers(place, page):
    """Conversations in several browsers, turn by turn at the same time."""
    count, turns = BROWSERS[place.short], TURNS[place.short]
    outcome, texts, shown = Outcome(f"a turn among {count} browsers"), questions(), defaultdict(list)
    asked = [[f"Visitor{n}, turn {turn}. {texts[n * turns + turn]}" for turn in range(turns)] for n in range(count)]
    with chromium() as browser:
        visits = [browser.new_context().new_page() for _ in range(count)]
        for visit in visits:
            visit.set_default_timeout(pages.WAIT * 1000)
            visit.goto(page.address)
            length = visit.locator("#max_new_tokens input[type=number]").first
            length.fill(str(TOKENS))
            length.press("Tab")
        for turn in range(turns):
            for visit, lines in zip(visits, asked, strict=True):
                visit.locator("#question textarea").fill(lines[turn])
                visit.locator("#question textarea").press("Enter")
            for visit, lines in zip(visits, asked, strict=True):
                said(visit, lines[turn])
                shown[visit].append(visit.locator("#tokens .answer").inner_text().removesuffix("(end)"))
        chats = [visit.locator("#chat").inner_text() for visit in visits]
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as alone:
        for number, (visit, lines) in enumerate(zip(visits, asked, strict=True)):
            for wrong in conversation_faults(alone, number, lines, chats[number], shown[visit], count):
                outcome.add(wrong)
    outcome.note = "each conversation asked again alone"
    return outcome


def conversation_faults(alone, number, lines, chat, shown, count):
    """For each turn of a browser a sentence if it is wrong, else None. chat: its conversation. shown: its answers, by turns."""
    history, place = [], 0
    foreign = [f"Visitor{n}," for n in range(count) if n != number and f"Visitor{n}," in chat]
    for line, answer in zip(lines, shown, strict=True):
        wrong = f"It shows a question of {foreign[0]}" if foreign else None
        for part in (line, answer):
            at = words(chat).find(words(part), place)
            wrong = wrong or (f"It does not show {part!r} there." if at < 0 else None)
            place = max(place, at)
        text, logs = call(alone, "chat", values(line, history=history))
        rounded = words(answer) != words(text)
        if rounded and not near_tie(answer, logs["content"]):
            wrong = wrong or f"Its answer is {answer!r}, and {text!r} when asked alone."
        history.append([line, answer if rounded else text])
        yield wrong and f"browser {number}: {wrong}"


def near_tie(answer, tokens):
    """Whether an answer parts from these tokens where two candidates are equally likely but for rounding.

    A conversation that is kept and one that is read anew differ in their last digits.
    """
    text = ""
    for token in tokens:
        if token["token"] and words(answer).startswith(words(text + token["token"])):
            text += token["token"]
            continue
        rest = words(answer)[len(words(text)):]
        others = [other for other in token["top_logprobs"] if other["id"] != token["id"]
                  and (rest.startswith(words(other["token"])) if words(other["token"]) else not rest)]
        return any(token["logprob"] - other["logprob"] < TIE for other in others)
    return False


def words(text):
    """A text without spaces and line ends, which a browser shows in its own way."""
    return "".join(text.split()).replace("·", "")


def vanished(place, page):
    """Clients that close their connection in the middle of a long answer."""
    outcome, after, texts = Outcome("a client that vanishes"), [], questions()
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
        for number in range(VANISH[place.short]):
            event = visitor.post(f"{API}/call/chat", json={"data": values(texts[number], LONG)}).json()["event_id"]
            with httpx.stream("GET", f"{page.address}{API}/call/chat/{event}", timeout=pages.WAIT) as stream:
                lines = (line for line in stream.iter_lines() if line.startswith("data: "))
                heard = sum(1 for _, line in zip(range(LISTENED), lines, strict=False))
                before = page.written
            answer = call(visitor, "chat", values(texts[number]))
            after.append(page.written - before - len(answer[1]["content"]))
            outcome.add(late(heard, after[-1]))
    outcome.note = f"at most {max(after)} tokens were written afterwards, of up to {LONG}"
    return outcome


def late(heard, after):
    """A sentence if too many tokens were written for a client that had gone, else None."""
    if heard < LISTENED:
        return f"The answer ended after {heard} messages already."
    return None if after <= MOST_AFTER else f"{after} tokens were still written for it."


def full_queue(place, page):
    """More events than the queue takes, all at once. Those that are too many are refused in words."""
    outcome, text = Outcome("an event in a full queue"), questions()[0]
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
        event = {"data": values(text, LONG), "session_hash": "many"}
        answers = [visitor.post(f"{API}/call/chat", json=event) for _ in range(WAITING + 12)]
        refused = [answer for answer in answers if answer.status_code != 200]
        for answer in refused:
            outcome.add(None if answer.status_code == 503 and FULL in answer.text else f"{answer.status_code}: {answer.text[:200]}")
        if not 5 <= len(refused) <= 12:
            outcome.add(f"{len(refused)} of {len(answers)} events were refused.")
        event = answers[0].json()["event_id"]
        with contextlib.suppress(httpx.HTTPError), visitor.stream("GET", f"{API}/call/chat/{event}") as stream:
            next(stream.iter_lines())
        outcome.add(None if call(visitor, "chat", values(text))[0] is not None else "No answer came after the clients had gone.")
    outcome.note = f"{WAITING} wait; all were dropped when their client vanished"
    return outcome


def memory(place, page):
    """Memory over many answers, to clients that stay and to clients that come once."""
    count, warm, texts = ANSWERS[place.short], WARM[place.short], questions()
    outcome, held = Outcome("an answer, while memory stays flat"), []
    client = Client(page.address, verbose=False, analytics_enabled=False)
    with httpx.Client(base_url=page.address, timeout=pages.WAIT) as visitor:
        for number in range(warm + count):
            data = values(texts[number % len(texts)], 2 * TOKENS)
            try:
                client.predict(*data, api_name="/chat") if number % 2 else call(visitor, "chat", data)
            except Exception as error:
                outcome.add(f"{type(error).__name__}: {error}")
            held.append(page.memory)
            if number >= warm:
                outcome.add(grown(held[warm - 1], held[-1]))
    client.close()
    outcome.note = f"{held[warm - 1] / 1e6:.0f} MB, then at most {max(held[warm:]) / held[warm - 1]:.3f} times as much"
    return outcome


def grown(before, now):
    return None if now <= FLAT * before else f"The process holds {now / before:.2f} times what it held."
