"""The same seed gives the same result: a training is repeated, and answers are, in other processes and after other questions.

Nothing here is compared up to rounding. With one thread, and on one machine, every byte is the same.
"""

import json
from pathlib import Path

import app
from chat import EVERY_RULE
from faults.asking import QUESTION, answered
from faults.common import Outcome, script
from faults.files import loaded_once
from faults.killed import reference
from faults.runs_beside import complaint, finished, tell
from memory_decoder import read_manifest

SEEDS = {True: (3,), False: (3, 4, 5)}  # the short form, the long form
OTHERS = ("May I keep a cat?", "Who pays when a pipe bursts?")  # asked in between
TIMES = ("seconds", "resumed", "peak_memory_bytes")  # of metrics.json, which differ from run to run
# Files that hold times, names of folders or checksums of such files. What counts of metrics.json is compared by itself.
APART = ("metrics.json", "config.json", "done.json", "report.md", ".lock")


def outcomes(place):
    whole = reference(place)
    found = [trained_again(place, whole), asked_again(place, whole)]
    with loaded_once(read_manifest(whole)):
        return [*found, probabilities_again(place, whole), after_others(whole)]


def unequal(a, b):
    """What is not the same in two folders that one command has filled, as a list of names. Files are compared byte by byte."""
    names = sorted({path.relative_to(folder) for folder in (a, b) for path in folder.rglob("*")
                    if path.is_file() and path.name not in APART})
    found = [str(name) for name in names if not all((folder / name).exists() for folder in (a, b))
             or (a / name).read_bytes() != (b / name).read_bytes()]
    counts = [without_times(folder / "metrics.json") for folder in (a, b)]
    return found + sorted(name for name in counts[0].keys() | counts[1].keys() if counts[0].get(name) != counts[1].get(name))


def compared(folder):
    """The names of what `unequal` compares in a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name not in APART]


def without_times(path):
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in TIMES}


def trained_again(place, whole):
    """The same training into another folder. Each file counts, and metrics.json without its times."""
    outcome, folder = Outcome("the same training again"), place.work / "again"
    if not (folder / "config.json").exists():
        tell("repeat: the same training again")
        if wrong := complaint(finished(place, folder)):
            outcome.add(wrong)
            return outcome
    different = unequal(whole, folder)
    for path in compared(whole):
        name = str(path.relative_to(whole))
        outcome.add(f"{name} is not the same." if name in different else None)
    rest = [name for name in different if not (whole / name).exists()]
    outcome.add(f"metrics.json differs in {', '.join(rest)}." if rest else None)
    outcome.note = "every file, byte by byte"
    return outcome


def asked_again(place, whole):
    """The same question in two processes of their own, as a user starts them."""
    outcome = Outcome("the same question in another process")
    for seed in SEEDS[place.short]:
        for rule in EVERY_RULE[::2] if place.short else EVERY_RULE:
            settings = ("--device", "cpu", "--temperature", 1, "--seed", seed, "--rule", rule, "--ask", QUESTION)
            first, second = (script("app.py", "--model_dir", whole, *settings) for _ in range(2))
            wrong = complaint(first) or complaint(second)
            outcome.add(wrong or (None if first.stdout == second.stdout else f"Rule {rule}, seed {seed}: another text."))
    outcome.note = "the text"
    return outcome


def probabilities_again(place, whole):
    """The same question in two copies of this process: the text, all probabilities, and the passages."""
    outcome = Outcome("the same question, with its probabilities")
    first, second = (answered(place, whole) for _ in range(2))
    outcome.add(complaint(first) or complaint(second) or (None if first.stdout == second.stdout else "Another answer."))
    outcome.note = "every digit of every token and passage"
    return outcome


def record(chat, question, rule, seed, turns=()):
    """An answer as data, without the seconds that it took."""
    answer = chat.begin(question, turns, rule=rule, seed=seed, alpha=0.5, temperature=1, max_new_tokens=24)
    for _ in chat.write(answer):
        pass
    return chat.trace(answer).record() | {"seconds": 0}


def after_others(whole):
    """A question before and after other conversations with one and the same chat."""
    outcome = Outcome("the same question after other conversations")
    chat = open_chat(whole)
    for rule in EVERY_RULE:
        first = record(chat, QUESTION, rule, 3)
        for other in OTHERS:
            record(chat, other, rule, 4, [(QUESTION, first["answer"])])
        outcome.add(None if record(chat, QUESTION, rule, 3) == first else f"Rule {rule}: another answer.")
    outcome.note = "every digit of every token and passage"
    return outcome


def open_chat(folder):
    options = app.parse_options(["--model_dir", str(Path(folder)), "--device", "cpu"])
    return app.Chat.open(options, read_manifest(folder))
