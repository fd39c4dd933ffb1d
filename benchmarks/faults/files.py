"""Files of a trained folder that lose a byte, their end, or all. Each is refused by name, or made anew, or was harmless.

An artefact is judged by app.py, which answers a question. A file of a stage is judged by the same training command.
"""

import json
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import app
from base_model import BaseLM
from faults.common import Outcome, refusal
from faults.killed import reference
from faults.runs_beside import Beside, complaint, tell
from faults.same import differences
from memory_decoder import read_manifest
from stages import damaged_file
from support.sealed import unsealed

COUNT = {True: 40, False: 200}  # the short form, the long form
KINDS = ("flip", "flip", "flip", "cut", "cut", "missing")
QUESTION = "Can my landlord keep my deposit?"
SETTINGS = ("--device", "cpu", "--seed", "3", "--rule", "auto", "--temperature", "0.5")
TOKENS = 24  # of the answer that is compared


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
    counts = {}
    for number, name in enumerate(dealt(whole, draw, COUNT[place.short]), 1):
        what = damage(folder / name, draw.choice(KINDS), draw)
        in_stage = name.parts[0] == "stages"
        judge = stage_verdict if in_stage else artefact_verdict
        wrong, verdict = judge(place, whole, folder, name, expected)
        counts[in_stage, verdict] = counts.get((in_stage, verdict), 0) + 1
        (stages if in_stage else artefacts).add(wrong and f"{name} ({what}): {wrong}")
        restore(whole, folder, name)
        if number % 20 == 0:
            tell(f"files: {number} of {COUNT[place.short]}")
    for outcome, kind in ((artefacts, False), (stages, True)):
        outcome.note = ", ".join(f"{verdict} {count}" for (one, verdict), count in counts.items() if one == kind)
    return [artefacts, stages]


@contextmanager
def loaded_once(manifest):
    """Let BaseLM.load in this process and its copies return the base model of a memory, which is loaded once."""
    base, before = BaseLM.load(manifest["base_model"], manifest["dtype"], "cpu"), BaseLM.__dict__["load"]
    BaseLM.load = lambda *_, **__: base
    try:
        yield
    finally:
        BaseLM.load = before


def dealt(folder, draw, count):
    """So many paths of files below a folder, relative to it. Every file comes as often as any other."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
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
