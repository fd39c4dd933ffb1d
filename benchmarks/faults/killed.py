"""Trainings that are killed at random moments. The same command must then end like a run that was never disturbed."""

import json
import random
import signal
import time
from collections import Counter

from faults import stopped
from faults.common import Outcome
from faults.runs_beside import SHOWN, STAGES, complaint, finished, stage_of, tell, training, wait_for_stage
from faults.same import differences

KILLS = {True: (1, 1, 1, 1, 1, 1), False: (7, 2, 4, 10, 4, 3)}  # in each stage: the short form, the long form
TRIES = 5  # starts for one kill, since a run may end before the kill comes


def outcomes(place):
    found = [killed(place)]
    earlier, expected = stopped.undisturbed(place)
    return [*found, stopped.sigterm(place, earlier, expected), stopped.full_disk(place, earlier, expected),
            stopped.second_run(place, expected), stopped.open_page(place, earlier, expected)]


def reference(place):
    """A folder that a training filled without a fault."""
    if place.trained:
        return place.trained
    folder = place.work / "whole"
    if not (folder / "config.json").exists():
        tell("killed: a whole training, to compare with")
        done = finished(place, folder)
        if done.returncode:
            raise RuntimeError(f"The undisturbed training failed: {done.stderr[-2000:]}")
    return folder


def moments(seed, counts, seconds):
    """(stage, seconds after its beginning) of each kill, in the order of the stages. Drawn with the seed.

    A stage that goes on where it was is spread over its kills, so that the run gets on between them. The others begin anew.
    """
    draw, found = random.Random(seed), []
    for name, count in zip(STAGES, counts, strict=True):
        goes_on = name in ("datastore", "neighbours", "decoder")
        most = min(seconds[name], 1.5 * seconds[name] / count) if goes_on else seconds[name]
        found += [(name, draw.uniform(0, most)) for _ in range(count)]
    return found


def stage_seconds(folder):
    """How long each stage took. Publishing is mostly copying."""
    size = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    return json.loads((folder / "metrics.json").read_text())["seconds"] | {"publish": 0.005 + size / 500e6}


def kill_once(place, folder, wanted, delay):
    """Start the training and kill it in a stage. Returns (the stage that the kill fell into or None, the finished process)."""
    with training(place, folder) as run:
        if wait_for_stage(run, folder, wanted, every=0.001 if place.short else 0.02):
            limit = time.monotonic() + delay
            while run.process.poll() is None and time.monotonic() < limit:
                time.sleep(min(0.05, max(0, limit - time.monotonic())))
        done = run.stop(signal.SIGKILL)
        return (stage_of(folder) if done.returncode == -signal.SIGKILL else None), done


def check_command(whole, folder):
    """Raise at once if the reference was made by another command, and not only after all kills."""
    expected = json.loads((whole / "config.json").read_text())["stages"].values()
    if others := [path.name for path in folder.glob("stages/*-*") if path.name not in expected]:
        raise RuntimeError(f"The memory in {whole} was made by another command or version, for it has no stage {others[0]}.")


def killed(place):
    """SIGKILL at random moments in all stages. The kills made are kept in a file, so that a stopped test goes on."""
    outcome, whole = Outcome("SIGKILL at random moments"), reference(place)
    folder, kept = place.work / "killed", place.work / "killed.json"
    folder.mkdir(parents=True, exist_ok=True)
    fell = json.loads(kept.read_text()) if kept.exists() else []
    planned = moments(place.seed, KILLS[place.short], stage_seconds(whole))
    for number, (wanted, delay) in enumerate(planned[len(fell):], len(fell) + 1):
        for _ in range(TRIES):
            stage, done = kill_once(place, folder, wanted, delay)
            if stage or done.returncode:
                break
        if not stage:  # it failed by itself, or no kill came in time
            outcome.add(complaint(done) or f"No kill reached the stage {wanted}.")
            break
        check_command(whole, folder)
        fell.append(SHOWN.get(stage, stage))
        kept.write_text(json.dumps(fell))
        tell(f"killed: {number} of {len(planned)}, in {fell[-1]}, {delay:.2f} s after the beginning of {SHOWN.get(wanted, wanted)}")
    done = finished(place, folder)
    wrong = complaint(done) or " ".join(differences(whole, folder))
    for _ in fell:  # all kills of a run are judged by its end
        outcome.add(wrong)
    outcome.note = "in " + ", ".join(f"{name} {count}" for name, count in Counter(fell).items())
    return outcome
