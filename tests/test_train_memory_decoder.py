"""Script 1 end to end: artefacts, reruns, interrupted runs, held-out rows, options, and every user error."""

import csv
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import datasets
import faiss
import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, SMALL, run_script

import datastore
import train_memory_decoder as script
from datastore import BaseLM, Datastore, Template, UserError, entries_of, explain_load_error, windows_of
from memory_decoder import MemoryDecoder, Topic, read_manifest
from train_memory_decoder import Options, Stage, epoch_batches, parse_options, read_rows, split_rows

ARTEFACTS = {"memory_decoder.pt", "faiss_index.bin", "datastore_values.npy", "datastore_entries.npz", "examples.jsonl",
             "config.json", "metrics.json", "report.md", "loss_curve.png", "alpha_sweep.png"}
TEMPLATE = Template(Options.template)


@pytest.fixture(scope="module", autouse=True)
def several_searches():
    """Make a search of a few thousand entries take several calls, so that it can be interrupted between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datastore, "SEARCH_CHUNK", 500)
        yield


@pytest.fixture
def arguments(tiny_gemma, rows_file):
    """Makes the command line of a small training into a folder; what is added wins."""
    def make(folder, *more):
        paths = ("--base_model", tiny_gemma, "--dataset", rows_file, "--output_dir", folder)
        return [str(part) for part in (*paths, *SMALL, *more)]
    return make


@pytest.fixture
def train(arguments):
    """Trains in this process into a folder, on six rows unless told otherwise."""
    def run(folder, *more):
        script.run(parse_options(arguments(folder, "--max_examples", 6, *more)))
        return folder
    return run


@pytest.fixture(scope="module")
def six_rows(tiny_gemma, rows_file, several_searches, tmp_path_factory):
    """A folder that an uninterrupted training on six rows has filled."""
    folder = tmp_path_factory.mktemp("six") / "out"
    paths = ("--base_model", tiny_gemma, "--dataset", rows_file, "--output_dir", folder)
    script.run(parse_options([str(part) for part in (*paths, *SMALL, "--max_examples", 6)]))
    return folder


@pytest.fixture
def earlier(trained, tmp_path):
    """A copy of a trained folder, with its times."""
    return shutil.copytree(trained, tmp_path / "earlier")


def contents(folder):
    """Checksums of all files below a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def times(folder, *names):
    """When each file of the stages was last written; only those of the named stages, if any are named."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/*")
            if not names or path.parent.name.split("-")[0] in names}


def rendered(source, template=TEMPLATE):
    return [template.render(row) for row in read_rows(str(source), template)]


def stored_texts(folder):
    return [json.loads(line)["text"] for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]


def entry_places(folder):
    with np.load(folder / "datastore_entries.npz") as entries:
        return list(zip(entries["example"].tolist(), entries["position"].tolist(), strict=True))


def first_place(base, ids):
    """The position of the first entry's key: what all examples begin with has no entries."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, base.encode("Title:"), strict=False))))


def assert_same_training(a, b):
    """Both folders hold the same entries, index, decoder weights and measured perplexities."""
    for name in ("datastore_values.npy", "faiss_index.bin", "examples.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert entry_places(a) == entry_places(b)
    first, second = (MemoryDecoder.load(folder / "memory_decoder.pt") for folder in (a, b))
    assert first.sizes == second.sizes
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    assert all(one[name] == other[name] for name in ("held_out", "chosen", "alpha_sweep", "entries", "k"))


def test_training_leaves_every_artefact_and_nothing_half_written(trained):
    assert {path.name for path in trained.iterdir()} == {*ARTEFACTS, "stages"}
    assert not list(trained.rglob("*.part"))
    assert sorted(path.name.split("-")[0] for path in (trained / "stages").iterdir()) == [
        "datastore", "decoder", "index", "neighbours", "report"]
    for name in ("loss_curve.png", "alpha_sweep.png"):
        assert matplotlib.image.imread(trained / name).std() > 0.01
    assert "| kNN-LM |" in (trained / "report.md").read_text()


def test_metrics_hold_what_the_report_is_made_of(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["held_out"].keys() == {"positions", "base", "knn_lm", "memory", "blend_logits", "blend_probabilities",
                                          "blend_auto", "mean_auto_alpha"}
    assert metrics["chosen"].keys() >= {"alpha_logits", "alpha_probabilities", "knn_lambda", "knn_temperature"}
    assert metrics["entries"] == len(np.load(trained / "datastore_values.npy")) and metrics["k"] == 8
    assert metrics["seconds"].keys() == {"datastore", "index", "neighbours", "decoder", "report"}
    assert metrics["peak_memory_bytes"] > 2**20
    assert all(1 < metrics["held_out"][name] < math.inf for name in ("base", "knn_lm", "memory", "blend_logits"))
    assert metrics["index_recall"] == 1  # exact search


def test_the_manifest_knows_every_file_by_its_checksum(trained):
    manifest = read_manifest(trained)
    assert manifest["files"].keys() == ARTEFACTS - {"config.json"}
    files = contents(trained)
    assert all(files[trained / name] == digest for name, digest in manifest["files"].items())
    assert manifest["template"] == TEMPLATE.pattern and manifest["options"]["num_epochs"] == 2


def test_every_stored_value_is_the_token_that_really_comes_next(trained, base):
    values, places = np.load(trained / "datastore_values.npy"), entry_places(trained)
    ids = [base.encode(text, end=True) for text in stored_texts(trained)]
    assert values.tolist() == [ids[example][position + 1] for example, position in places]
    expected = [(n, p) for n, text in enumerate(ids) for p in range(first_place(base, text), len(text) - 1)]
    assert sorted(places) == expected  # every position once, though long texts take several windows
    assert faiss.read_index(str(trained / "faiss_index.bin")).ntotal == len(values)


def test_the_keys_are_the_hidden_states_of_their_positions(trained, base):
    keys = np.fromfile(next(trained.glob("stages/datastore-*/keys.f16")), np.float16).reshape(-1, base.width)
    texts, places = stored_texts(trained), entry_places(trained)
    near = [n for n, (_, position) in enumerate(places) if position < 90]  # in the first of several windows
    for n in near[::300]:
        example, position = places[n]
        alone = base.hidden(torch.tensor([base.encode(texts[example])[:position + 1]]))[0, -1]
        np.testing.assert_allclose(keys[n].astype(np.float32), alone.numpy(), atol=2e-2)


def test_training_makes_the_memory_better_than_its_start(trained):
    losses = json.loads(next(trained.glob("stages/decoder-*/done.json")).read_text())["losses"]
    assert losses[-1][1] < losses[0][1]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["held_out"]["memory"] < metrics["held_out"]["base"]


def test_a_rerun_with_the_same_settings_runs_no_stage_again(earlier, arguments):
    before, artefacts = times(earlier), contents(earlier)
    script.run(parse_options(arguments(earlier)))
    assert times(earlier) == before
    changed = {path.name for path, digest in contents(earlier).items() if artefacts[path] != digest}
    assert changed <= {"config.json"}  # it names the folder


def test_another_learning_rate_keeps_datastore_index_and_neighbours(earlier, arguments):
    before = times(earlier)
    kept = times(earlier, "datastore", "index", "neighbours")
    weights = (earlier / "memory_decoder.pt").read_bytes()
    script.run(parse_options(arguments(earlier, "--decoder_lr", 1e-2, "--num_epochs", 1)))
    assert len(kept) > 8 and times(earlier, "datastore", "index", "neighbours") == kept
    assert not times(earlier, "decoder").keys() & before.keys()  # the earlier one's folder is gone
    assert (earlier / "memory_decoder.pt").read_bytes() != weights
    assert read_manifest(earlier)["options"]["decoder_lr"] == 1e-2


def test_a_rerun_with_less_free_memory_keeps_the_index_it_has(train, tmp_path, monkeypatch):
    # The limits are scaled down so that a few thousand entries lie on either side of them.
    monkeypatch.setattr(datastore, "FLAT_LIMIT", 100)
    monkeypatch.setattr(script, "choose_index", lambda n, width, memory: datastore.choose_index(n, width, memory // 10_000))
    for gib in (8, 2):
        monkeypatch.setattr(script.psutil, "virtual_memory", lambda gib=gib: SimpleNamespace(available=gib * 2**30))
        train(tmp_path / "out")
        if gib == 8:
            before = times(tmp_path / "out")
    assert times(tmp_path / "out") == before


@pytest.mark.parametrize("change", [("--max_length", 64), ("--max_examples", 5), ("--positions", "last", "--k", 2)])
def test_other_texts_or_positions_make_another_datastore(change, six_rows, train, tmp_path):
    folder = shutil.copytree(six_rows, tmp_path / "out")
    before = times(folder)
    train(folder, *change, "--num_epochs", 1)
    assert not times(folder).keys() & before.keys()
    assert len(list((folder / "stages").iterdir())) == 5


def test_one_seed_trains_one_decoder(six_rows, train, tmp_path):
    assert_same_training(six_rows, train(tmp_path / "again"))


def test_another_seed_trains_another_decoder(six_rows, train, tmp_path):
    train(tmp_path / "other", "--seed", 1)
    assert (tmp_path / "other/memory_decoder.pt").read_bytes() != (six_rows / "memory_decoder.pt").read_bytes()


def stop_at_call(monkeypatch, owner, name, number):
    """Make the numbered call of owner.name raise KeyboardInterrupt, as Ctrl-C would."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments, **more):
        calls.append(name)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments, **more)
    monkeypatch.setattr(owner, name, wrapped)


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
    folder, real, read = tmp_path / "out", datastore.hidden_batches, []

    def recorded(base, windows, batch_size):
        read.append(len(windows))
        for number, batch in enumerate(real(base, windows, batch_size)):
            if number == 3 and len(read) == 1:
                raise KeyboardInterrupt
            yield batch
    monkeypatch.setattr(datastore, "hidden_batches", recorded)
    with pytest.raises(KeyboardInterrupt):
        train(folder)
    train(folder)
    windows = len(windows_of(base, stored_texts(folder), TEMPLATE, 96))
    assert read == [windows, windows - 3 * 8]
    assert_same_training(six_rows, folder)


@pytest.mark.parametrize("lost", [1, 64 * 100 + 7])
def test_keys_whose_last_bytes_were_lost_are_computed_again(lost, six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, script, "build_neighbours", 1)
    stage = next(folder.glob("stages/datastore-*"))
    (stage / "done.json").unlink()
    os.truncate(stage / "keys.f16", (stage / "keys.f16").stat().st_size - lost)
    train(folder)
    assert_same_training(six_rows, folder)


def test_a_search_goes_on_where_it_was_stopped(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, Datastore, "search_others", 3)
    done = int(next(folder.glob("stages/neighbours-*/neighbours_done.json")).read_text())
    searches = count_calls(monkeypatch, Datastore, "search_others")
    train(folder)
    entries = len(np.load(folder / "datastore_values.npy"))
    assert done == 1000 and len(searches) == -(-(entries - 1000) // 500)
    assert_same_training(six_rows, folder)


def test_a_search_killed_while_it_notes_its_progress_can_go_on(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    interrupt(monkeypatch, train, folder, datastore, "write_atomically", 3)
    assert next(folder.glob("stages/neighbours-*/neighbours_done.json")).read_text() == "1000"
    train(folder)
    assert_same_training(six_rows, folder)


def test_the_decoder_goes_on_from_its_last_epoch(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    steps = json.loads(next(six_rows.glob("stages/decoder-*/done.json")).read_text())["losses"][-1][0]
    assert steps % 2 == 0 and steps > 6  # two epochs
    interrupt(monkeypatch, train, folder, script.TrainingLoss, "forward", steps // 2 + 3)
    assert next(folder.glob("stages/decoder-*/checkpoint.pt")).exists()
    again = count_calls(monkeypatch, script.TrainingLoss, "forward")
    train(folder)
    assert len(again) == steps // 2
    assert_same_training(six_rows, folder)
    assert not list(folder.glob("stages/decoder-*/checkpoint*"))


def test_a_checkpoint_in_the_middle_of_an_epoch_changes_nothing(six_rows, train, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)  # after every step
    interrupt(monkeypatch, train, folder, script.TrainingLoss, "forward", 4)
    again = count_calls(monkeypatch, script.TrainingLoss, "forward")
    train(folder)
    losses = json.loads(next(six_rows.glob("stages/decoder-*/done.json")).read_text())["losses"]
    assert len(again) == losses[-1][0] - 3
    assert_same_training(six_rows, folder)


def test_a_run_stopped_between_two_artefacts_does_not_look_whole(six_rows, train, tmp_path, monkeypatch):
    folder = shutil.copytree(six_rows, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = os.replace
        patch.setattr(os, "replace", lambda a, b: interrupted() if Path(b) == folder / "datastore_values.npy" else real(a, b))
        train(folder, "--decoder_lr", 1e-2)
    assert read_manifest(folder) is None
    train(folder, "--decoder_lr", 1e-2)
    assert read_manifest(folder)["options"]["decoder_lr"] == 1e-2
    assert not list(folder.rglob("*.part"))


def interrupted():
    raise KeyboardInterrupt


KILLED = """
import os, signal, datastore, train_memory_decoder
real = datastore.hidden_batches
def batches(*arguments):
    for number, batch in enumerate(real(*arguments)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
datastore.hidden_batches = batches
train_memory_decoder.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_as_an_uninterrupted_one_once_started_again(six_rows, arguments, train, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *arguments(folder, "--max_examples", 6)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.glob("stages/datastore-*/keys.f16")) and not list(folder.rglob("done.json"))
    assert_same_training(six_rows, train(folder))


def test_held_out_rows_are_in_no_entry(trained, rows_file, base):
    texts, stored = rendered(rows_file), stored_texts(trained)
    held = [text for text in texts if text not in stored]
    assert len(stored) == 22 and len(held) == 2 and set(stored) < set(texts)
    metrics = json.loads((trained / "metrics.json").read_text())
    ids = [base.encode(text, end=True) for text in held]
    positions = sorted(len(text) - 1 - first_place(base, text) for text in ids)
    assert sorted((metrics["held_out"]["positions"], metrics["chosen"]["positions"])) == positions


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_that_occurs_twice_is_never_on_both_sides(tmp_path):
    source = jsonl(tmp_path / "twice.jsonl", ROWS[:10] * 2)
    kept, held = split_rows(Options(dataset=str(source), validation_fraction=0.3), TEMPLATE)
    assert not {TEMPLATE.render(row) for row in kept} & {TEMPLATE.render(row) for row in held}


def test_a_row_of_the_validation_dataset_is_not_trained_on(tmp_path):
    whole, apart = jsonl(tmp_path / "all.jsonl", ROWS[:10]), jsonl(tmp_path / "held.jsonl", ROWS[:3])
    kept, held = split_rows(Options(dataset=str(whole), validation_dataset=str(apart)), TEMPLATE)
    assert held == ROWS[:3] and not [row for row in kept if row in held]


def test_one_seed_splits_one_way_and_another_another(rows_file):
    first, second, other = (split_rows(Options(dataset=str(rows_file), seed=seed), TEMPLATE) for seed in (3, 3, 4))
    assert first == second and first[1] != other[1]
    assert sorted(map(str, first[0] + first[1])) == sorted(map(str, read_rows(str(rows_file), TEMPLATE)))


def test_a_long_answer_stands_on_one_side_of_the_split_only_and_short_ones_may_stand_on_both(tmp_path, capsys):
    rows = [{"Title": f"t{n}", "Question": f"q{n}?", "Answer": f"answer {n // 3} " + "and so on " * 12} for n in range(12)]
    rows += [{"Title": f"s{n}", "Question": f"short {n}?", "Answer": "Yes."} for n in range(12)]
    kept, held = split_rows(Options(dataset=str(jsonl(tmp_path / "asked.jsonl", rows)), validation_fraction=0.3), TEMPLATE)
    kept_answers, held_answers = ({row["Answer"] for row in part} for part in (kept, held))
    assert kept_answers & held_answers == {"Yes."}
    assert any(len(answer) > 100 for answer in kept_answers) and any(len(answer) > 100 for answer in held_answers)
    assert 0 < len(rows) - len(kept) - len(held) == int(capsys.readouterr().out.split("left out: ")[1].split()[0])
    long = [row["Answer"] for row in held if len(row["Answer"]) > 100]
    assert len(set(long)) == len(long)  # both halves of the report would else know one answer


@pytest.mark.parametrize(("rows", "fraction", "held"), [(24, 0.05, 2), (24, 0.25, 6), (440, 0.9, 200)])
def test_the_held_out_share_is_at_least_2_and_at_most_200_rows(rows, fraction, held, tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", ROWS[:rows])
    kept, left = split_rows(Options(dataset=str(source), validation_fraction=fraction), TEMPLATE)
    assert (len(kept), len(left)) == (rows - held, held)


def test_a_validation_dataset_leaves_all_rows_to_train_on(rows_file, tmp_path):
    apart = jsonl(tmp_path / "held.jsonl", ROWS[1:4])
    kept, held = split_rows(Options(dataset=str(rows_file), validation_dataset=str(apart)), TEMPLATE)
    assert kept == read_rows(str(rows_file), TEMPLATE) and held == ROWS[1:4]


def test_max_examples_takes_fewer_rows_and_holds_out_the_same(rows_file):
    all_rows, held = split_rows(Options(dataset=str(rows_file)), TEMPLATE)
    some, same = split_rows(Options(dataset=str(rows_file), max_examples=7), TEMPLATE)
    assert len(some) == 7 and same == held and all(row in all_rows for row in some)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader(), writer.writerows(rows)


WRITERS = {
    "rows.jsonl": jsonl,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.csv": write_csv,
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "ROWS.CSV": write_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_read_from_every_kind_of_file(name, tmp_path):
    rows = [{**row, "Number": n, "Unused": "x"} for n, row in enumerate(ROWS[:5])]
    rows[2]["Answer"] = 'Löst "das",\nsagt man.'
    WRITERS[name](tmp_path / name, rows)
    template = Template("{Title} {Number}\n{Answer}")
    found = read_rows(str(tmp_path / name), template)
    assert found == [{field: row[field] for field in ("Title", "Number", "Answer")} for row in rows]
    assert template.render(found[2]) == f'{ROWS[2]["Title"]} 2\nLöst "das",\nsagt man.'


def test_a_row_without_a_value_is_left_out(tmp_path):
    blank = [{**ROWS[0], "Answer": value} for value in (None, "", " \n ")]
    source = jsonl(tmp_path / "rows.jsonl", [*blank, ROWS[1], {"Title": "no more"}, ROWS[2]])
    assert read_rows(str(source), TEMPLATE) == ROWS[1:3]


def test_another_template_and_a_csv_file_train_from_the_command_to_the_report(arguments, tmp_path):
    rows = [{"context": row["Title"], "ask": row["Question"], "reply": row["Answer"][:80].strip()} for row in ROWS[:8]]
    write_csv(tmp_path / "rows.csv", rows)
    pattern = "Q: {ask} A: {reply}"
    more = ("--dataset", tmp_path / "rows.csv", "--template", pattern, "--num_epochs", 1)
    script.run(parse_options(arguments(tmp_path / "out", *more)))
    texts = stored_texts(tmp_path / "out")
    assert len(texts) == 6 and set(texts) < {pattern.format(**row) for row in rows}
    assert read_manifest(tmp_path / "out")["template"] == pattern


def test_weight_decay_shrinks_the_weights(six_rows, train, tmp_path):
    plain, decayed = (MemoryDecoder.load(folder / "memory_decoder.pt").blocks[0].qkv.weight.norm()
                      for folder in (six_rows, train(tmp_path / "out", "--weight_decay", 50)))
    assert decayed < 0.95 * plain


def test_the_originals_recipe_stores_one_entry_a_row(arguments, tmp_path, base):
    script.run(parse_options(arguments(tmp_path / "out", "--original", "--num_epochs", 1)))
    cut = [base.encode(text, end=True)[:96] for text in stored_texts(tmp_path / "out")]
    expected = {n: (len(ids) - 2, ids[-1]) for n, ids in enumerate(cut)}
    values = np.load(tmp_path / "out/datastore_values.npy").tolist()
    found = {n: (p, value) for (n, p), value in zip(entry_places(tmp_path / "out"), values, strict=True)}
    assert len(values) == 22 and found == expected
    assert json.loads((tmp_path / "out/metrics.json").read_text())["training_knn_temperature"] == "inf"
    assert MemoryDecoder.load(tmp_path / "out/memory_decoder.pt").sizes["norm_first"] is False


def test_topics_are_fitted_to_what_is_stored(arguments, tmp_path, base):
    folder = tmp_path / "out"
    script.run(parse_options(arguments(folder, "--topic", 8, "--num_epochs", 1)))
    windows = windows_of(base, stored_texts(folder), Template(Options.template), 96)
    entries, found = entries_of(windows), MemoryDecoder.load(folder / "memory_decoder.pt").topic
    again = Topic(base.vocabulary, 8, 32)
    again.fit(base.head.weight, entries.read, Topic.windows(entries.offsets))
    torch.testing.assert_close(found.table @ found.centres.T, again.table @ again.centres.T)  # eigenvectors have no sign
    assert not torch.equal(found.out.weight, again.out.weight)  # these were trained


def test_there_are_no_more_topics_than_windows_long_enough(arguments, tmp_path, base):
    script.run(parse_options(arguments(tmp_path / "out", "--topic", 1000, "--num_epochs", 1)))
    windows = windows_of(base, stored_texts(tmp_path / "out"), Template(Options.template), 96)
    long = sum(len(window.ids) - 1 - window.skip >= Topic.WINDOW for window in windows)
    assert 0 < MemoryDecoder.load(tmp_path / "out/memory_decoder.pt").sizes["topic"] == long < len(windows)


@pytest.mark.parametrize("flags", [["--original"], ["--original", "--demo"]])
def test_original_sets_the_original_demos_defaults(flags):
    options = parse_options(flags)
    assert (options.num_epochs, options.dropout, options.kl_weight) == (3, 0.1, 0.5)
    assert (options.decoder_lr, options.context, options.topic, options.norm) == (1e-4, 1, 0, "post")
    assert (options.head_init, options.knn_temperature, options.positions) == ("random", math.inf, "last")
    assert options.k == Options.k
    assert (options.base_model == Options.base_model) == ("--demo" not in flags)


def test_demo_sets_the_embedded_model_and_data():
    options = parse_options(["--demo"])
    assert Path(options.base_model) == ROOT / "demo/base_model"
    assert Path(options.dataset) == ROOT / "demo/legal_qa.jsonl" and Path(options.dataset).exists()
    assert Path(options.output_dir) == ROOT / "demo/trained_models"
    assert options.k == Options.k


@pytest.mark.parametrize("flags", [("--demo",), ("--original",), ("--demo", "--original")])
def test_explicit_flags_win_over_demo_and_original_wherever_they_stand(flags):
    explicit = ["--decoder_lr", "0.5", "--context", "7", "--norm", "pre", "--max_length", "99", "--output_dir", "mine",
                "--knn_temperature", "3"]
    for arguments in ([*flags, *explicit], [*explicit, *flags]):
        options = parse_options(arguments)
        assert (options.decoder_lr, options.context, options.norm, options.max_length) == (0.5, 7, "pre", 99)
        assert (options.output_dir, options.knn_temperature) == ("mine", 3)
    assert options.head_init == ("random" if "--original" in flags else "base")


def test_a_shortened_flag_never_means_less_than_the_whole_one():
    try:
        options = parse_options(["--orig"])
    except SystemExit:
        return  # refused is fine
    assert options == parse_options(["--original"])


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (37, 4), (129, 4), (1000, 7), (64, 1)])
def test_every_window_is_visited_once_an_epoch(count, batch_size):
    lengths = np.random.default_rng(0).integers(8, 96, count)
    for epoch in range(3):
        batches = epoch_batches(lengths, batch_size, 0, epoch)
        assert sorted(n for batch in batches for n in batch) == list(range(count))
        assert max(map(len, batches)) <= batch_size


def test_epochs_differ_and_one_seed_gives_one_order():
    lengths = np.random.default_rng(0).integers(8, 96, 200)
    orders = [np.concatenate(epoch_batches(lengths, 8, *which)).tolist() for which in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[3] == orders[4]


def test_windows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(8, 512, 512)
    padded = sum(len(batch) * lengths[batch].max() for batch in epoch_batches(lengths, 16, 0, 0))
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(-1, 16)
    assert padded < 1.1 * lengths.sum() < (16 * shuffled.max(1)).sum()


def test_a_stage_has_the_same_folder_only_for_the_same_inputs_and_parents(tmp_path):
    parent, other = (Stage(tmp_path, "datastore", [n]) for n in (1, 2))
    stages = [Stage(tmp_path, "index", inputs, above) for inputs in (["Flat"], ["IVF4"]) for above in (parent, other, None)]
    assert len({stage.path for stage in stages}) == 6
    assert Stage(tmp_path, "index", ["Flat"], parent).path == stages[0].path
    assert Stage(tmp_path, "index", {"a": 1, "b": 2}).path == Stage(tmp_path, "index", {"b": 2, "a": 1}).path


def test_a_stage_is_done_once_it_says_so(tmp_path):
    stage = Stage(tmp_path, "index", [])
    assert stage.begin()
    stage.finish(recall=0.5)
    again = Stage(tmp_path, "index", [])
    assert not again.begin() and again.facts["recall"] == 0.5 and again.facts["seconds"] >= 0
    assert [path.name for path in again.path.iterdir()] == ["done.json"]


def the_error(code, err):
    """The one sentence on stderr, after checking that it is the only one and that the exit code is 2."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
    return errors[0].removeprefix("error: ")


@pytest.fixture
def failure(monkeypatch, capsys):
    """Runs the script's main() in this process and returns its error sentence."""
    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["train_memory_decoder.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        return the_error(stopped.value.code, capsys.readouterr().err)
    return run


BAD = [
    (("--base_model", "nowhere/at/all"), "nowhere/at/all"),
    (("--base_model", "nobody/has-this-model"), "nobody/has-this-model"),
    (("--dataset", "missing.jsonl"), "missing.jsonl"),
    (("--dataset", "nobody/has-this-dataset"), "nobody/has-this-dataset"),
    (("--template", "{Title} {Nothing}"), "no field Nothing; it has Title, Question, Answer"),
    (("--validation_dataset", "missing.csv"), "missing.csv"),
    (("--k", 1_000_000), "K is 1000000"),
    (("--decoder_dim", 48), "multiple of 32"),
    (("--template", "no field at all"), "names no field"),
    (("--template", "{Question"), "cannot be read"),
    (("--template", "{Question} {}"), "{Question} {}"),
    (("--template", "{Question:d}"), "{Question:d}"),
    (("--k", 0), "--k must be at least 1"),
    (("--batch_size", -1), "--batch_size must be at least 1"),
    (("--topic", -1), "--topic must be at least 0"),
    (("--topic", 8, "--positions", "last"), "Topics are fitted to whole texts"),
    (("--kl_weight", 2), "--kl_weight"), (("--dropout", 1), "--dropout"),
    (("--decoder_lr", 0), "--decoder_lr"),
    (("--decoder_lr", "nan"), "--decoder_lr"), (("--weight_decay", -1), "--weight_decay"),
    (("--knn_temperature", 0), "--knn_temperature"),
    (("--validation_fraction", 1), "--validation_fraction"),
    (("--max_length", 3), "--max_length must be at least 8"),
    (("--max_examples", 0), "--max_examples must be at least 1"),
    (("--max_examples", 1), "too small"),
    (("--max_length", 513), "512 positions"),
    (("--seed", -1), "--seed"),
    (("--index", "Nonsense7"), "Nonsense7"),
    (("--index", "IVF100000,Flat"), "IVF100000,Flat"),
    (("--device", "abacus"), "abacus"),
]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=[" ".join(map(str, bad)) for bad, _ in BAD])
def test_a_user_error_is_one_sentence_and_touches_no_earlier_artefact(bad, said, earlier, arguments, failure):
    before = contents(earlier)
    assert said in failure(arguments(earlier, *bad))
    after = contents(earlier)
    assert {path: after.get(path) for path in before} == before
    assert all(earlier / "stages" in path.parents for path in set(after) - set(before))


def bad_file(folder, name):
    path = folder / name
    blank = [dict.fromkeys(ROWS[0], " ")] * 5
    path.write_text({"blank": "".join(json.dumps(row) + "\n" for row in blank), "garbage": "{not json\n"}.get(path.stem, ""))
    return path


@pytest.mark.parametrize(("name", "said"), [
    ("empty.jsonl", "is empty"), ("empty.json", "is empty"), ("empty.csv", "is empty"), ("empty.parquet", "is empty"),
    ("blank.jsonl", "no row in which all of Title, Question, Answer are filled"), ("garbage.jsonl", "cannot be read"),
    ("garbage.parquet", "cannot be read"), ("notes.txt", "no JSON, JSONL, CSV or Parquet file")])
def test_a_file_that_holds_no_rows_is_an_error_that_says_so(name, said, earlier, arguments, failure, tmp_path):
    path, before = bad_file(tmp_path, name), contents(earlier)
    message = failure(arguments(earlier, "--dataset", path))
    assert said in message and str(path) in message
    assert contents(earlier) == before


def test_an_output_folder_that_is_a_file_is_an_error(arguments, failure, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert "taken" in failure(arguments(tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_disk_too_small_is_an_error_before_anything_is_written(earlier, arguments, failure, monkeypatch):
    before, real = contents(earlier), shutil.disk_usage
    small = SimpleNamespace(total=2**20, used=2**20 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small if Path(path).is_relative_to(earlier) else real(path))
    assert "of disk" in failure(arguments(earlier, "--max_examples", 9))
    assert contents(earlier) == before


def test_a_memory_too_small_is_an_error_before_anything_is_written(earlier, arguments, failure, monkeypatch):
    before = contents(earlier)
    monkeypatch.setattr(script.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert "of memory" in failure(arguments(earlier, "--max_examples", 9))
    assert contents(earlier) == before


STAGES = ["write_keys", "build_index", "find_neighbours", "train_decoder", "make_report"]
EXHAUSTED = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize(("stage", "error"), [*((stage, MemoryError()) for stage in STAGES),
                                              *(("train_decoder", error) for error in EXHAUSTED)])
def test_memory_that_runs_out_is_an_error_and_keeps_the_artefacts(stage, error, earlier, arguments, failure, monkeypatch):
    before = contents(earlier)

    def exhausted(*_):
        raise error
    monkeypatch.setattr(script, stage, exhausted)
    assert "not enough memory" in failure(arguments(earlier, "--max_examples", 4, "--num_epochs", 1))
    assert {path: digest for path, digest in contents(earlier).items() if path in before} == before


def test_a_mistake_in_the_program_is_not_called_a_lack_of_memory(arguments, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(script, "write_keys", broken)
    monkeypatch.setattr(sys, "argv", ["train_memory_decoder.py", *arguments(tmp_path / "out")])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        script.main()


def test_control_c_says_that_the_same_command_goes_on(arguments, tmp_path, monkeypatch, capsys):
    stop_at_call(monkeypatch, script, "build_neighbours", 1)
    monkeypatch.setattr(sys, "argv", ["train_memory_decoder.py", *arguments(tmp_path / "out", "--max_examples", 4)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.rstrip().endswith("Stopped; the same command goes on from here.")


GATED = """You are trying to access a gated repo.
Make sure to have access to it at https://huggingface.co/google/gemma-2b.
401 Client Error. (Request ID: Root=1-2)
Access to model google/gemma-2b is restricted. You must have access to it and be authenticated to access it."""


def test_a_gated_model_is_explained_with_what_to_do():
    message = explain_load_error("google/gemma-2b", OSError(GATED))
    assert "\n" not in message
    for said in ("google/gemma-2b is gated", "https://huggingface.co/google/gemma-2b", "hf auth login", "--base_model"):
        assert said in message


def test_a_folder_that_does_not_exist_is_not_called_gated(tmp_path):
    with pytest.raises(UserError) as error:
        BaseLM.load(str(tmp_path / "model-401"), device="cpu")
    assert "gated" not in str(error.value)


def test_a_folder_without_a_model_is_an_error_that_names_it(earlier, arguments, failure, tmp_path):
    (tmp_path / "hollow").mkdir()
    assert f"The folder {tmp_path / 'hollow'} does not hold" in failure(arguments(earlier, "--base_model", tmp_path / "hollow"))


@pytest.mark.parametrize(("bad", "said"), [
    (("--base_model", "nobody/has-this-model"), "nobody/has-this-model"),
    (("--template", "{Nothing}"), "it has Title, Question, Answer"),
    (("--index", "Nonsense7"), "Nonsense7"),
], ids=["model", "field", "index"])
def test_the_script_itself_ends_with_code_2_and_one_sentence(bad, said, earlier, arguments):
    before = contents(earlier)
    done = run_script("train_memory_decoder.py", *arguments(earlier, *bad))
    assert said in the_error(done.code, done.err)
    assert {path: digest for path, digest in contents(earlier).items() if path in before} == before
