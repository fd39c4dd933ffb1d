"""Two processes, started by accelerate on gloo, do what one process does: the same entries, neighbours, losses and figures."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from runs import command_line, losses, stop_at_call, train_six

import datastore
import search
import train_memory_decoder as script
from memory_decoder import MemoryDecoder
from search import TrainingDatastore

# What both processes run. A launch takes many seconds, so that there is one for all tests.
BOTH = """
import sys
import datastore, search, train_memory_decoder as script
from support.command import UserError

search.SEARCH_CHUNK, datastore.SHARD_BATCHES = 500, 1
script.fast_bfloat16 = lambda device: False
root, rank = sys.argv[1], int(script.os.environ["RANK"])
real_read, real_search, calls = datastore.hidden_batches, search.TrainingDatastore.search_others, []

def train(name):
    calls.clear()
    script.run(script.parse_options([part.replace("FOLDER", f"{root}/{name}") for part in sys.argv[2:]]))

def stopped_read(*arguments):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return real_read(*arguments)

def broken_search(*arguments):
    calls.append(1)
    if rank == 1 and len(calls) == 2:
        raise UserError("The second process cannot go on.")
    return real_search(*arguments)

for name in ("two", "read by one", "searched by one"):
    train(name)
datastore.hidden_batches = stopped_read
try:
    train("read by two")
except KeyboardInterrupt:
    pass
datastore.hidden_batches, search.TrainingDatastore.search_others = real_read, broken_search
sys.argv[1:] = [part.replace("FOLDER", f"{root}/searched by two") for part in sys.argv[2:]]
calls.clear()
script.main()
"""
WHAT = {"read": "keys", "sear": "neighbours"}  # by the first letters of a folder's name


def notes(folder, name):
    """Per process, the shards that it has noted as done."""
    return {path.stem[-1]: json.loads(path.read_text()) for path in folder.glob(f"stages/*/{name}_done_*.json")}


@pytest.fixture(scope="module")
def alone(tiny_gemma, rows_file):
    """Trains in this process, as each of the two does: one thread, float32 and small shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "SEARCH_CHUNK", 500)
        patch.setattr(datastore, "SHARD_BATCHES", 1)
        patch.setattr(script, "fast_bfloat16", lambda device: False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        AcceleratorState._reset_state()  # accelerate keeps a process's first precision
        yield lambda folder: train_six(tiny_gemma, rows_file, folder, "--dropout", 0)
        AcceleratorState._reset_state()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(alone, tiny_gemma, rows_file, tmp_path_factory):
    """Folders that two processes filled, began or ended, how the launch ended, and what was noted before a run went on."""
    root, noted = tmp_path_factory.mktemp("runs"), {}
    for name, *stopped in (("read by one", datastore, "hidden_batches", 4),
                           ("searched by one", TrainingDatastore, "search_others", 4)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at_call(patch, *stopped)
            alone(root / name)
        noted[name] = notes(root / name, WHAT[name[:4]])
    (root / "both.py").write_text(BOTH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = command_line(tiny_gemma, rows_file, "FOLDER", "--max_examples", 6, "--dropout", 0)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    done = subprocess.run([*launch, root / "both.py", root, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    for name in ("read by two", "searched by two"):
        noted[name] = notes(root / name, WHAT[name[:4]])
    return SimpleNamespace(root=root, noted=noted, code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="module")
def one(alone, tmp_path_factory):
    return alone(tmp_path_factory.mktemp("alone") / "out")


def assert_same(one, other):
    for name in ("keys.f16", "datastore_values.npy", "faiss_index.bin", "neighbours_D.npy", "neighbours_I.npy"):
        a, b = (next(folder.glob(f"stages/*/{name}")).read_bytes() for folder in (one, other))
        assert a == b, name
    for row, same in zip(losses(one), losses(other), strict=True):
        assert row == pytest.approx(same, rel=1e-4)
    first, second = (MemoryDecoder.load(folder / "memory_decoder.pt").state_dict() for folder in (one, other))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)  # one step moves them by 1e-2
    figures, others = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
    for part in ("held_out", "alpha_sweep"):
        assert {name: pytest.approx(value, rel=1e-3) for name, value in figures[part].items()} == others[part]
    assert (figures["scale"], figures["entries"]) == (others["scale"], others["entries"])


def test_two_processes_make_the_entries_neighbours_losses_and_figures_of_one(one, runs):
    assert_same(one, runs.root / "two")


def test_each_of_two_processes_reads_and_searches_half(runs):
    for name in ("keys", "neighbours"):
        first, second = (shards for _, shards in sorted(notes(runs.root / "two", name).items()))
        assert abs(len(first) - len(second)) <= 1 < len(first)


@pytest.mark.parametrize("name", ["read by one", "searched by one"])
def test_two_processes_go_on_with_what_one_began(name, one, runs):
    assert_same(one, runs.root / name)
    before, after = runs.noted[name], notes(runs.root / name, WHAT[name[:4]])
    assert len(before["0"]) == 3 and after["0"][:3] == before["0"]
    assert len(after["0"]) > 3 and after["1"] and not any(shard in after["0"] for shard in after["1"])


@pytest.mark.parametrize("name", ["read by two", "searched by two"])
def test_one_process_goes_on_with_what_two_began(name, one, runs, alone, tmp_path):
    folder = shutil.copytree(runs.root / name, tmp_path / "out")
    assert_same(one, alone(folder))
    before, after = runs.noted[name], notes(folder, WHAT[name[:4]])
    assert before["0"] and after["0"][:len(before["0"])] == before["0"] and len(after["0"]) > len(before["0"])
    assert before["1"] and after["1"] == before["1"] and not any(shard in after["0"] for shard in after["1"])


def test_only_the_first_process_prints(runs):
    assert runs.out.count("template: ") == runs.out.count("plan: about") == 5 and runs.out.count("saved in") == 3


def test_an_error_in_one_process_ends_all_with_its_sentence(runs):
    assert runs.code != 0
    assert runs.err.count("error: The second process cannot go on.") == 1
    assert not (runs.root / "searched by two/config.json").exists()
