"""Trainings that are told to end, left without disk, or started twice into one folder, in every stage."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections import Counter

from faults.asking import no_answer, page_open
from faults.common import Outcome, refusal
from faults.runs_beside import SHOWN, STAGES, Beside, complaint, finished, stage_of, tell, training, wait_for_stage
from faults.same import differences

STOPPED = "Stopped; the same command goes on from here."
SHORTER = ("--max_examples", "24", "--num_epochs", "2", "--validation_fraction", "0.01")  # the long form, in minutes
OTHER = ("--seed", "1")  # another memory than the earlier one, in all of its stages
TRIES = 5
FILE_SYSTEM = {True: 2**26, False: 2**31}  # bytes of the small disk, in the short and in the long form; it takes memory


def shorter(place):
    return () if place.short else SHORTER


def undisturbed(place):
    """Two folders that are trained without a fault: the earlier memory, and what the disturbed command must make."""
    made = []
    for name, more in (("earlier", ()), ("expected", OTHER)):
        folder = place.work / name
        if name == "earlier" and place.short and place.trained:
            shutil.copytree(place.trained, folder, dirs_exist_ok=True)
        elif not (folder / "config.json").exists():
            tell(f"stopped: an undisturbed training into {folder.name}")
            done = finished(place, folder, *shorter(place), *more)
            if done.returncode:
                raise RuntimeError(f"The undisturbed training failed: {done.stderr[-2000:]}")
        made.append(folder)
    return made


def copied(earlier, folder):
    """A fresh copy of an earlier memory, and the names of its stage folders."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(earlier, folder)
    return {path.name for path in folder.glob("stages/*-*")}


def in_stage(place, folder, name, earlier, work):
    """Run the disturbed command until a stage, do `work(run)`, and return (the stage it fell into, what work returned).

    The stage is None if the run ended before, TRIES times.
    """
    for _ in range(TRIES):
        with training(place, folder, *shorter(place), *OTHER) as run:
            if wait_for_stage(run, folder, name, earlier):
                stage = stage_of(folder, earlier)
                return stage, work(run)
    return None, None


def sigterm(place, earlier, expected):
    """SIGTERM in each stage. Meanwhile the earlier memory still answers. In the end the command makes what it should."""
    outcome, folder, fell = Outcome("SIGTERM in each stage"), place.work / "told", []
    names = copied(earlier, folder)
    for name in STAGES:
        stage, done = in_stage(place, folder, name, names, lambda run: run.stop(signal.SIGTERM))
        if stage is None:
            outcome.add(f"The run ended before it could be stopped in {name}.")
            continue
        fell.append(SHOWN.get(stage, stage))
        outcome.add(wrong_stop(done) or no_answer(place, folder))
    end_well(place, folder, expected, outcome)
    outcome.note = in_stages(fell)
    return outcome


def wrong_stop(done):
    """A sentence if a run did not end as one that is told to should, else None."""
    if done.returncode != 143 or not done.stderr.rstrip().endswith(STOPPED) or "Traceback" in done.stderr:
        return f"SIGTERM led to exit code {done.returncode} and {done.stderr[-300:]!r}"
    return None


def in_stages(fell):
    return "in " + ", ".join(f"{name} {count}" for name, count in Counter(fell).items())


def end_well(place, folder, expected, outcome):
    """Let the same command end. A wrong end is one more fault that was not survived."""
    done = finished(place, folder, *shorter(place), *OTHER)
    if wrong := complaint(done) or " ".join(differences(expected, folder)):
        outcome.add(f"afterwards: {wrong}")


def full_disk(place, earlier, expected):
    """A full disk in each stage: one sentence, the earlier memory still answers, and with room again the command ends well."""
    outcome, draw, fell = Outcome("a full disk in each stage"), random.Random(place.seed), []
    with small_disk(place.work / "disk", FILE_SYSTEM[place.short]) as disk:
        if disk is None:
            outcome.note = "skipped: this user cannot mount a small disk"
            return outcome
        folder, filler = disk / "out", disk / "filler"
        names = copied(earlier, folder)
        for name in STAGES:
            left = draw.choice((0, 4096, 32768))
            stage, done = in_stage(place, folder, name, names, lambda run, left=left: fill_and_go_on(run, filler, left))
            if stage:
                fell.append(SHOWN.get(stage, stage))
                outcome.add(wrong_refusal(done) or no_answer(place, folder))
            else:
                outcome.add(f"The run ended before the disk was full in {name}.")
            filler.unlink(missing_ok=True)
        end_well(place, folder, expected, outcome)
    outcome.note = in_stages(fell)
    return outcome


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes in a folder. None where it cannot be mounted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_and_go_on(run, filler, left):
    """Stop a run, fill its disk but for so many bytes, and let it go on to its end."""
    run.process.send_signal(signal.SIGSTOP)
    # The run may still end a write that it has begun, and take the last bytes itself.
    with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
        disk = os.statvfs(filler.parent)
        free = max(0, disk.f_bavail * disk.f_bsize - left)
        for size in (2**20,) * (free // 2**20) + (4096,) * (free % 2**20 // 4096):
            file.write(bytes(size))
    run.process.send_signal(signal.SIGCONT)
    return run.ended(3600)


def wrong_refusal(done):
    sentence = refusal(done)
    return None if sentence and "full" in sentence else f"A full disk led to exit code {done.returncode}: {done.stderr[-500:]!r}"


def open_page(place, earlier, expected):
    """A page over the earlier memory while the disturbed command replaces it."""
    copied(earlier, place.work / "open")
    return page_open(place, place.work / "open", expected, *shorter(place), *OTHER)


def second_run(place, expected):
    """A second run into the folder of a first one, in each stage, and two at the same moment."""
    outcome, folder, fell = Outcome("a second run into one folder"), place.work / "twice", []
    shutil.rmtree(folder, ignore_errors=True)
    with training(place, folder, *shorter(place), *OTHER) as first:
        for name in STAGES:
            if wait_for_stage(first, folder, name):
                first.process.send_signal(signal.SIGSTOP)  # the second one gets its turn in this very stage
                fell.append(SHOWN.get(stage := stage_of(folder), stage))
                outcome.add(not_refused(place, folder))
                first.process.send_signal(signal.SIGCONT)
        done = first.ended(3600)
    outcome.add(complaint(done) or " ".join(differences(expected, folder)))
    shutil.rmtree(folder, ignore_errors=True)
    outcome.add(at_once(place, folder, expected))
    outcome.note = in_stages(fell) + ", the first one's end, and two begun at once"
    return outcome


def not_refused(place, folder):
    """A sentence if a second run is not refused, else None."""
    with Beside(folder.with_name("second.logs"), place.short, "train_memory_decoder.py", *place.training, *shorter(place), *OTHER,
                "--output_dir", folder) as second:
        done = second.ended()
    was_refused = "Another training" in (refusal(done) or "")
    return None if was_refused else f"The second run ended with {done.returncode}: {done.stderr[-300:]}"


def at_once(place, folder, expected):
    """A sentence unless one of two runs that begin at once is refused and the other one ends well."""
    arguments = ("train_memory_decoder.py", *place.training, *shorter(place), *OTHER, "--output_dir", folder)
    with Beside(folder.with_name("one.logs"), place.short, *arguments) as one, \
            Beside(folder.with_name("two.logs"), place.short, *arguments) as two:
        ends = [run.ended(3600) for run in (one, two)]
    refused = [done for done in ends if "Another training" in (refusal(done) or "")]
    if len(refused) != 1 or sorted(done.returncode for done in ends) != [0, 2]:
        return f"Two runs at once ended with {[done.returncode for done in ends]}: {ends[0].stderr[-200:]} {ends[1].stderr[-200:]}"
    return " ".join(differences(expected, folder)) or None
