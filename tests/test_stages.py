"""The stages of a run: the inputs that name their folders, when one is done, and the plan of disk and memory."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROWS, examples

import index
import stages
from corpus import Corpus
from stages import Stage, Stages, estimate_disk, estimate_memory, estimate_seconds, plan
from support.command import UserError
from texts import ORIGINAL, Template, entries_of, windows_of
from train_memory_decoder import Options
from training import make_decoder

NAMES = ["datastore", "index", "neighbours", "decoder", "report"]
TEMPLATE = Template.parse(ORIGINAL)
# The first stage of which an option is an input. Every other option is an input of the decoder's stage.
FIRST = {"max_length": "datastore", "positions": "datastore", "index": "index", "recall": "index",
         "k": "index", "seed": "index"}
# These say where things are, or act only through the rows, the template and the model that they name.
NO_INPUT = {"base_model", "dataset", "split", "template", "validation_dataset", "validation_split", "validation_fraction",
            "max_examples", "output_dir", "dtype", "device", "demo", "original", "add", "forget"}


def another(field):
    """A value of an option that is not its default."""
    if "choices" in field.metadata:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    if isinstance(field.default, bool):
        return not field.default
    return field.default + "x" if isinstance(field.default, str) else (field.default or 0) + 1


def corpus_of(rows=ROWS[:4], held=ROWS[4:6]):
    return Corpus([{"name": "rows.jsonl", "template": ORIGINAL}], examples(rows), examples(held))


def folders(root, base, options=None, grown_from=None, corpus=None, **text):
    return {stage.name: stage.path for stage in Stages(root, options or Options(), base, corpus or corpus_of(**text), grown_from)}


def changed(before, after):
    assert list(before) == list(after) == NAMES
    return [name for name in NAMES if before[name] != after[name]]


def test_a_stage_has_the_same_folder_only_for_the_same_inputs_and_parents(tmp_path):
    parent, other = (Stage(tmp_path, "datastore", [n]) for n in (1, 2))
    made = [Stage(tmp_path, "index", inputs, above) for inputs in (["Flat"], ["IVF4"]) for above in (parent, other, None)]
    assert len({stage.path for stage in made}) == 6
    assert Stage(tmp_path, "index", ["Flat"], parent).path == made[0].path
    assert Stage(tmp_path, "index", {"a": 1, "b": 2}).path == Stage(tmp_path, "index", {"b": 2, "a": 1}).path


def test_a_stage_is_done_once_it_says_so(tmp_path):
    stage = Stage(tmp_path, "index", [])
    assert stage.begin() and stage.begin()
    stage.finish(recall=0.5)
    again = Stage(tmp_path, "index", [])
    assert not again.begin() and again.facts["recall"] == 0.5 and again.facts["seconds"] >= 0
    assert [path.name for path in again.path.iterdir()] == ["done.json"]


def test_a_stage_that_was_begun_before_says_so(tmp_path):
    fresh, stopped = Stage(tmp_path, "index", ["fresh"]), Stage(tmp_path, "index", ["stopped"])
    stopped.begin()
    stopped = Stage(tmp_path, "index", ["stopped"])  # in another run
    for stage, resumed in ((fresh, False), (stopped, True)):
        stage.begin(), stage.finish()
        assert stage.facts["resumed"] is resumed


@pytest.mark.parametrize("field", dataclasses.fields(Options), ids=lambda field: field.name)
def test_an_option_changes_the_folders_of_its_stage_and_of_those_behind(field, tmp_path, base):
    options = dataclasses.replace(Options(), **{field.name: another(field)})
    expected = [] if field.name in NO_INPUT else NAMES[NAMES.index(FIRST.get(field.name, "decoder")):]
    assert changed(folders(tmp_path, base), folders(tmp_path, base, options)) == expected


def test_the_lists_above_name_options_that_exist():
    assert {*FIRST, *NO_INPUT} < {field.name for field in dataclasses.fields(Options)}


def test_other_rows_change_every_folder_and_other_held_out_rows_only_the_reports(tmp_path, base):
    before = folders(tmp_path, base)
    assert changed(before, folders(tmp_path, base, rows=ROWS[:3])) == NAMES
    assert changed(before, folders(tmp_path, base, rows=ROWS[3::-1])) == NAMES
    assert changed(before, folders(tmp_path, base, held=ROWS[5:7])) == ["report"]


def test_a_memory_that_goes_on_from_another_shares_only_the_entries_with_a_fresh_one(tmp_path, base):
    assert changed(folders(tmp_path, base), folders(tmp_path, base, grown_from={"decoder": "decoder-1"})) == NAMES[1:]


def test_another_model_or_number_format_changes_every_folder(tmp_path, base):
    before = folders(tmp_path, base)
    same, other, half = (SimpleNamespace(fingerprint=fingerprint, model=SimpleNamespace(dtype=dtype)) for fingerprint, dtype in (
        (base.fingerprint, base.model.dtype), ("other", base.model.dtype), (base.fingerprint, "torch.float16")))
    assert changed(before, folders(tmp_path, same)) == []
    assert changed(before, folders(tmp_path, other)) == changed(before, folders(tmp_path, half)) == NAMES


def test_other_words_of_one_chat_template_change_every_folder(tmp_path, base):
    pattern = "chat {Question} {Answer}"
    parts = [("<turn>user\n", "Question"), ("<end>\n<turn>assistant\n", "Answer")]
    def made(*words):
        corpus = corpus_of()
        corpus.templates = lambda _: [Template(pattern, *words)]
        return folders(tmp_path, base, corpus=corpus)

    one, other, tail = (made(*words) for words in (
        (parts, "<end>\n"), ([("<turn>human\n", "Question"), parts[1]], "<end>\n"), (parts, "<eos>")))
    assert changed(one, other) == changed(one, tail) == NAMES


@pytest.fixture(scope="module")
def windows(base):
    return windows_of(base, ROWS[:6], TEMPLATE, 96)


@pytest.fixture
def planned(tmp_path, base, windows, monkeypatch):
    """Plans a small run with a number of bytes free. Returns (options, stages, plan of them)."""
    (tmp_path / "stages").mkdir()
    options = Options(k=8, decoder_dim=32, batch_size=8, max_length=96, index="Flat")

    def make(memory=2**34, disk=2**34, is_main=True, **changes):
        monkeypatch.setattr(stages.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
        made = dataclasses.replace(options, **changes)
        all_stages = Stages(tmp_path / "stages", made, base, corpus_of(ROWS[:6], ROWS[6:8]))
        return made, all_stages, lambda: plan(made, base, windows, windows[:2], seen(windows), all_stages, is_main)
    return make


def seen(windows):
    return len(np.unique(entries_of(windows).values))


def test_the_plan_prints_entries_memory_disk_and_minutes_as_numbers(planned, windows, base, capsys):
    options, _, make = planned(memory=3 * 2**30, disk=5 * 2**30)
    assert make() == "Flat"
    lines = capsys.readouterr().out
    number = r"([\d,]+(?:\.\d+)?)"
    found = re.fullmatch(
        rf"plan: {number} entries of width 32, {number} of 512 tokens seen; index Flat; disk {number} GiB of {number} free; "
        rf"memory {number} GiB in all, {number} free beside the model\nplan: about {number} min from here, "
        "when nothing of it is done yet\n", lines)
    entries, tokens, disk, free_disk, memory, free_memory, minutes = (float(text.replace(",", "")) for text in found.groups())
    assert (entries, tokens) == (len(entries_of(windows).values), seen(windows))
    assert (free_disk, free_memory) == (5, 3)
    assert disk == round(estimate_disk(options, base, int(entries), int(tokens), "Flat") / 2**30, 2)
    assert memory > estimate_memory(options, base, int(entries), int(tokens), "Flat") / 2**30  # libraries and model come on top
    assert minutes >= 1 and minutes == int(minutes)


def test_the_plan_refuses_a_machine_with_a_byte_of_memory_too_little(planned, windows, base):
    needed = estimate_memory(planned()[0], base, len(entries_of(windows).values), seen(windows), "Flat")
    assert planned(memory=needed)[2]() == "Flat"
    with pytest.raises(UserError, match=r"^Training needs about [\d.]+ GiB of memory[^\n]*--decoder_dim[^\n]*\.$"):
        planned(memory=needed - 1)[2]()


def test_the_plan_refuses_too_small_a_machine_before_it_tries_a_step_there(planned, monkeypatch):
    monkeypatch.setattr(stages, "timed", lambda work: pytest.fail("a measured step takes the memory that is not there"))
    for few in ({"memory": 1000}, {"disk": 1000}):
        with pytest.raises(UserError):
            planned(**few)[2]()


def test_the_plan_refuses_a_disk_with_a_byte_too_little_but_counts_what_is_there(planned, windows, base):
    options, made, _ = planned()
    needed = estimate_disk(options, base, len(entries_of(windows).values), seen(windows), "Flat")
    assert planned(disk=needed)[2]() == "Flat"
    with pytest.raises(UserError, match=r"^The datastore needs [\d.]+ GiB of disk[^\n]*--output_dir\.$"):
        planned(disk=needed - 1)[2]()
    made.datastore.begin()
    (made.datastore / "keys.f16").write_bytes(bytes(1000))
    assert planned(disk=needed - 1000)[2]() == "Flat"
    with pytest.raises(UserError):
        planned(disk=needed - 1001)[2]()


def test_another_process_than_the_main_one_prints_and_refuses_nothing(planned, capsys):
    assert planned(memory=0, disk=0, is_main=False)[2]() == "Flat"
    assert capsys.readouterr().out == ""


def test_auto_gives_the_index_half_of_the_free_memory_and_keeps_a_choice_once_made(planned, windows, monkeypatch):
    monkeypatch.setattr(index, "FLAT_LIMIT", 100)
    entries = len(entries_of(windows).values)
    enough = 2 * index.index_bytes(entries, 32, f"IVF{int(4 * entries**0.5)},SQfp16")
    _, made, with_more = planned(memory=enough, is_main=False, index="auto")
    more = with_more()
    less = planned(memory=enough - 2, is_main=False, index="auto")[2]()
    assert more.endswith("SQfp16") and less.endswith("SQ8")
    made.index.begin()
    (made.index / "factory.txt").write_text(more)
    assert planned(memory=enough - 2, is_main=False, index="auto")[2]() == more
    assert planned(memory=enough - 2, is_main=False, index="auto", seed=1)[2]() == less  # another stage


def test_the_keys_that_an_index_is_trained_with_count_where_they_are_more_than_the_index(base):
    few, many = (estimate_memory(Options(), base, 10**7, 100, f"IVF{lists},PQ1np") for lists in (1000, 250_000))
    assert few < many == 6 * base.width * 10**7


def test_all_that_a_run_writes_takes_about_the_disk_that_was_estimated(trained, base):
    values = np.load(trained / "datastore_values.npy")
    sizes = {path.name: path.stat().st_size for path in trained.glob("stages/*/*")}
    index, decoder = sizes["faiss_index.bin"], sizes["memory_decoder.pt"]
    written = sizes["keys.f16"] + sizes["neighbours_D.npy"] + sizes["neighbours_I.npy"] + index
    written += max(6 * decoder, index + 3 * decoder)  # two checkpoints, gone by now, held Adam's two numbers a weight as well
    estimate = estimate_disk(Options(k=8, decoder_dim=32), base, len(values), len(np.unique(values)), "Flat")
    assert estimate == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("decoder_dim", [128, 256])
def test_a_decoder_has_about_as_many_weights_as_the_plan_counts(decoder_dim, base, windows):
    options, entries = Options(decoder_dim=decoder_dim), entries_of(windows)
    keys = np.random.default_rng(0).standard_normal((len(entries.values), base.width)).astype(np.float16)
    decoder = make_decoder(options, base, keys, entries)
    counted = stages.decoder_weights(options, base, len(decoder.seen))
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("change", [{"batch_size": 64}, {"max_length": 512}, {"decoder_dim": 512}, {"context": 256}])
def test_what_makes_training_larger_makes_the_estimate_of_its_memory_larger(change, base):
    small = Options(batch_size=8, max_length=256, decoder_dim=64, context=64)
    needed = [estimate_memory(options, base, 1000, 300, "Flat") for options in (small, dataclasses.replace(small, **change))]
    assert needed[0] < needed[1]


def test_more_entries_and_more_seen_tokens_need_more_memory(base):
    options = Options(decoder_dim=512)
    fewest = estimate_memory(options, base, 1000, 100, "Flat")
    assert fewest < estimate_memory(options, base, 1000, 512, "Flat")
    assert fewest < estimate_memory(options, base, 100_000, 100, "Flat")


def test_the_estimate_of_time_grows_with_epochs_and_rows(base, windows, monkeypatch):
    monkeypatch.setattr(stages, "timed", lambda work: 1e-3)

    def estimate(some=windows, held=windows[:2], factory="Flat", entries=None, **changes):
        entries = entries or len(entries_of(some).values)
        return estimate_seconds(Options(batch_size=2, decoder_dim=32, **changes), base, some, held, entries, 100, factory)
    few = estimate()
    flat, all_lists, some_lists = (estimate(entries=10**6, **more) for more in (
        {}, {"factory": "IVF4000,SQfp16", "recall": 1.0}, {"factory": "IVF4000,SQfp16"}))
    assert flat == all_lists and 10 * (some_lists - few) < flat
    assert 0 < estimate(some=windows[:len(windows) // 2]) < few
    assert few < min(estimate(num_epochs=6), estimate(held=windows)) < float("inf")


def test_what_the_estimate_of_time_measures_can_be_run(base, windows, monkeypatch):
    results = []
    monkeypatch.setattr(stages, "timed", lambda work: results.append(work()) or 1e-3)
    estimate_seconds(Options(batch_size=2, decoder_dim=32), base, windows, windows[:2], len(entries_of(windows).values), 100,
                     "Flat")
    assert len(results) >= 3 and np.isfinite(results).all()
