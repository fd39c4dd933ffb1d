"""Adding to a memory and forgetting, from the command to the artefacts; two trainings into one folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run_script
from runs import command_line, contents, failure_of, jsonl, stop_at_call, stored_rows, the_error, train_six

import app
import datastore
import stages
import train_memory_decoder as script
import training
from base_model import BaseLM
from chat import Chat
from datastore import Datastore, read_examples
from earlier import Claim, earlier_options
from memory_decoder import MemoryDecoder, read_manifest
from search import TrainingDatastore
from sources.rows import Example
from support.command import UserError
from texts import Entries

NOTES = "Quillfeather keeps the lanterns of the harbour. Every lantern that Quillfeather keeps is blue.\n"
CPU = ("--device", "cpu", "--batch_size", "8")


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a trained folder."""
    return shutil.copytree(trained, tmp_path / "my memory ü")


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(NOTES * 3)
    return path


def change(folder, *arguments):
    script.run(script.parse_options([str(part) for part in (*CPU, "--output_dir", folder, *arguments)]))


@pytest.fixture
def failure(monkeypatch, capsys):
    return lambda folder, *arguments: failure_of(script.main, "train_memory_decoder.py",
                                                 [*CPU, "--output_dir", folder, *arguments], monkeypatch, capsys)


def keys_of(folder):
    return np.fromfile(next(folder.glob("stages/datastore-*/keys.f16")), np.float16).reshape(-1, 32)


def holding(folder, text):
    """Files below a folder that hold a text as bytes, in UTF-8 or as JSON writes it."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def grown(trained, tmp_path_factory):
    """A trained folder to which notes were added, and what was read meanwhile."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("grown") / "out")
    (folder.parent / "notes.txt").write_text(NOTES * 3)
    read, real = [], datastore.hidden_batches

    def watched(base, windows, batch_size):
        read.extend(windows)
        return real(base, windows, batch_size)
    datastore.hidden_batches = watched
    try:
        change(folder, "--add", folder.parent / "notes.txt")
    finally:
        datastore.hidden_batches = real
    return folder, read


def test_only_the_added_text_is_read_for_its_entries(grown, trained):
    folder, read = grown
    number = len(stored_rows(trained))
    assert {window.example for window in read} == {number}
    store, before = Datastore.open(folder), Datastore.open(trained)
    assert store.examples[:-1] == before.examples and store.examples[-1].name == "notes.txt"
    np.testing.assert_array_equal(keys_of(folder)[:len(before)], keys_of(trained))
    np.testing.assert_array_equal(store.values[:len(before)], before.values)
    assert set(store.example[len(before):]) == {number} and len(store) == len(keys_of(folder)) == store.index.ntotal


def test_a_grown_memory_has_the_neighbours_and_keys_of_one_that_was_made_at_once(grown, base):
    folder, _ = grown
    store, keys = Datastore.open(folder), keys_of(folder)
    D, I = (np.load(next(folder.glob(f"stages/neighbours-*/neighbours_{name}.npy"))) for name in "DI")
    fields = store.index, store.mean, store.values, store.example, None, []
    expected, _ = TrainingDatastore(*fields, keys).search_others(keys, store.example, 8)
    np.testing.assert_allclose(D, expected, atol=1e-2, rtol=1e-3)
    assert (store.example[I] != store.example[:, None]).all()
    ids = base.encode(stored_rows(folder)[-1]["text"])
    new = (store.example == len(store.examples) - 1) & (store.position < 90)  # in the first window
    hidden = base.hidden(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(keys[new], hidden[store.position[new]], atol=2e-2)


def test_the_decoder_goes_on_from_what_it_knew(grown, trained):
    folder, _ = grown
    before, after = (MemoryDecoder.load(path / "memory_decoder.pt") for path in (trained, folder))
    assert set(before.seen.tolist()) < set(after.seen.tolist())
    base = BaseLM.load(read_manifest(folder)["base_model"], "float32", "cpu")
    options = script.parse_options(command_line("x", "y", "z"))
    first = training.make_decoder(options, base, keys_of(folder), entries_of_store(folder))
    moved = (after.blocks[0].qkv.weight - before.blocks[0].qkv.weight).norm()
    assert moved < 0.5 * (after.blocks[0].qkv.weight - first.blocks[0].qkv.weight).norm()


def entries_of_store(folder):
    store = Datastore.open(folder)
    return Entries(store.values, store.example, store.position, None)


def test_the_report_says_what_adding_changed(grown, trained):
    folder, _ = grown
    changed = json.loads((folder / "metrics.json").read_text())["changed"]
    assert changed["entries"] == [len(Datastore.open(trained)), len(Datastore.open(folder))]
    assert changed["added"]["names"] == "notes.txt" and "forgotten" not in changed
    assert changed["added"]["after"] < 0.8 * changed["added"]["before"]
    assert changed["held_out"] == json.loads((trained / "metrics.json").read_text())["held_out"]
    report = (folder / "report.md").read_text()
    assert "## What changed" in report and "| added text, memory alone" in report and "added: notes.txt" in report


def test_the_page_traces_an_added_document_to_its_name(grown):
    folder, _ = grown
    chat = Chat.open(script_chat(folder), read_manifest(folder))
    entry = len(chat.store) - 1
    found = chat.passage(entry)
    assert found["name"] == found["title"] == "notes.txt" and "blue" in found["before"]
    assert "What does notes.txt say?" in chat.questions()
    assert chat.template.pattern == chat.templates[0].pattern  # questions are asked as they were before


def script_chat(folder):
    return app.Options(model_dir=str(folder), device="cpu")


def test_a_forgotten_document_is_in_no_artefact_and_the_memory_is_as_it_was(grown, trained, tmp_path):
    folder = shutil.copytree(grown[0], tmp_path / "out")
    assert holding(folder, "Quillfeather")
    change(folder, "--forget", "notes.txt")
    assert not holding(folder, "Quillfeather")
    ids = np.array(read_tokens(grown[0]), np.int32).tobytes()
    assert ids in (grown[0] / "datastore_values.npy").read_bytes()
    assert not [path for path in folder.rglob("*") if path.is_file() and ids in path.read_bytes()]
    np.testing.assert_array_equal(keys_of(folder), keys_of(trained))
    forgot, never, knew = (MemoryDecoder.load(path / "memory_decoder.pt") for path in (folder, trained, grown[0]))
    assert torch.equal(forgot.seen, never.seen)
    one, other, third = (decoder.blocks[1].qkv.weight for decoder in (forgot, never, knew))
    assert (one - other).norm() < 0.1 * (third - other).norm()  # several threads round differently
    changed = json.loads((folder / "metrics.json").read_text())["changed"]
    assert changed["forgotten"]["names"] == "notes.txt" and changed["forgotten"]["after"] > 1.2 * changed["forgotten"]["before"]


def read_tokens(folder):
    store = Datastore.open(folder)
    return store.values[store.example == len(store.examples) - 1]


def test_text_that_was_held_out_and_is_added_is_not_called_forgotten(tiny_gemma, rows_file, tmp_path):
    folder = train_six(tiny_gemma, rows_file, tmp_path / "out", "--validation_fraction", 0.2)
    held = read_examples(folder / "held_out.jsonl")
    change(folder, "--add", jsonl(tmp_path / "more.jsonl", [held[0].row]))
    changed = json.loads((folder / "metrics.json").read_text())["changed"]
    assert changed["added"]["names"] == "more.jsonl:1" and "forgotten" not in changed
    assert len(read_examples(folder / "held_out.jsonl")) == len(held) - 1


def test_a_row_is_forgotten_without_reading_the_others_again(folder, monkeypatch):
    name = read_examples(folder / "examples.jsonl")[3].name
    monkeypatch.setattr(datastore, "hidden_batches", lambda _, windows, __: pytest.fail("something was read") if windows else ())
    before, row = Datastore.open(folder), stored_rows(folder)[3]
    keys = keys_of(folder)[before.example != 3]
    change(folder, "--forget", name)
    assert row not in stored_rows(folder) and not holding(folder, json.dumps(row["Answer"])[1:40])
    np.testing.assert_array_equal(keys_of(folder), keys)


def test_adding_and_forgetting_at_once_and_without_stages_reads_all_that_is_left(folder, notes):
    shutil.rmtree(folder / "stages")
    first = read_examples(folder / "examples.jsonl")[0]
    change(folder, "--add", notes, "--forget", first.name)
    names = [example.name for example in read_examples(folder / "examples.jsonl")]
    assert first.name not in names and names[-1] == "notes.txt"
    changed = json.loads((folder / "metrics.json").read_text())["changed"]
    assert changed["added"]["names"] == "notes.txt" and changed["forgotten"]["names"] == first.name


def test_a_change_that_was_stopped_keeps_the_memory_and_goes_on(folder, notes, monkeypatch):
    before = {path: digest for path, digest in contents(folder).items() if path.parent == folder}
    stop_at_call(monkeypatch, training, "save_checkpoint", 1)
    with pytest.raises(KeyboardInterrupt):
        change(folder, "--add", notes)
    monkeypatch.undo()
    assert {path: digest for path, digest in contents(folder).items() if path in before} == before
    monkeypatch.setattr(script, "write_keys", lambda *_: pytest.fail("the text was read again"))
    change(folder, "--add", notes)
    assert read_examples(folder / "examples.jsonl")[-1].name == "notes.txt"


def test_a_changed_document_takes_the_place_of_the_one_it_was(folder, notes):
    change(folder, "--add", notes)
    notes.write_text(NOTES.replace("blue", "crimson") * 5 + "The end.")
    change(folder, "--forget", "notes.txt", "--add", notes)
    store, base = Datastore.open(folder), BaseLM.load(read_manifest(folder)["base_model"], "float32", "cpu")
    assert store.examples[-1] == Example("notes.txt", {"text": notes.read_text().strip()}, 2)
    new = (store.example == len(store.examples) - 1) & (store.position < 90)
    hidden = base.hidden(torch.tensor([base.encode(store.examples[-1].row["text"])]))[0].numpy()
    np.testing.assert_allclose(keys_of(folder)[new], hidden[store.position[new]], atol=2e-2)
    assert not holding(folder, "is blue")
    changed = json.loads((folder / "metrics.json").read_text())["changed"]
    assert changed["added"]["names"] == changed["forgotten"]["names"] == "notes.txt"


def test_several_changes_in_a_row_stand_one_behind_the_other(folder, notes, tmp_path):
    (tmp_path / "more.md").write_text("# Anchors\n\nAnchors are heavy.")
    change(folder, "--add", notes)
    change(folder, "--add", tmp_path / "more.md")
    change(folder, "--forget", "notes.txt")
    change(folder, "--add", notes)
    store, keys = Datastore.open(folder), keys_of(folder)
    assert [e.name for e in store.examples[-2:]] == ["more.md", "notes.txt"] and len(keys) == len(store) == store.index.ntotal
    D, I = store.search(keys[::50].astype(np.float32), 1)
    assert D.max() < 1e-2 and (store.values[I[:, 0]] == store.values[::50]).mean() > 0.95
    manifest = read_manifest(folder)
    assert manifest["options"]["dataset"].endswith("rows.jsonl") and [s["name"] for s in manifest["sources"]] == [
        "rows.jsonl", "notes.txt", "more.md", "notes.txt"]


@pytest.mark.parametrize("stop", [("os", "replace", 3), ("shutil", "rmtree", 1)], ids=["files", "stages"])
def test_a_kill_while_artefacts_are_replaced_loses_nothing_and_the_next_run_ends_it(folder, notes, stop, monkeypatch, failure):
    change(folder, "--add", notes)
    owner, name, number = stop
    real, calls = getattr(getattr(stages, owner), name), []

    def stopping(source, *more, **options):
        calls.append(source)
        if (str(source).endswith(".part") and str(folder) == str(Path(source).parent)) or name == "rmtree":
            stopping.count += 1
            if stopping.count == number:
                raise KeyboardInterrupt
        return real(source, *more, **options)
    stopping.count = 0
    monkeypatch.setattr(getattr(stages, owner), name, stopping)
    with pytest.raises(KeyboardInterrupt):
        change(folder, "--forget", "notes.txt")
    monkeypatch.undo()
    assert "holds nothing of the name notes.txt" in failure(folder, "--forget", "notes.txt")  # it is already forgotten
    assert read_manifest(folder)["sources"] and not holding(folder, "Quillfeather")
    assert len(Datastore.open(folder).examples) == len(stored_rows(folder)) and not list(folder.glob("*.part"))


BAD = [(("--add", "NOTES", "--dataset", "x.jsonl"), "--dataset belongs to a whole training"),
       (("--forget", "nothing"), "holds nothing of the name nothing"), (("--add", "missing.txt"), "no file"),
       (("--forget", "rows.jsonl"), "too small"), (("--add", "NOTES", "--k", "5"), "--k 8, which cannot change"),
       (("--add", "NOTES", "--max_length", "64"), "--max_length 96"), (("--add", "ROWS"), "already; --forget it first"),
       (("--add", "NOTES", "--base_model", "OTHER"), "not the one that this memory was trained with")]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=[" ".join(bad) for bad, _ in BAD])
def test_a_change_that_cannot_be_made_is_one_sentence_and_changes_nothing(bad, said, folder, notes, rows_file, failure, tmp_path):
    places = {"NOTES": notes, "ROWS": rows_file, "OTHER": tmp_path / "other"}
    if "OTHER" in bad:
        conftest.make_tiny_gemma(tmp_path / "other", seed=1)
    before = contents(folder)
    assert said in failure(folder, *(places.get(part, part) for part in bad))
    assert contents(folder) == before


def test_a_folder_without_a_memory_cannot_be_changed(failure, tmp_path):
    assert "There is no memory in" in failure(tmp_path / "none", "--add", "x.txt") and not (tmp_path / "none").exists()


def test_a_second_training_into_one_folder_is_told_that_there_is_one(folder, tiny_gemma, rows_file, failure):
    before = contents(folder)
    with Claim(folder):
        assert "Another training is writing to the folder" in failure(folder, "--forget", "rows.jsonl:1")
        done = run_script("train_memory_decoder.py", *command_line(tiny_gemma, rows_file, folder, "--seed", 5))
        assert "name another --output_dir" in the_error(done.code, done.err)
    assert contents(folder) == before
    with Claim(folder), Claim(folder, wanted=False):  # the other processes of one run
        pass


def test_of_several_processes_only_the_first_of_all_machines_claims_the_folder(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # every machine has such a process
    with Claim(folder):
        monkeypatch.setenv("RANK", "4")
        assert earlier_options(script.Options(output_dir=str(folder)))["k"] == 8
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="Another training"):
            earlier_options(script.Options(output_dir=str(folder)))


def test_a_training_that_was_killed_leaves_the_folder_to_the_next(tiny_gemma, rows_file, tmp_path):
    folder = tmp_path / "out"
    line = [sys.executable, str(ROOT / "train_memory_decoder.py"), *command_line(tiny_gemma, rows_file, folder, small=SMALL)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for text in process.stdout:
            if text.startswith("plan:"):  # it holds the folder now
                break
        process.kill()
    with Claim(folder):
        assert (folder / "stages/.lock").exists()


def test_two_sources_of_one_memory_are_asked_in_the_form_of_the_first(folder, tmp_path):
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "May I sing?"},
                                                           {"role": "assistant", "content": "At noon."}]}])
    change(folder, "--add", chats)
    chat = Chat.open(script_chat(folder), read_manifest(folder))
    assert [template.pattern for template in chat.templates][1] == "chat {messages}" and len(chat.templates) == 2
    found = chat.passage(len(chat.store) - 1)
    assert found["title"] == "May I sing?" and found["token"] == "(end)" and "At noon." in found["before"]
