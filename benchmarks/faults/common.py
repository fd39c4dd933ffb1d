"""What all faults share: where they are tried, and how what came of them is kept."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 900  # seconds that one script may take


@dataclass
class Place:
    """Where faults are tried.

    work: an empty folder. training: arguments of train_memory_decoder.py, all but --output_dir. trained: a folder that they
    filled without a fault, or None. short: a few of each fault, for CI. seed: of the faults that are drawn.
    """

    work: Path
    training: list[str]
    trained: Path | None = None
    short: bool = True
    seed: int = 0


@dataclass
class Outcome:
    """One line of the table: a kind of fault, how often it was tried, and a sentence for each time it was not survived."""

    fault: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def survived(self):
        return self.tried - len(self.failures)

    def add(self, failure=None):
        """Count one fault. failure: what went wrong, or None if it was survived."""
        self.tried += 1
        if failure:
            self.failures.append(failure)


def script(name, *arguments, **more):
    """Run one of the two scripts with one thread, as a user would. Returns the finished process, its output as text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more.pop("env", {})
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=TIMEOUT, **more)


def refusal(done):
    """The one sentence of a script that refused, or None if it did not end with exit code 2 and one such sentence."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    clean = done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    return errors[0].removeprefix("error: ") if clean else None
