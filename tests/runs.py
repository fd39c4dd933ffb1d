"""Runs of both scripts, and what they leave on disk, for the test files that share them."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

import train_memory_decoder as script
from datastore import read_examples


def command_line(base_model, dataset, folder, *more, small=SMALL):
    """The arguments of a small training into a folder. Arguments that are added win."""
    return [str(part) for part in ("--base_model", base_model, "--dataset", dataset, "--output_dir", folder, *small, *more)]


def train_six(base_model, dataset, folder, *more):
    """Train in this process, on six rows by default. Returns the folder."""
    script.run(script.parse_options(command_line(base_model, dataset, folder, "--max_examples", 6, *more)))
    return Path(folder)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    """Checksums of all files below a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def stored_rows(folder):
    return [example.row for example in read_examples(folder / "examples.jsonl")]


def entry_places(folder):
    """(row, position) of every entry."""
    with np.load(folder / "datastore_entries.npz") as entries:
        return list(zip(entries["example"].tolist(), entries["position"].tolist(), strict=True))


def losses(folder):
    """Rows of (step, loss, kl, ce) that the decoder's stage has recorded."""
    return json.loads(next(folder.glob("stages/decoder-*/done.json")).read_text())["losses"]


def stop_at_call(monkeypatch, owner, name, number):
    """Make the call of owner.name with this number raise KeyboardInterrupt, as Ctrl-C would."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments, **more):
        calls.append(name)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments, **more)
    monkeypatch.setattr(owner, name, wrapped)


def the_error(code, err):
    """The one sentence on stderr, after checking that it is the only one and that the exit code is 2."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
    return errors[0].removeprefix("error: ")


def failure_of(main, name, arguments, monkeypatch, capsys):
    """The error sentence of a script's main() in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return the_error(stopped.value.code, capsys.readouterr().err)
