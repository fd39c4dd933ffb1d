"""Damaged files of a trained folder, and trainings that are stopped while they write. Nothing is half done or goes unnoticed."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import command_line, contents, failure_of, train_six

import app
import stages
import train_memory_decoder as script
from chat import Chat
from memory_decoder import read_manifest
from stages import Stage, check_finished, damaged_file
from support.command import Terminated, UserError, terminated, undisturbed
from support.sealed import sealed, unsealed
from support.shards import new_file
from web import page

try:
    import resource
except ImportError:  # Windows
    resource = None

sys.path.append(str(ROOT / "benchmarks"))
from faults.same import differences

OTHER = ("--seed", "1")  # another memory, in all of its stages
QUESTION = "Can my landlord keep my deposit?"
on_linux = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


DAMAGES = {"flip": flip, "cut": cut, "empty": lambda path: cut(path, 0), "missing": Path.unlink}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@pytest.fixture(scope="module")
def train(tiny_gemma, rows_file):
    """Trains in this process into a folder, on six rows."""
    return lambda folder, *more: train_six(tiny_gemma, rows_file, folder, *more)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def other(train, tmp_path_factory):
    """Another memory of the same rows."""
    return train(tmp_path_factory.mktemp("other") / "out", *OTHER)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the whole folder."""
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture
def signals():
    """Ctrl-C and SIGTERM end a training. After the test they do what they did before; a shell's background job ignores Ctrl-C."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminated}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def only(folder, name):
    """The one file of a stage."""
    stage, file = name.split("/")
    [path] = folder.glob(f"stages/{stage}-*/{file}")
    return path


# Text with a checksum


def test_a_text_with_a_checksum_is_read_as_it_was_written_and_a_changed_byte_changes_nothing_unnoticed(tmp_path):
    content, path = {"name": "ü", "numbers": [1, 2.5], "files": {"a": "0"}}, tmp_path / "file.json"
    text = sealed(content).encode()
    path.write_bytes(text)
    assert unsealed(path) == content
    noticed = 0
    for place in range(len(text)):
        for change in (1, 2, 16, 128):
            path.write_bytes(text[:place] + bytes([text[place] ^ change]) + text[place + 1:])
            try:
                found = unsealed(path)
            except ValueError:
                noticed += 1
            else:  # another name of the checksum, or another space
                assert {name: found[name] for name in content} == content
    assert noticed > 3 * len(text)


def test_a_text_of_an_earlier_version_without_a_checksum_is_read(tmp_path):
    (tmp_path / "file.json").write_text('{"k": 8}')
    assert unsealed(tmp_path / "file.json") == {"k": 8}


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"a"', "{", '{"checksum": 1}'])
def test_a_text_that_holds_no_dict_is_damaged(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError):
        unsealed(tmp_path / "file.json")


# Finished stages


@pytest.fixture
def stage(tmp_path):
    """A finished stage with two files."""
    stage = Stage(tmp_path, "index", [])
    stage.begin()
    (stage / "a.npy").write_bytes(bytes(100)), (stage / "b.txt").write_text("Flat")
    stage.finish(recall=1.0)
    return stage


@every_damage
@pytest.mark.parametrize("name", ["a.npy", "b.txt"])
def test_a_finished_stage_with_a_damaged_file_is_removed_and_the_file_named(stage, name, damage, capsys):
    damage(stage / name)
    assert damaged_file(stage.path) == stage / name
    check_finished([stage.path])
    assert not stage.path.exists()
    assert capsys.readouterr().out == f"The file {stage / name} is damaged; what it held is made anew.\n"


@pytest.mark.parametrize("damage", [DAMAGES[name] for name in ("flip", "cut", "empty")])
def test_a_finished_stage_with_damaged_facts_is_removed(stage, damage, capsys):
    damage(stage / "done.json")
    check_finished([stage.path])
    assert not stage.path.exists() and str(stage / "done.json") in capsys.readouterr().out


def test_an_undamaged_stage_stays_as_it_is_but_for_what_a_killed_run_left_over(stage, capsys):
    before = contents(stage.path)
    for name in ("checkpoint.pt", "checkpoint.part", "done.json.part", "neighbours_done_1.json"):
        (stage / name).write_bytes(b"left over")
    check_finished([stage.path, stage.path.with_name("not-there")])
    assert contents(stage.path) == before and capsys.readouterr().out == ""


def test_files_of_others_in_a_stage_may_come_change_and_go(stage, capsys):
    names = (".DS_Store", "desktop.ini", ".nfs0001")
    for name in names:
        (stage / name).write_bytes(b"a file manager's")
    stages.seal_stage(stage.path, {})
    (stage / "folder").mkdir()
    for name in names[:2]:
        flip(stage / name)
    (stage / names[2]).unlink()
    check_finished([stage.path])
    assert capsys.readouterr().out == "" and {*names[:2], "folder", "done.json"} <= {path.name for path in stage.path.iterdir()}


def test_an_unfinished_stage_keeps_all_that_it_has(stage, capsys):
    (stage / "done.json").unlink(), (stage / "checkpoint.pt").write_bytes(b"to go on from"), flip(stage / "a.npy")
    before = contents(stage.path)
    check_finished([stage.path])
    assert contents(stage.path) == before and capsys.readouterr().out == ""


def test_a_stage_of_an_earlier_version_is_sealed_and_later_damage_noticed(stage, capsys):
    (stage / "done.json").write_text('{"recall": 0.5}\n')
    (stage / "checkpoint.pt").write_bytes(b"left over")
    check_finished([stage.path])
    assert stage.facts["recall"] == 0.5 and set(stage.facts["files"]) == {"a.npy", "b.txt"} and capsys.readouterr().out == ""
    assert sorted(path.name for path in stage.path.iterdir()) == ["a.npy", "b.txt", "done.json"]
    flip(stage / "a.npy")
    assert damaged_file(stage.path) == stage / "a.npy"


@pytest.mark.parametrize(("name", "damage"), [
    ("datastore/keys.f16", "flip"), ("datastore/done.json", "cut"), ("index/faiss_index.bin", "missing"),
    ("neighbours/neighbours_I.npy", "flip"), ("decoder/memory_decoder.pt", "cut"), ("report/done.json", "missing")])
def test_the_same_command_makes_a_damaged_stage_anew(name, damage, folder, whole, train, capsys):
    path = only(folder, name)
    DAMAGES[damage](path)
    train(folder)
    said = f"The file {path} is damaged; what it held is made anew." in capsys.readouterr().out
    assert said == (not (name.endswith("done.json") and damage == "missing"))  # then nothing says that it was finished
    assert differences(whole, folder) == []


def test_all_files_of_a_training_have_checksums(whole):
    for stage in whole.glob("stages/*-*"):
        assert set(unsealed(stage / "done.json")["files"]) == {path.name for path in stage.iterdir()} - {"done.json"}
    artefacts = {path.name for path in whole.iterdir() if path.is_file()}
    assert set(read_manifest(whole)["files"]) == artefacts - {"config.json"}


# Artefacts


@pytest.mark.parametrize("change", [
    lambda text: text.replace('"k": 8', '"k": 9'), lambda text: text[:len(text) // 2], lambda _: "", lambda _: "{}"],
    ids=["another number", "cut", "empty", "without names"])
def test_a_damaged_manifest_is_refused_by_name_and_made_anew_by_the_same_command(change, folder, whole, train, monkeypatch, capsys):
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    sentence = f"The manifest {path} is damaged; train again."
    assert failure_of(app.main, "app.py", ["--model_dir", folder, "--ask", QUESTION], monkeypatch, capsys) == sentence
    train(folder)
    assert differences(whole, folder) == []


def test_the_same_command_replaces_a_damaged_artefact_from_its_stage(folder, whole, train, monkeypatch):
    path = folder / "memory_decoder.pt"
    flip(path)
    with pytest.raises(UserError, match=f"^The file {path} is damaged"):
        read_manifest(folder)
    monkeypatch.setattr(script, "train_decoder", lambda *_: pytest.fail("the decoder was trained again"))
    train(folder)
    assert differences(whole, folder) == []


# Publishing


@pytest.fixture
def unpublished(folder, train, monkeypatch):
    """A folder with a memory and another one beside it, of a run that was killed when the new manifest was written."""
    def killed(_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = stages.publish
        patch.setattr(script, "publish", lambda *a: (patch.setattr(stages, "finish_publishing", killed), real(*a)))
        train(folder, *OTHER)
    assert (folder / "config.json.part").exists()
    return folder


def test_the_next_run_finishes_what_a_killed_one_began_to_publish(unpublished, whole, other):
    assert read_manifest(unpublished) == read_manifest(whole)
    script.earlier_options(script.Options(output_dir=str(unpublished)))  # any run into the folder begins with this
    assert read_manifest(unpublished)["stages"] == read_manifest(other)["stages"]
    assert differences(other, unpublished) == [] and not list(unpublished.rglob("*.part"))


@pytest.mark.parametrize("damage", [DAMAGES[name] for name in ("flip", "cut", "empty")])
def test_a_damaged_new_manifest_is_not_put_in_place(unpublished, damage, whole, other, train):
    damage(unpublished / "config.json.part")
    stages.finish_publishing(unpublished)
    assert read_manifest(unpublished)["stages"] == read_manifest(whole)["stages"]
    train(unpublished, *OTHER)
    assert differences(other, unpublished) == []


def at_replacement(monkeypatch, path, work):
    """Do `work()` just before a file is replaced."""
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (work() if Path(b) == path else None, real(a, b))[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_artefacts_are_replaced_waits_until_all_are(number, folder, other, train, monkeypatch, signals):
    at_replacement(monkeypatch, folder / "datastore_values.npy", lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt) as stop:
        train(folder, *OTHER)
    assert isinstance(stop.value, Terminated) == (number == signal.SIGTERM)
    assert differences(other, folder) == []


def test_signals_that_were_held_back_come_once_and_work_as_before_afterwards(signals):
    done = []
    with pytest.raises(Terminated):
        with undisturbed():
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            done.append("all")
        done.append("not stopped")
    assert done == ["all"]
    with undisturbed():
        done.append("more")
    assert done == ["all", "more"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler


# A full disk

WRITTEN = ("datastore/datastore_values.npy", "datastore/examples.jsonl", "datastore/keys.f16", "datastore/keys_done_0.json.part",
           "datastore/done.json.part", "index/factory.txt.part", "index/datastore_entries.npz", "index/faiss_index.bin",
           "neighbours/neighbours_D.npy", "neighbours/neighbours_I.npy", "decoder/checkpoint.part", "decoder/memory_decoder.pt",
           "report/memory_decoder.pt", "report/metrics.json", "report/report.md", "report/loss_curve.png", "report/held_out.jsonl",
           "memory_decoder.pt.part", "config.json.part.part")


def place_of(name, folder, other):
    """The path of a file that a run is going to write, which makes the other memory."""
    if "/" not in name:
        return folder / name
    stage, file = name.split("/")
    return folder / "stages" / read_manifest(other)["stages"][stage] / file


@on_linux
def test_a_disk_that_is_full_at_any_file_is_said_and_the_same_command_goes_on(folder, other, whole, tiny_gemma, rows_file,
                                                                              monkeypatch, capsys, signals):
    arguments = command_line(tiny_gemma, rows_file, folder, "--max_examples", 6, *OTHER)
    for name in WRITTEN:
        path = place_of(name, folder, other)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("/dev/full")
        sentence = failure_of(script.main, "train_memory_decoder.py", arguments, monkeypatch, capsys)
        assert sentence == f"The disk of {folder} is full; make room, and the same command goes on from here.", name
        assert path.is_symlink(), name
        path.unlink()
        assert read_manifest(folder) == read_manifest(whole), name
    script.run(script.parse_options(arguments))
    assert differences(other, folder) == []


@on_linux
@pytest.mark.parametrize("size", [10, 10**6])
def test_an_error_of_the_disk_keeps_its_number_when_torch_and_numpy_write(size, tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    for write in (lambda file: np.save(file, np.zeros(size)), lambda file: torch.save(torch.zeros(size), file)):
        with pytest.raises(OSError, match="No space left") as failed, new_file(tmp_path / "full") as file:
            write(file)
        assert failed.value.errno == errno.ENOSPC


@pytest.mark.skipif(resource is None, reason="this system has no limit of a file's size")
@pytest.mark.parametrize("write", [lambda file: np.save(file, np.zeros(2**20)), lambda file: torch.save(torch.zeros(2**20), file)],
                         ids=["numpy", "torch"])
def test_an_error_of_the_disk_keeps_its_number_when_a_part_was_still_written(write, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large") as failed, new_file(tmp_path / "file") as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            write(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.errno == errno.EFBIG and 0 < (tmp_path / "file").stat().st_size <= 2**20


def test_another_error_than_the_disks_is_left_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="not the disk"), new_file(tmp_path / "file"):
        raise RuntimeError("not the disk")


# A page over a folder that is trained again


def test_a_page_goes_on_with_what_it_loaded_while_its_files_are_replaced_and_says_so(folder, train, monkeypatch):
    options = app.Options(model_dir=str(folder), device="cpu")
    chat = Chat.open(options, read_manifest(folder))
    opened, asked = page.Page(chat, options), []

    def ask():
        answer = chat.begin(QUESTION, max_new_tokens=8, seed=3, rule="kNN-LM")
        list(chat.write(answer))
        record = chat.trace(answer).record() | {"seconds": 0}
        asked.append(([chat.passages(token["neighbours"]) for token in answer.tokens], record, opened.trained_again().visible))
    ask()
    at_replacement(monkeypatch, folder / "datastore_values.npy", ask)
    train(folder, *OTHER)
    ask()
    assert [news for *_, news in asked] == [False, False, True]
    assert json.dumps(asked[0][:2]) == json.dumps(asked[1][:2]) == json.dumps(asked[2][:2])
    fresh = Chat.open(options, read_manifest(folder))
    assert not page.Page(fresh, options).trained_again().visible
