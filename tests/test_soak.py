"""The checks of the soak test can fail: each wrong end is noticed, and each fault is counted."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import contents, train_six

import soak
from base_model import file_checksum
from faults import asking, files, stopped
from faults.common import Outcome, Place, refusal
from faults.killed import KILLS, check_command, moments
from faults.runs_beside import STAGES, complaint, stage_of
from faults.same import differences
from stages import seal_stage
from support.sealed import sealed, unsealed


@pytest.fixture(scope="module")
def whole(tiny_gemma, rows_file, tmp_path_factory):
    return train_six(tiny_gemma, rows_file, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the whole folder."""
    return shutil.copytree(whole, tmp_path / "out")


def stage(folder, name):
    return next(folder.glob(f"stages/{name}-*"))


def below(folder):
    """Checksums of all files below a folder, by their places in it."""
    return {path.relative_to(folder): checksum for path, checksum in contents(folder).items()}


def ended(code, err="", out=""):
    return subprocess.CompletedProcess([], code, out, err)


# What differs between two memories


def change_array(path, change):
    array = np.load(path)
    change(array)
    np.save(path, array)


def change_entries(path, name, change):
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays[name])
    np.savez(path, **arrays)


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_index(path):
    index = faiss.read_index(str(path))
    keys = index.reconstruct_n(0, index.ntotal)
    index.reset()
    keys[7, 3] += 0.5
    index.add(keys)
    faiss.write_index(index, str(path))


def change_weight(path):
    saved = torch.load(path, weights_only=True)
    saved["weights"]["output_projection.weight"][5, 3] += 0.01
    torch.save(saved, path)


def change_keys(path):
    keys = np.memmap(path, np.float16, "r+")
    keys[100] += 0.5
    keys.flush()


def swap(array):
    """Let the nearest and the farthest neighbour of an entry change places."""
    array[40, [0, -1]] = array[40, [-1, 0]]


def farther(ids):
    """Give an entry, in place of its nearest neighbour, one that is not among its neighbours."""
    ids[40, 0] = next(i for i in range(len(ids)) if i not in ids[40] and i > 1000)


def twice(ids):
    ids[40, 1] = ids[40, 0]


def add(number):
    def change(array):
        array[3] += number
    return change


def change_losses(done):
    done["losses"][-1][1] += 0.5


CHANGES = {
    "values": (lambda f: change_array(f / "datastore_values.npy", add(1)), "datastore_values.npy differs."),
    "examples": (lambda f: (f / "examples.jsonl").write_text("{}\n"), "examples.jsonl differs."),
    "held-out rows": (lambda f: (f / "held_out.jsonl").write_text("{}\n"), "held_out.jsonl differs."),
    "positions": (lambda f: change_entries(f / "datastore_entries.npz", "position", add(1)), "The entries differ."),
    "rows": (lambda f: change_entries(f / "datastore_entries.npz", "example", add(1)), "The entries differ."),
    "mean": (lambda f: change_entries(f / "datastore_entries.npz", "mean", add(0.01)), "The entries differ."),
    "keys": (lambda f: change_keys(stage(f, "datastore") / "keys.f16"), "The keys differ."),
    "fewer keys": (lambda f: (stage(f, "datastore") / "keys.f16").write_bytes(bytes(640)), "The numbers of keys differ."),
    "index": (lambda f: change_index(f / "faiss_index.bin"), "The keys of the indexes differ."),
    "distances": (lambda f: change_array(stage(f, "neighbours") / "neighbours_D.npy", add(0.1)), "The distances of"),
    "neighbours": (lambda f: change_array(stage(f, "neighbours") / "neighbours_I.npy", farther), "The neighbours of some of 1"),
    "their order": (lambda f: change_array(stage(f, "neighbours") / "neighbours_I.npy", swap), "The neighbours of some of 1"),
    "one twice": (lambda f: change_array(stage(f, "neighbours") / "neighbours_I.npy", twice), "An entry is a neighbour twice."),
    "weights": (lambda f: change_weight(f / "memory_decoder.pt"), "The decoder's weights output_projection.weight differ"),
    "counts": (lambda f: change_json(f / "metrics.json", lambda m: m.update(entries=7)), "The counts in metrics.json differ."),
    "held out": (lambda f: change_json(f / "metrics.json", lambda m: m["held_out"].update(base=1.0)), "The held-out base is 1.0"),
    "losses": (lambda f: change_json(stage(f, "decoder") / "done.json", change_losses), "The losses of the training differ."),
    "left over": (lambda f: (stage(f, "decoder") / "checkpoint.pt").touch(), "checkpoint.pt is left over."),
    "half a file": (lambda f: (f / "memory_decoder.pt.part").touch(), "memory_decoder.pt.part is left over."),
}


def give_checksums(folder):
    """Write the manifest for the files that are there now."""
    manifest = unsealed(folder / "config.json")
    manifest["files"] = {name: file_checksum(folder / name) for name in manifest["files"]}
    (folder / "config.json").write_text(sealed(manifest))


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_every_difference_between_two_memories_is_noticed(change, sentence, folder, whole):
    assert differences(whole, folder) == []
    change(folder)
    give_checksums(folder)
    found = differences(whole, folder)
    assert len(found) == 1 and found[0].startswith(sentence)


def test_a_damaged_memory_one_that_is_missing_and_one_of_another_command_differ(folder, whole, tmp_path):
    assert differences(whole, tmp_path / "none") == [f"{tmp_path / 'none'} has no manifest."]
    manifest = unsealed(folder / "config.json")
    (folder / "config.json").write_text(sealed(manifest | {"stages": manifest["stages"] | {"report": "report-1"}}))
    assert differences(whole, folder) == ["The two folders are of different commands."]
    (folder / "report.md").unlink()
    assert differences(whole, folder) == [f"The file {folder / 'report.md'} is missing; train again."]


def test_neighbours_that_are_equally_near_may_change_places(folder, whole):
    D, path = np.load(stage(whole, "neighbours") / "neighbours_D.npy"), stage(folder, "neighbours") / "neighbours_I.npy"
    row, column = np.argwhere(D[:, 1:] == D[:, :-1])[0]

    def exchange(ids):
        ids[row, [column, column + 1]] = ids[row, [column + 1, column]]
    change_array(path, exchange)
    assert path.read_bytes() != (stage(whole, "neighbours") / "neighbours_I.npy").read_bytes()
    assert differences(whole, folder) == []


def test_a_last_bit_is_no_difference(folder, whole):
    change_array(stage(folder, "neighbours") / "neighbours_D.npy", lambda D: np.multiply(D, 1 + 1e-6, out=D))
    assert differences(whole, folder) == []


# How a script ended


@pytest.mark.parametrize("done", [
    ended(1, "error: It is full.\n"), ended(0, "error: It is full.\n"), ended(2), ended(2, "error: One.\nerror: Two.\n"),
    ended(-9, "error: It is full.\n"), ended(2, "Traceback (most recent call last):\nerror: It is full.\n")],
    ids=["another code", "no failure", "no sentence", "two sentences", "killed", "traceback"])
def test_only_one_sentence_with_exit_code_2_is_a_refusal(done):
    assert refusal(ended(2, "loading\nerror: It is full.\n")) == "It is full."
    assert refusal(done) is None and stopped.wrong_refusal(done)


def test_a_refusal_for_another_reason_than_the_disk_is_wrong():
    assert stopped.wrong_refusal(ended(2, "error: The disk is full.\n")) is None
    assert stopped.wrong_refusal(ended(2, "error: There is no memory.\n"))


@pytest.mark.parametrize("done", [ended(-15), ended(143), ended(0, stopped.STOPPED), ended(143, f"Traceback\n{stopped.STOPPED}\n")],
                         ids=["killed", "silent", "no failure", "traceback"])
def test_only_the_usual_word_and_exit_code_are_a_good_end_after_sigterm(done):
    assert stopped.wrong_stop(ended(143, f"a bar\n{stopped.STOPPED}\n")) is None
    assert stopped.wrong_stop(done)


def test_a_training_that_did_not_end_well_is_complained_about():
    assert complaint(ended(0, "a warning\n")) is None
    assert complaint(ended(1, "Traceback\nValueError: no\n\n")) == "The same command ended with exit code 1: ValueError: no"


# Which faults are drawn, and where they fall


@pytest.mark.parametrize("short", [True, False])
def test_as_many_kills_as_asked_for_are_drawn_in_every_stage(short):
    seconds = dict(zip(STAGES, (10, 3, 7, 20, 4, 0.1), strict=True))
    drawn = moments(0, KILLS[short], seconds)
    assert Counter(name for name, _ in drawn) == dict(zip(STAGES, KILLS[short], strict=True))
    assert [name for name, _ in drawn] == sorted((name for name, _ in drawn), key=STAGES.index)
    assert all(0 <= delay <= seconds[name] for name, delay in drawn)
    assert drawn == moments(0, KILLS[short], seconds) != moments(1, KILLS[short], seconds)


def test_the_forms_kill_in_every_stage_and_the_long_one_thirty_times():
    assert min(KILLS[True]) >= 1 and min(KILLS[False]) >= 1 and sum(KILLS[False]) == 30


def test_the_stage_of_a_folder_is_the_first_that_is_not_done(tmp_path):
    for i, name in enumerate(STAGES[:-1]):
        assert stage_of(tmp_path) == name
        (tmp_path / f"stages/{name}-1").mkdir(parents=True)
        assert stage_of(tmp_path) == name
        (tmp_path / f"stages/{name}-1/done.json").touch()
        assert stage_of(tmp_path, [f"{name}-1"]) == (STAGES[0] if i == 0 else name)  # an earlier memory's does not count
    assert stage_of(tmp_path) == "publish"


def test_a_reference_of_another_command_is_refused(whole, folder):
    check_command(whole, folder)
    (folder / "stages/index-0").mkdir()
    with pytest.raises(RuntimeError, match="no stage index-0"):
        check_command(whole, folder)


@pytest.mark.parametrize("short", [True, False])
def test_every_file_is_damaged_as_often_as_any_other_and_artefacts_two_hundred_times(short, whole):
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size}
    artefacts = {name for name in names if name.parts[0] != "stages"}
    drawn = files.damages(whole, files.random.Random(0), short)
    assert {name for name, _ in drawn} == names and len(artefacts) == 11
    assert Counter(name for name, kind in drawn if kind == "missing" and name in artefacts) == dict.fromkeys(artefacts, 1)
    for some, count in ((artefacts, files.ARTEFACTS[short] + len(artefacts)), (names - artefacts, files.STAGES[short])):
        times = Counter(name for name, _ in drawn if name in some)
        assert times.total() == count and max(times.values()) <= min(times.values()) + 1
    assert files.ARTEFACTS[False] >= 200


@pytest.mark.parametrize("kind", sorted(set(files.KINDS)))
def test_a_damage_changes_the_file_in_its_way(kind, tmp_path):
    path, draw, data = tmp_path / "file", files.random.Random(0), bytes(range(200))
    for _ in range(20):
        path.write_bytes(data)
        assert files.damage(path, kind, draw)
        found = path.read_bytes() if path.exists() else None
        assert kind == "missing" if found is None else kind != "missing"
        if kind == "cut":
            assert len(found) < len(data) and data.startswith(found)
        if kind == "flip":
            assert len(found) == len(data) and sum(a != b for a, b in zip(found, data, strict=True)) == 1


def test_a_restored_folder_is_the_whole_one_again(whole, folder):
    for path in (folder / "report.md", folder / "config.json", stage(folder, "index") / "done.json"):
        files.damage(path, "cut", files.random.Random(0))
        assert below(folder) != below(whole)
        files.restore(whole, folder, path.relative_to(folder))
        assert below(folder) == below(whole)


# What came of a damage


@pytest.mark.parametrize(("done", "verdict"), [
    (ended(2, "error: The file {} is damaged.\n"), "refused by name"), (ended(2, "error: Something is damaged.\n"), "failed"),
    (ended(0, out="the answer"), "harmless"), (ended(0, out="another answer"), "failed"),
    (ended(1, "Traceback\nValueError: {}\n"), "failed"), (ended(-11), "failed")],
    ids=["refused", "refused without a name", "harmless", "another answer", "traceback", "crashed"])
def test_a_damaged_artefact_is_judged_by_how_the_page_ends(done, verdict, folder):
    name = files.Path("metrics.json")
    done.stderr = done.stderr.replace("{}", str(folder / name))
    wrong, found = files.judged(done, ended(0, out="the answer"), folder, name)
    assert found == verdict and bool(wrong) == (verdict == "failed")


def test_damage_in_a_stage_that_nothing_notices_is_a_failure(whole, folder):
    stage_of_keys = stage(folder, "datastore")
    name = (stage_of_keys / "keys.f16").relative_to(folder)
    assert files.noticed(whole, folder, name) == ("It was not noticed.", "failed")  # nothing is damaged yet
    files.damage(folder / name, "flip", files.random.Random(0))
    assert files.noticed(whole, folder, name) == (None, "noticed")
    seal_stage(stage_of_keys, unsealed(stage_of_keys / "done.json"))  # as if it had been made so
    assert files.noticed(whole, folder, name) == ("It was not noticed.", "failed")
    assert files.noticed(whole, folder, name.with_name("done.json")) == ("It was not noticed.", "failed")
    files.damage(folder / name, "cut", files.random.Random(0))
    assert files.noticed(whole, folder, name.with_name("examples.jsonl"))[1] == "failed"  # another file is named


@pytest.mark.parametrize(("answers", "news", "failure"), [
    ("aaaaaaaa", [False, True], None), ("aaabbbbb", [False, True], "in neighbours"),
    ("aaaaaaab", [False, True], "after the training"),
    ("aaaaaaaa", [True, True], "at once"), ("aaaaaaaa", [False, False], "does not say")],
    ids=["good", "another answer during", "another answer after", "news too early", "no news"])
def test_a_page_must_answer_alike_all_the_time_and_tell_the_news_at_the_end(answers, news, failure, whole, monkeypatch):
    said, told, falls = iter(answers), iter(news), iter(STAGES)
    page = SimpleNamespace(answer=lambda: next(said), tells_news=lambda: next(told))
    monkeypatch.setattr(asking, "opened", lambda *_: nullcontext(page))
    monkeypatch.setattr(asking, "training", lambda *_: nullcontext(SimpleNamespace(ended=lambda: ended(0))))
    monkeypatch.setattr(asking, "wait_for_stage", lambda *_: True)
    monkeypatch.setattr(asking, "stage_of", lambda *_: next(falls))
    outcome = asking.page_open(None, whole, whole)
    assert outcome.tried == len(STAGES) + 4 and bool(outcome.failures) == bool(failure)
    assert failure is None or failure in outcome.failures[0]


KILLED_IN_A_BAR = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from faults.runs_beside import Beside
from tqdm.auto import tqdm

def holds():
    with tqdm.get_lock():
        print("holds", flush=True)
        time.sleep(600)

tqdm(range(2), disable=False).close()
logs = Path(sys.argv[3])
with Beside(logs / "one", holds, "one") as one:
    while "holds" not in one.out.read_text():
        time.sleep(0.01)
with Beside(logs / "two", lambda: print(list(tqdm(range(2)))), "two") as two:
    print(two.ended().stdout)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
def test_a_copy_that_is_killed_while_it_draws_a_bar_stops_no_other(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_BAR, ROOT / "benchmarks", ROOT, tmp_path], text=True,
                          capture_output=True, timeout=60)
    assert done.stdout == "[0, 1]\n\n"


# The table


@pytest.mark.parametrize(("failures", "last"), [([None] * 3, "faults tried 3, survived 3"),
                                                ([None, "It broke.", None], "faults tried 3, survived 2")])
def test_the_last_line_counts_and_the_exit_code_tells(failures, last, monkeypatch, capsys):
    outcome, none = Outcome("a fault", note="in all"), Outcome("another", note="skipped")
    for failure in failures:
        outcome.add(failure)
    monkeypatch.setattr(soak.importlib, "import_module", lambda name: SimpleNamespace(outcomes=lambda place: [outcome, none]))
    code = soak.main(["--parts", "files"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last and code == ("It broke." in failures)
    assert f"| a fault | 3 | {outcome.survived} | in all |" in lines and "| another | 0 | 0 | skipped |" in lines
    assert ("not survived: a fault: It broke." in lines) == ("It broke." in failures)


def test_the_long_forms_take_the_demo_and_its_memory_only_where_it_is_whole(whole, tmp_path):
    assert soak.long_place(tmp_path, whole) == Place(tmp_path, ["--demo"], whole, short=False)
    assert soak.long_place(tmp_path, tmp_path).trained is None
