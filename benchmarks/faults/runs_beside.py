"""Runs of the two scripts beside this process, so that they can be watched, stopped and disturbed."""

import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tqdm.std import TqdmDefaultWriteLock, tqdm

from faults.common import ROOT, TIMEOUT

STAGES = ("datastore", "index", "neighbours", "decoder", "report", "publish")
WHOLE = 6 * 3600  # seconds that a whole training may take
SHOWN = {"datastore": "read"}  # what a stage does, where that is not its name

# Copies of this process share this lock of the progress bars. One that is killed while it holds the lock would stop all others.
TqdmDefaultWriteLock.mp_lock = None
tqdm.monitor_interval = 0  # no thread that might hold another lock when this process is copied


class Forked:
    """A function in a copy of this process, which has loaded all modules. It takes signals like any other process.

    A script takes many seconds to load them. This process must never have trained, since a copy could then not train.
    """

    def __init__(self, work, out, err):
        sys.stdout.flush(), sys.stderr.flush()
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            os._exit(self.run(work, out, err))

    @staticmethod
    def run(work, out, err):
        """Call `work` with its output in two files. Returns the exit code that a script would have."""
        try:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        return code

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        return self.poll(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def main_of(name, arguments):
    """main() of a script with these arguments, to call in a copy of this process."""
    module = importlib.import_module(Path(name).stem)

    def work():
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(ROOT)
        sys.argv = [name, *map(str, arguments)]
        module.main()
    return work


class Beside:
    """A script that runs beside this process. A context manager, which kills it at the end.

    forked: in a copy of this process, which is quick. It may also be a function to call there in place of main(). Otherwise the
    script has a process of its own, as a user's.
    """

    def __init__(self, logs, forked, name, *arguments):
        """logs: a folder for what the script prints."""
        logs.mkdir(parents=True, exist_ok=True)
        self.out, self.err = logs / "out.txt", logs / "err.txt"
        arguments = [str(argument) for argument in arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.out, "w") as out, open(self.err, "w") as err:
            if forked:
                self.process = Forked(forked if callable(forked) else main_of(name, arguments), out, err)
            else:
                self.process = subprocess.Popen([sys.executable, str(ROOT / name), *arguments], cwd=ROOT, env=environment,
                                                stdout=out, stderr=err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop(9)

    def stop(self, number):
        """Send a signal and wait for the end. Returns what `ended` returns."""
        self.process.send_signal(number)
        self.process.wait()
        return self.done

    @property
    def done(self):
        """The process as subprocess.run returns it."""
        return subprocess.CompletedProcess([], self.process.returncode, self.out.read_text(errors="replace"),
                                           self.err.read_text(errors="replace"))

    def ended(self, seconds=None):
        """Wait for the end. Returns the process as subprocess.run does. A run that takes too long is killed, with code -9."""
        limit = time.monotonic() + (seconds or TIMEOUT)
        while self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        return self.stop(9)

    def has_planned(self):
        return "plan:" in self.out.read_text(errors="replace")


def new_stages(folder, name, earlier=()):
    """The folders of a stage, without those of an earlier memory."""
    return [path for path in folder.glob(f"stages/{name}-*") if path.name not in earlier]


def stage_of(folder, earlier=()):
    """The first stage that is not done in a folder of artefacts. earlier: the names of an earlier memory's stage folders."""
    for name in STAGES[:-1]:
        if not any((path / "done.json").exists() for path in new_stages(folder, name, earlier)):
            return name
    return "publish"


def wait_for_stage(run, folder, wanted, earlier=(), every=0.001):
    """Wait until a training is in a stage or beyond it. Returns whether it still runs."""
    planned = False
    while run.process.poll() is None:
        planned = planned or run.has_planned()
        if planned:
            now = stage_of(folder, earlier)
            begun = now == "publish" or bool(new_stages(folder, now, earlier))
            if STAGES.index(now) > STAGES.index(wanted) or (now == wanted and begun):
                return True
        time.sleep(every)
    return False


def tell(text):
    print(text, file=sys.stderr, flush=True)


def training(place, folder, *more):
    """The training of a place into a folder, beside this process."""
    return Beside(folder.with_name(f"{folder.name}.logs"), place.short, "train_memory_decoder.py", *place.training, *more,
                  "--output_dir", folder)


def finished(place, folder, *more):
    """Let a training end. Returns the finished process."""
    with training(place, folder, *more) as run:
        return run.ended(WHOLE)


def complaint(done):
    """A sentence for a training that did not end well, else None."""
    return None if done.returncode == 0 else f"The same command ended with exit code {done.returncode}: {last_line(done.stderr)}"


def last_line(text):
    return next((line for line in reversed(text.splitlines()) if line.strip()), "(nothing)")[:300]
