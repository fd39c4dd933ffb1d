"""Wrong inputs for both scripts. Each must end with exit code 2 and one sentence, and nothing may be written.

The tables are in wrong_flags.py and wrong_data.py. Each script runs in a copy of this process.
"""

import hashlib
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from faults import wrong_data, wrong_flags
from faults.common import Outcome
from faults.runs_beside import Beside, main_of, tell
from faults.wrong_files import make_files

SPREAD = 130  # cases of the short form
SECONDS = 120  # that a refusal may take before it is counted as a hang
LONGEST = 700  # characters of a sentence
TRAIN, CHAT = "train_memory_decoder.py", "app.py"
PROGRESS = re.compile(r"%\||\d+(it| examples) \[")  # a progress bar


class Wrong(NamedTuple):
    """One wrong input: its kind, the script, the arguments, and more environment variables."""

    kind: str
    script: str
    arguments: tuple
    environment: MappingProxyType = MappingProxyType({})

    def __str__(self):
        variables = "".join(f"{name}={value!r} " for name, value in self.environment.items())
        return variables + self.script + " " + " ".join(ascii(part)[:60] for part in self.arguments)


def all_cases():
    """The whole table."""
    asking = ("--ask", wrong_flags.QUESTION)
    found = [Wrong("flags of training", TRAIN, case) for case in wrong_flags.TRAINING]
    found += [Wrong("flags of the chat", CHAT, (*asking, *case)) for case in wrong_flags.CHAT]
    found += [Wrong("flags of the page", CHAT, case) for case in wrong_flags.PAGE]
    found += [Wrong("flags that contradict", TRAIN, case) for case in wrong_flags.PAIRS]
    found += [Wrong("changes of a memory", TRAIN, case) for case in wrong_flags.CHANGES]
    found += [Wrong("data", TRAIN, case) for case in wrong_data.DATA]
    found += [Wrong("templates", TRAIN, case) for case in wrong_data.TEMPLATES]
    found += [Wrong("models", TRAIN, case) for case in wrong_data.MODELS]
    found += [Wrong("models and memories of the chat", CHAT, (*asking, *case)) for case in wrong_data.CHAT_MODELS]
    found += [Wrong("paths and rights", TRAIN, case) for case in wrong_data.PATHS]
    found += [Wrong("environment", TRAIN, case, more) for more, case in wrong_data.TRAINING_ENVIRONMENTS]
    return found + [Wrong("environment", CHAT, case, more) for more, case in wrong_data.CHAT_ENVIRONMENTS]


def spread(cases, count, seed=0):
    """So many of the cases, some of every kind, in the order of the table."""
    draw, kinds = random.Random(seed), Counter(case.kind for case in cases)
    found = []
    for kind, there in kinds.items():
        own = [number for number, case in enumerate(cases) if case.kind == kind]
        found += draw.sample(own, min(there, max(3, round(count * there / len(cases)))))
    return [cases[number] for number in sorted(found)]


class Field:
    """A folder with all wrong files, a memory that must stay as it is, and a place where nothing may appear."""

    def __init__(self, work, training, memory):
        """work: an empty folder. training: arguments that train on rows with a model. memory: the folder that they filled."""
        self.folder, self.logs = work / "field", work / "logs"
        self.folder.mkdir(parents=True)
        values = dict(zip(training[::2], training[1::2], strict=True))
        self.model, self.rows = Path(values["--base_model"]), Path(values["--dataset"])
        make_files(self.folder, self.rows, self.model, memory)
        self.memory = shutil.copytree(memory, self.folder / "trained")
        self.training = [*training]

    def arguments(self, case, number):
        """The whole command line of a case. A training writes into a new folder, or into that of the memory, in turn."""
        given = [str(self.folder / part[1:]) if part.startswith("@") else part for part in case.arguments]
        if case.script == CHAT:
            return ["--device", "cpu", *([] if "--demo" in given else ["--model_dir", str(self.memory)]), *given]
        if {"--add", "--forget"} & set(given):
            return ["--output_dir", str(self.memory), "--device", "cpu", *given]
        output = self.memory if number % 2 else self.folder / "new/out"
        return [*self.training, "--output_dir", str(output), *given]

    def contents(self):
        """What lies in the folder: of each path its kind, size and times, or a checksum if it belongs to the memory."""
        found = {}
        for folder, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                about = os.lstat(path)
                if path.startswith(f"{self.memory}/") and name in files:
                    found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                else:
                    found[path] = (about.st_mode, about.st_size, 0 if name in folders else about.st_mtime_ns)
        return found

    def tried(self, case, number=0):
        """A sentence if a case is not survived, else None."""
        before, beside = self.contents(), set(os.listdir(self.folder.parent))
        work = main_of(case.script, self.arguments(case, number))

        def alone():
            os.environ.update(dict(case.environment) | {"TOKENIZERS_PARALLELISM": "false"})  # a forked tokenizer would warn
            sys.stderr.reconfigure(errors="backslashreplace")  # as Python opens it
            torch.set_num_threads(1)  # the threads of this process are not in its copy
            work()
        with Beside(self.logs, alone, case.script) as run:
            done = run.ended(SECONDS)
        return complaint(done) or written(before, self.contents()) or appeared(beside | {"logs"}, os.listdir(self.folder.parent))


def complaint(done):
    """A sentence unless a script ended with exit code 2 and one line on standard error, which is one sentence."""
    told = [line for line in done.stderr.splitlines() if line.strip() and not PROGRESS.search(line)]
    if done.returncode != 2:
        return f"exit code {done.returncode}: {told[-1][:300] if told else done.stdout[-200:]!r}"
    if len(told) != 1 or not told[0].startswith("error: "):
        return f"{len(told)} lines on standard error: {told[:3]}"
    if not told[0].endswith(".") or len(told[0]) > LONGEST:
        return f"no sentence of at most {LONGEST} characters: {told[0][:80]!r} ... {told[0][-80:]!r}"
    return None


def written(before, after):
    """A sentence if files have appeared, gone or changed, else None."""
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return f"written: {', '.join(changed[:3])}" if changed else None


def appeared(before, after):
    more = sorted(set(after) - set(before))
    return f"written beside the folder: {', '.join(more)}" if more else None


def own_place(place):
    """A place with a tiny model, which the long form needs too: the table tries the limits of such a model."""
    if place.short:
        return place
    from soak import short_place

    folder = place.work / "tiny"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return short_place(folder)


def outcomes(place):
    tiny, cases = own_place(place), all_cases()
    chosen = spread(cases, SPREAD, place.seed) if place.short else cases
    shutil.rmtree(place.work / "inputs", ignore_errors=True)
    field, found = Field(place.work / "inputs", tiny.training, tiny.trained), {}
    for number, case in enumerate(chosen):
        outcome = found.setdefault(case.kind, Outcome(f"wrong input: {case.kind}"))
        wrong = field.tried(case, number)
        outcome.add(wrong and f"{case}: {wrong}")
        if wrong and "written" in wrong:  # the next case begins with everything as it was
            shutil.rmtree(field.folder.parent)
            field = Field(place.work / "inputs", tiny.training, tiny.trained)
        if number % 50 == 49:
            tell(f"inputs: {number + 1} of {len(chosen)}")
    return list(found.values())
