"""Files of a trained folder that lose a byte, their end, or all. Each is refused by name, or made anew, or was harmless.

An artefact is judged by app.py, which answers a question. A file of a stage is judged by the same training command.
"""

import random
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from base_model import BaseLM
from faults.asking import answered
from faults.common import Outcome, refusal
from faults.killed import reference
from faults.runs_beside import Beside, complaint, tell
from faults.same import differences
from memory_decoder import read_manifest
from stages import damaged_file
from support.sealed import unsealed

ARTEFACTS = {True: 24, False: 200}  # flips and cuts of them in the short form and in the long one; each is missing once more
STAGES = {True: 28, False: 100}
KINDS = ("flip", "flip", "flip", "cut", "cut", "missing")


def outcomes(place):
    whole = reference(place)
    with loaded_once(read_manifest(whole)):
        return damaged(place, whole, place.work / "damaged")


def damaged(place, whole, folder):
    """Damage the files of a copy of a whole folder, one after another. Returns the Outcomes of artefacts and of stages."""
    draw, artefacts, stages = random.Random(place.seed), Outcome("a damaged artefact"), Outcome("a damaged file of a stage")
    expected = answered(place, whole)
    assert expected.returncode == 0, expected.stderr
    restore(whole, folder)
    counts = {id(artefacts): Counter(), id(stages): Counter()}
    for number, (name, kind) in enumerate(planned := damages(whole, draw, place.short), 1):
        what = damage(folder / name, kind, draw)
        outcome, judge = (stages, stage_verdict) if name.parts[0] == "stages" else (artefacts, artefact_verdict)
        wrong, verdict = judge(place, whole, folder, name, expected)
        counts[id(outcome)][verdict] += 1
        outcome.add(wrong and f"{name} ({what}): {wrong}")
        restore(whole, folder, name)
        if number % 20 == 0:
            tell(f"files: {number} of {len(planned)}")
    for outcome in (artefacts, stages):
        outcome.note = ", ".join(f"{verdict} {count}" for verdict, count in counts[id(outcome)].items())
    return [artefacts, stages]


def damages(whole, draw, short):
    """(path in the folder, kind of damage) of all that is tried."""
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    artefacts = [name for name in files if name.parts[0] != "stages"]
    found = [(name, draw.choice(KINDS[:-1])) for name in dealt(artefacts, draw, ARTEFACTS[short])]
    found += [(name, "missing") for name in artefacts]
    return found + [(name, draw.choice(KINDS)) for name in dealt([n for n in files if n not in artefacts], draw, STAGES[short])]


@contextmanager
def loaded_once(manifest):
    """Let BaseLM.load in this process and its copies return the base model of a memory, which is loaded once."""
    base, before = BaseLM.load(manifest["base_model"], manifest["dtype"], "cpu"), BaseLM.__dict__["load"]
    BaseLM.load = lambda *_, **__: base
    try:
        yield
    finally:
        BaseLM.load = before


def dealt(files, draw, count):
    """So many of these files. Every one comes as often as any other."""
    found = []
    while len(found) < count:
        found += draw.sample(files, len(files))
    return found[:count]


def damage(path, kind, draw):
    """Damage a file. Returns what was done to it."""
    size = path.stat().st_size
    if kind == "missing":
        path.unlink()
        return "missing"
    if kind == "cut":
        left = draw.choice((0, draw.randrange(size)))
        with open(path, "r+b") as file:
            file.truncate(left)
        return f"cut to {left} of {size} bytes"
    place, change = draw.randrange(size), draw.randrange(1, 256)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ change]))
    return f"byte {place} from {byte} to {byte ^ change}"


def restore(whole, folder, name=None):
    """Make a folder as the whole one again. name: the file that was damaged, if a training cannot have changed others."""
    if name and (folder / name).parent.exists() and (name.parts[0] != "stages" or not trains(folder)):
        shutil.copyfile(whole / name, folder / name)
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)


def artefact_verdict(place, whole, folder, name, expected):
    """(what is wrong or None, how it ended) for a damaged artefact."""
    done = answered(place, folder)
    return judged(done, expected, folder, name)


def judged(done, expected, folder, name):
    """(what is wrong or None, how it ended), from the finished app.py of a damaged folder and of a whole one."""
    sentence = refusal(done)
    if sentence is not None:
        # Without a manifest nothing says that there is a memory, so the sentence names the folder.
        named = str(folder / name) if (folder / "config.json").exists() else str(folder)
        return (None, "refused by name") if named in sentence else (f"The sentence does not name it: {sentence}", "failed")
    if done.returncode:
        return f"app.py ended with exit code {done.returncode}: {done.stderr[-300:]}", "failed"
    return (None, "harmless") if done.stdout == expected.stdout else ("It was used, and the answer is another one.", "failed")


def stage_verdict(place, whole, folder, name, _):
    """(what is wrong or None, how it ended) for a damaged file of a finished stage.

    In the short form the same command runs. In the long form it is only asked whether the command would make the stage anew.
    """
    if not place.short:
        return noticed(whole, folder, name)
    arguments = [*place.training, "--output_dir", folder]
    with Beside(place.work / "again.logs", True, "train_memory_decoder.py", *arguments) as run:
        done = run.ended()
    wrong = complaint(done) or " ".join(differences(whole, folder)) or None
    told = f"The file {folder / name} is damaged" in done.stdout
    return wrong, "failed" if wrong else "made anew" if told else "harmless"


def noticed(whole, folder, name):
    """Like stage_verdict, without a run."""
    stage = (folder / name).parent
    if not (stage / "done.json").exists():
        return None, "not finished without it"
    if found := damaged_file(stage):
        return (None, "noticed") if found == folder / name else (f"{found} was named for it.", "failed")
    same = (stage / "done.json").exists() and unsealed(stage / "done.json") == unsealed(whole / name.parent / "done.json")
    return (None, "harmless") if same and name.name == "done.json" else ("It was not noticed.", "failed")


def trains(folder):
    """Whether a training has run in a folder since it was copied. It then names itself as the folder of its artefacts."""
    options = unsealed(folder / "config.json")["options"] if (folder / "config.json").exists() else {"output_dir": ""}
    return Path(options["output_dir"]) == folder
