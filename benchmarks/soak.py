"""Faults of every kind against both scripts: how many were tried, and how many were survived.

    python benchmarks/soak.py --short         # minutes, with a tiny random model: what CI runs
    python benchmarks/soak.py                 # the long forms on the demo (run `make demo` first)
    python benchmarks/soak.py --parts killed  # one part of them

Prints a table, each failure as a sentence, and last `faults tried N, survived N`. The exit code is 1 if one was not survived.
It needs requirements-dev.txt.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "benchmarks", ROOT / "tests", ROOT):  # the root comes first: stages.py is also the name of a benchmark
    sys.path.insert(0, str(folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from faults.common import Place
from faults.runs_beside import finished

PARTS = ("killed", "files", "inputs", "load", "attack", "repeat")


def short_place(work):
    """A Place with a tiny random model and a memory of twenty-four of the demo's rows."""
    from conftest import ROWS, SMALL, make_tiny_gemma
    from runs import jsonl

    rows = jsonl(work / "rows.jsonl", ROWS[::18][:24])
    training = ["--base_model", str(make_tiny_gemma(work / "model")), "--dataset", str(rows), *SMALL]
    done = finished(place := Place(work, training), work / "trained")
    assert done.returncode == 0, done.stderr
    return replace(place, trained=work / "trained")


def long_place(work, model_dir):
    return Place(work, ["--demo"], model_dir if (model_dir / "config.json").exists() else None, short=False)


def table(outcomes):
    """A Markdown table with a line for each kind of fault."""
    lines = ["| fault | tried | survived | |", "|---|---:|---:|---|"]
    lines += [f"| {outcome.fault} | {outcome.tried} | {outcome.survived} | {outcome.note} |" for outcome in outcomes]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few of each fault, with a tiny random model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model_dir", type=Path, default=ROOT / "demo/trained_models", help="the demo's memory, for long forms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder to work in that is kept, so that a stopped test goes on; default: a "
                                                  "temporary one")
    given = parser.parse_args(arguments)
    outcomes = []
    with nullcontext(given.work) if given.work else tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        work.mkdir(parents=True, exist_ok=True)
        place = short_place(work) if given.short else long_place(work, given.model_dir)
        place.seed = given.seed
        for part in given.parts:
            began = time.monotonic()
            outcomes += importlib.import_module(f"faults.{part}").outcomes(place)
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(outcomes))
    for outcome in outcomes:
        for failure in outcome.failures:
            print(f"not survived: {outcome.fault}: {failure}")
    tried, survived = sum(o.tried for o in outcomes), sum(o.survived for o in outcomes)
    print(f"faults tried {tried}, survived {survived}")
    return int(survived < tried)


if __name__ == "__main__":
    sys.exit(main())
