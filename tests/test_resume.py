"""Stopped runs of script 1 go on, and end like a run that was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import command_line, entry_places, losses, stop_at_call, stored_rows, train_six

import datastore
import search
import train_memory_decoder as script
import training
from memory_decoder import MemoryDecoder, read_manifest
from search import TrainingDatastore
from support import shards
from support.command import Terminated, UserError, terminated
from texts import ORIGINAL, Template, windows_of


@pytest.fixture(scope="module", autouse=True)
def several_shards():
    """Make a few thousand entries take several shards to read and to search, so that a run can be stopped between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "SEARCH_CHUNK", 500)
        patch.setattr(datastore, "SHARD_BATCHES", 1)
        yield


@pytest.fixture
def train(tiny_gemma, rows_file):
    """Trains in this process into a folder, on six rows."""
    return lambda folder, *more: train_six(tiny_gemma, rows_file, folder, *more)


@pytest.fixture(scope="module")
def six_rows(tiny_gemma, rows_file, several_shards, tmp_path_factory):
    """A folder that an uninterrupted training on six rows has filled."""
    return train_six(tiny_gemma, rows_file, tmp_path_factory.mktemp("six") / "out")


def assert_same_training(a, b):
    """Both folders hold the same entries, index, decoder weights and perplexities, except for the last bits of numbers."""
    for name in ("datastore_values.npy", "examples.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert entry_places(a) == entry_places(b)
    keys = [faiss.read_index(str(folder / "faiss_index.bin")) for folder in (a, b)]
    np.testing.assert_allclose(*(index.reconstruct_n(0, index.ntotal) for index in keys), rtol=2e-3, atol=1e-4)
    first, second = (MemoryDecoder.load(folder / "memory_decoder.pt") for folder in (a, b))
    assert first.sizes == second.sizes
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-3, atol=1e-4)  # one step moves them by 1e-2
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    assert (one["entries"], one["k"]) == (other["entries"], other["k"])
    assert one["held_out"] == pytest.approx(other["held_out"], rel=1e-3)


def interrupt(monkeypatch, train, folder, *stop):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_call(patch, *stop)
        train(folder)


def count_calls(monkeypatch, owner, name):
    """A list that grows with every call of owner.name."""
    real, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *a, **more: (calls.append(name), real(*a, **more))[1])
    return calls


def test_keys_go_on_where_they_were_stopped(six_rows, train, tmp_path, base, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, datastore, "hidden_batches", 4)
    again = count_calls(monkeypatch, datastore, "hidden_batches")
    train(folder)
    windows = len(windows_of(base, stored_rows(folder), Template.parse(ORIGINAL), 96))
    assert len(again) == -(-windows // 8) - 3 > 2
    assert_same_training(six_rows, folder)


def test_a_search_goes_on_where_it_was_stopped(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, TrainingDatastore, "search_others", 3)
    done = next(folder.glob("stages/neighbours-*/neighbours_done_0.json")).read_text()
    written = count_calls(monkeypatch, search, "write_rows")  # D and I of every shard
    train(folder)
    entries = len(np.load(folder / "datastore_values.npy"))
    assert done == "[[0, 500], [500, 1000]]" and len(written) == 2 * -(-(entries - 1000) // 500)
    assert_same_training(six_rows, folder)


def test_a_search_killed_while_it_notes_its_progress_can_go_on(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, script, "build_index", 1)
    interrupt(monkeypatch, train, folder, shards, "write_atomically", 3)
    assert next(folder.glob("stages/neighbours-*/neighbours_done_0.json")).read_text() == "[[0, 500], [500, 1000]]"
    train(folder)
    assert_same_training(six_rows, folder)


def test_the_decoder_goes_on_from_its_last_epoch(six_rows, train, tmp_path, monkeypatch):
    folder, steps = tmp_path / "out", losses(six_rows)[-1][0]
    assert steps % 2 == 0 and steps > 6  # two epochs
    interrupt(monkeypatch, train, folder, training.Batches, "__call__", steps // 2 + 3)
    assert next(folder.glob("stages/decoder-*/checkpoint.pt")).exists()
    again = count_calls(monkeypatch, training.Batches, "__call__")
    train(folder)
    assert len(again) == steps // 2
    assert_same_training(six_rows, folder)
    assert not list(folder.glob("stages/decoder-*/checkpoint*"))


def test_a_checkpoint_in_the_middle_of_an_epoch_changes_nothing(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)  # after every step
    interrupt(monkeypatch, train, folder, training.Batches, "__call__", 4)
    again = count_calls(monkeypatch, training.Batches, "__call__")
    train(folder)
    assert len(again) == losses(six_rows)[-1][0] - 3
    assert_same_training(six_rows, folder)


@pytest.mark.parametrize("length", [0, 100])
def test_a_checkpoint_that_a_power_cut_left_short_begins_the_decoder_anew(length, six_rows, train, tmp_path, monkeypatch, capsys):
    folder, steps = tmp_path / "out", losses(six_rows)[-1][0]
    interrupt(monkeypatch, train, folder, training.Batches, "__call__", steps // 2 + 3)
    os.truncate(next(folder.glob("stages/decoder-*/checkpoint.pt")), length)
    again = count_calls(monkeypatch, training.Batches, "__call__")
    train(folder)
    assert len(again) == steps and "the checkpoint of the decoder is damaged" in capsys.readouterr().out
    assert_same_training(six_rows, folder)


def test_notes_that_a_power_cut_left_short_count_as_none(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, datastore, "hidden_batches", 4)
    os.truncate(next(folder.glob("stages/datastore-*/keys_done_0.json")), 1)
    train(folder)
    assert_same_training(six_rows, folder)


def test_a_training_of_one_step_learns(train, tmp_path):
    step = ("--num_epochs", 1, "--batch_size", 999)
    first, second = (train(tmp_path / rate, *step, "--decoder_lr", rate) for rate in ("1e-2", "1e-3"))
    assert losses(first)[-1][0] == 1
    first, second = (MemoryDecoder.load(folder / "memory_decoder.pt").blocks[0].qkv.weight for folder in (first, second))
    assert not torch.equal(first, second)


def test_a_run_stopped_between_two_artefacts_does_not_look_whole(six_rows, train, tmp_path, monkeypatch):
    folder = shutil.copytree(six_rows, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = os.replace
        patch.setattr(os, "replace", lambda a, b: interrupted() if Path(b) == folder / "datastore_values.npy" else real(a, b))
        train(folder, "--decoder_lr", 2e-3)
    assert read_manifest(folder) is None
    train(folder, "--decoder_lr", 2e-3)
    assert read_manifest(folder)["options"]["decoder_lr"] == 2e-3
    assert not list(folder.rglob("*.part"))


def interrupted():
    raise KeyboardInterrupt


AT_THE_FOURTH_READ = """
import os, signal, time, datastore, train_memory_decoder
real, calls = datastore.hidden_batches, []
def batches(*arguments):
    calls.append(1)
    if len(calls) == 4:
        {}
    return real(*arguments)
datastore.hidden_batches, datastore.SHARD_BATCHES = batches, 1
train_memory_decoder.main()
"""
KILLED = AT_THE_FOURTH_READ.format("os.kill(os.getpid(), signal.SIGKILL)")
WAITS = AT_THE_FOURTH_READ.format("print('waits', flush=True), time.sleep(300)")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_as_an_uninterrupted_one_once_started_again(six_rows, tiny_gemma, rows_file, train, tmp_path):
    folder = tmp_path / "out"
    arguments = command_line(tiny_gemma, rows_file, folder, "--max_examples", 6)
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert next(folder.glob("stages/datastore-*/keys_done_0.json")).read_text() == "[[0, 8], [8, 16], [16, 24]]"
    assert_same_training(six_rows, train(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process at once")
def test_a_run_that_is_told_to_end_leaves_the_folder_to_the_same_command(six_rows, tiny_gemma, rows_file, train, tmp_path):
    folder = tmp_path / "out"
    arguments = command_line(tiny_gemma, rows_file, folder, "--max_examples", 6)
    with subprocess.Popen([sys.executable, "-c", WAITS, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert any(line == "waits\n" for line in process.stdout)
        with pytest.raises(UserError, match="Another training"):
            train(folder)
        process.terminate()
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and err.rstrip().endswith("\nStopped; the same command goes on from here.")
    assert "Traceback" not in err
    assert next(folder.glob("stages/datastore-*/keys_done_0.json")).read_text() == "[[0, 8], [8, 16], [16, 24]]"
    assert_same_training(six_rows, train(folder))


@pytest.fixture
def sigterm():
    """SIGTERM has its default effect at first. After the test it has the earlier one again."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_does_not_disturb_the_first(sigterm):
    signal.signal(signal.SIGTERM, terminated)
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("several", [False, True])
def test_one_of_several_processes_leaves_sigterm_as_it_is(sigterm, monkeypatch, several):
    monkeypatch.setattr(script, "run", lambda options: None)
    monkeypatch.setattr(sys, "argv", ["train_memory_decoder.py"])
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (launched if several else {}).items():
        monkeypatch.setenv(name, value)
    script.main()
    assert signal.getsignal(signal.SIGTERM) == (signal.SIG_DFL if several else terminated)


def test_control_c_says_that_the_same_command_goes_on(tiny_gemma, rows_file, tmp_path, monkeypatch, capsys, sigterm):
    stop_at_call(monkeypatch, script, "build_neighbours", 1)
    arguments = command_line(tiny_gemma, rows_file, tmp_path / "out", "--max_examples", 4)
    monkeypatch.setattr(sys, "argv", ["train_memory_decoder.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.rstrip().endswith("Stopped; the same command goes on from here.")
