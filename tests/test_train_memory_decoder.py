"""Script 1 from the command to the artefacts: what it stores, reruns, held-out rows, its options and batches."""

import csv
import json
import math
import re
import shlex
import shutil
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import faiss
import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import ROOT, ROWS, SIZES
from runs import command_line, contents, entry_places, jsonl, losses, stored_rows, train_six

import app
import datastore
import evaluation
import index
import stages
import train_memory_decoder as script
import training
from base_model import DEMO_MODEL, Literal
from corpus import Corpus
from memory_decoder import MemoryDecoder, read_manifest
from texts import ORIGINAL, Template, encode_row, entries_of, windows_of
from train_memory_decoder import Options, parse_options

ARTEFACTS = {"memory_decoder.pt", "faiss_index.bin", "datastore_values.npy", "datastore_entries.npz", "examples.jsonl",
             "config.json", "metrics.json", "report.md", "loss_curve.png", "alpha_sweep.png", "held_out.jsonl"}
TEMPLATE = Template.parse(ORIGINAL)


@pytest.fixture
def train(tiny_gemma, rows_file):
    """Trains in this process into a folder, on six rows by default."""
    return lambda folder, *more: train_six(tiny_gemma, rows_file, folder, *more)


@pytest.fixture
def rerun(tiny_gemma, rows_file):
    """Runs the training of the fixture `trained` again, with changes, in this process."""
    return lambda folder, *more: script.run(parse_options(command_line(tiny_gemma, rows_file, folder, *more)))


@pytest.fixture(scope="module")
def six_rows(tiny_gemma, rows_file, tmp_path_factory):
    """A folder that a training on six rows has filled."""
    return train_six(tiny_gemma, rows_file, tmp_path_factory.mktemp("six") / "out")


@pytest.fixture(scope="module")
def original(tiny_gemma, rows_file, tmp_path_factory):
    """A folder that one epoch of the original's recipe has filled."""
    folder = tmp_path_factory.mktemp("original") / "out"
    script.run(parse_options(command_line(tiny_gemma, rows_file, folder, "--original", "--num_epochs", 1, small=SIZES)))
    return folder


@pytest.fixture
def earlier(trained, tmp_path):
    """A copy of a trained folder, with the times of its files."""
    return shutil.copytree(trained, tmp_path / "earlier")


def times(folder, *names):
    """When each file of the stages was last written. Only files of the named stages, if any are named."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/*")
            if not names or path.parent.name.split("-")[0] in names}


def first_place(base, ids):
    """The position of the first entry's key. The common beginning of all examples has no entries."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, base.encode([Literal("Title:")]), strict=False))))


def weights(folder):
    return torch.load(folder / "memory_decoder.pt", weights_only=True)["weights"]


def test_training_leaves_every_artefact_and_nothing_half_written(trained):
    assert {path.name for path in trained.iterdir()} == {*ARTEFACTS, "stages"}
    assert not list(trained.rglob("*.part"))
    assert sorted(path.name.split("-")[0] for path in (trained / "stages").iterdir() if path.is_dir()) == [
        "datastore", "decoder", "index", "neighbours", "report"]
    for name in ("loss_curve.png", "alpha_sweep.png"):
        assert matplotlib.image.imread(trained / name).std() > 0.01
    assert "| kNN-LM |" in (trained / "report.md").read_text()


def test_metrics_hold_what_the_report_is_made_of(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["held_out"].keys() == {"positions", "base", "knn_lm", "memory", "blend_logits", "blend_probabilities",
                                          "blend_auto", "mean_auto_alpha"}
    assert metrics["chosen"].keys() >= {"alpha_logits", "alpha_probabilities", "knn_lambda", "knn_temperature", "gate"}
    assert metrics["entries"] == len(np.load(trained / "datastore_values.npy")) and metrics["k"] == 8
    assert metrics["seconds"].keys() == {"datastore", "index", "neighbours", "decoder", "report"}
    assert metrics["peak_memory_bytes"] > 2**20
    assert metrics["losses"] == losses(trained) != []
    assert all(1 < metrics["held_out"][name] < math.inf for name in ("base", "knn_lm", "memory", "blend_logits"))
    assert metrics["index_recall"] == 1  # exact search
    decoder = MemoryDecoder.load(trained / "memory_decoder.pt")
    assert metrics["seen_tokens"] == len(decoder.seen)
    assert (metrics["scale"], metrics["backoff"]) == (float(decoder.scale), float(decoder.backoff))


def test_the_manifest_knows_every_file_by_its_checksum(trained):
    manifest, files = read_manifest(trained), contents(trained)
    assert manifest["files"].keys() == ARTEFACTS - {"config.json"}
    assert all(files[trained / name] == digest for name, digest in manifest["files"].items())
    assert manifest["sources"] == [{"name": "rows.jsonl", "template": ORIGINAL}] and manifest["options"]["num_epochs"] == 2


def test_every_stored_value_is_the_token_that_really_comes_next(trained, base):
    values, places = np.load(trained / "datastore_values.npy"), entry_places(trained)
    ids = [encode_row(base, TEMPLATE, row) for row in stored_rows(trained)]
    assert values.tolist() == [ids[row][position + 1] for row, position in places]
    expected = [(n, p) for n, text in enumerate(ids) for p in range(first_place(base, text), len(text) - 1)]
    assert sorted(places) == expected  # every position once, though long texts take several windows
    assert faiss.read_index(str(trained / "faiss_index.bin")).ntotal == len(values)


def test_the_keys_are_the_hidden_states_of_their_positions(trained, base):
    keys = np.fromfile(next(trained.glob("stages/datastore-*/keys.f16")), np.float16).reshape(-1, base.width)
    rows, places = stored_rows(trained), entry_places(trained)
    near = [n for n, (_, position) in enumerate(places) if position < 90][::300]  # in the first of several windows
    assert len(near) > 3
    for n in near:
        row, position = places[n]
        alone = base.hidden(torch.tensor([encode_row(base, TEMPLATE, rows[row])[:position + 1]]))[0, -1]
        np.testing.assert_allclose(keys[n].astype(np.float32), alone.numpy(), atol=2e-2)


def test_training_makes_the_memory_better_than_its_start(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    *_, (_, _, _, cross_entropy) = losses(trained)
    assert cross_entropy < math.log(metrics["seen_tokens"]) - 0.2  # it has learned more than which tokens exist
    assert metrics["held_out"]["memory"] < min(metrics["held_out"]["base"], metrics["seen_tokens"])


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """Makes this machine train in bfloat16. accelerate keeps a process's first precision, so that is reset."""
    monkeypatch.setattr(script, "fast_bfloat16", lambda device: True)
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_training_in_mixed_precision_learns_and_keeps_its_weights_in_float32(fast_bfloat16, train, six_rows, tmp_path, monkeypatch):
    kinds, real = set(), MemoryDecoder.features
    monkeypatch.setattr(MemoryDecoder, "features", lambda *a: kinds.add(torch.is_autocast_enabled("cpu")) or real(*a))
    folder = train(tmp_path / "out")
    noted, plain = (np.array(losses(each)) for each in (folder, six_rows))
    assert kinds == {True, False}  # in training, and in the report
    assert np.isfinite(noted).all() and noted[-1] == pytest.approx(plain[-1], abs=0.1)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in MemoryDecoder.load(
        folder / "memory_decoder.pt").parameters())


def test_the_loss_is_kl_and_cross_entropy_in_the_share_asked_for_and_votes_have_the_temperature_asked_for(
        six_rows, train, tmp_path, monkeypatch):
    temperatures, real = [], training.Batches.__init__
    monkeypatch.setattr(training.Batches, "__init__", lambda self, *a: temperatures.append(a[3]) or real(self, *a))
    other = train(tmp_path / "out", "--kl_weight", 0.2, "--knn_temperature", 3.5, "--num_epochs", 1)
    for folder, share in ((six_rows, 0.5), (other, 0.2)):
        for _, loss, kl, ce in losses(folder):
            assert loss == pytest.approx(share * kl + (1 - share) * ce, rel=1e-5) and kl < 0.9 * ce
    assert temperatures == [3.5] and json.loads((other / "metrics.json").read_text())["training_knn_temperature"] == 3.5


def test_the_memory_has_one_output_row_for_each_token_that_was_seen(trained, base):
    seen = np.unique(np.load(trained / "datastore_values.npy"))
    assert 8 < len(seen) < base.vocabulary
    assert weights(trained)["seen"].tolist() == seen.tolist()
    assert weights(trained)["output_projection.weight"].shape == (len(seen), 32)


def test_the_report_changes_nothing_of_the_trained_memory_but_its_scale(trained, base):
    (learned,) = (torch.load(path, weights_only=True)["weights"] for path in trained.glob("stages/decoder-*/memory_decoder.pt"))
    published = weights(trained)
    assert learned.keys() == published.keys() and learned.pop("scale") == 1 != published.pop("scale")
    _, share = datastore.seen_tokens(entries_of(windows_of(base, stored_rows(trained), TEMPLATE, 96)))
    assert float(learned["backoff"]) == pytest.approx(share)
    assert all(torch.equal(value, published[name]) for name, value in learned.items())


def test_the_scale_is_chosen_on_the_even_held_out_rows(earlier, rerun, rows_file, base, monkeypatch):
    real, read = evaluation.calibrate, []
    monkeypatch.setattr(evaluation, "calibrate", lambda *a: read.extend(a[2]) or real(*a))
    shutil.rmtree(next(earlier.glob("stages/report-*")))
    rerun(earlier)
    held = [example.row for example in Corpus.read(Options(dataset=str(rows_file))).held]
    windows = windows_of(base, held, TEMPLATE, 96)
    assert read == [window for window in windows if window.example % 2 == 0] != windows


def start_of(base, trained, **options):
    """(decoder before training, stored keys, KL of its seen-token distribution to the base's, KL of a uniform one to it)."""
    keys = datastore.open_keys(next(trained.glob("stages/datastore-*/keys.f16")), base.width)
    entries = entries_of(windows_of(base, stored_rows(trained), TEMPLATE, 96))
    decoder = training.make_decoder(Options(decoder_dim=32, **options), base, keys, entries)
    hidden = torch.from_numpy(keys[::20].astype(np.float32))
    with torch.no_grad():
        own = torch.log_softmax(decoder.eval().output_projection(decoder.features(hidden[None])[0]), -1)
        expected = torch.log_softmax(base.logits(hidden)[:, decoder.seen], -1)
    gaps = [F.kl_div(opinion, expected, log_target=True, reduction="batchmean")
            for opinion in (own, torch.full_like(own, -math.log(own.shape[1])))]
    return decoder, *gaps


def test_the_memory_starts_from_the_bases_head_or_at_random(trained, base):
    decoder, gap, flat = start_of(base, trained)
    assert gap < 0.1 * flat and decoder.seen.tolist() == np.unique(np.load(trained / "datastore_values.npy")).tolist()
    decoder, gap, flat = start_of(base, trained, head_init="random")
    assert gap > 0.7 * flat and len(decoder.seen) == base.vocabulary


def test_the_options_reach_the_memory(trained, base):
    decoder, _, _ = start_of(base, trained, dropout=0.25, context=7, norm="post")
    assert {part.p for part in decoder.modules() if isinstance(part, torch.nn.Dropout)} == {0.25}
    assert (decoder.sizes["context"], decoder.sizes["norm_first"], decoder.sizes["decoder_dim"]) == (7, False, 32)


def test_the_originals_memory_has_all_tokens_and_leaves_nothing_to_the_base(original, base):
    decoder = MemoryDecoder.load(original / "memory_decoder.pt")
    assert weights(original)["output_projection.weight"].shape == (base.vocabulary, 32)
    assert decoder.seen.tolist() == list(range(base.vocabulary))
    assert (decoder.sizes["norm_first"], decoder.sizes["context"]) == (False, 1)
    assert (float(decoder.scale), float(decoder.backoff)) == (1, 0)
    features, base_logits = torch.randn(2, 32), torch.randn(2, base.vocabulary)
    said = decoder.log_probabilities(features, base_logits)
    torch.testing.assert_close(said, decoder.log_probabilities(features, 5 * base_logits))


def test_the_originals_recipe_stores_one_entry_a_row(original, base):
    cut = [encode_row(base, TEMPLATE, row)[:96] for row in stored_rows(original)]
    values = np.load(original / "datastore_values.npy").tolist()
    found = {row: (position, value) for (row, position), value in zip(entry_places(original), values, strict=True)}
    assert len(values) == 22 and found == {n: (len(ids) - 2, ids[-1]) for n, ids in enumerate(cut)}
    assert json.loads((original / "metrics.json").read_text())["training_knn_temperature"] == "inf"


def test_the_last_line_names_the_command_that_opens_the_memory(train, tmp_path, capsys):
    train(tmp_path / "with a space", "--num_epochs", 1)
    command = capsys.readouterr().out.splitlines()[-1].partition("chat with it: ")[2]
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("python", "app.py")
    assert app.parse_options(arguments).model_dir == str(tmp_path / "with a space")


def test_a_rerun_with_the_same_settings_runs_no_stage_again(earlier, rerun):
    before, artefacts = times(earlier), contents(earlier)
    rerun(earlier)
    assert times(earlier) == before
    changed = {path.name for path, digest in contents(earlier).items() if artefacts[path] != digest}
    assert changed <= {"config.json"}  # it names the folder


def test_another_learning_rate_keeps_datastore_index_and_neighbours(earlier, rerun):
    before, kept = times(earlier), times(earlier, "datastore", "index", "neighbours")
    memory = (earlier / "memory_decoder.pt").read_bytes()
    rerun(earlier, "--decoder_lr", 2e-3, "--num_epochs", 1)
    assert len(kept) > 8 and times(earlier, "datastore", "index", "neighbours") == kept
    assert not times(earlier, "decoder").keys() & before.keys()  # the earlier one's folder is gone
    assert (earlier / "memory_decoder.pt").read_bytes() != memory
    assert read_manifest(earlier)["options"]["decoder_lr"] == 2e-3


def test_a_rerun_with_less_free_memory_keeps_the_index_it_has(train, tmp_path, monkeypatch):
    # The limits are scaled down so that a few thousand entries lie on either side of them.
    monkeypatch.setattr(index, "FLAT_LIMIT", 100)
    chosen = []

    def choose(entries, width, memory):
        chosen.append(index.choose_index(entries, width, memory // 10_000))
        return chosen[-1]
    monkeypatch.setattr(stages, "choose_index", choose)
    for gib in (8, 2):
        monkeypatch.setattr(stages.psutil, "virtual_memory", lambda gib=gib: SimpleNamespace(available=gib * 2**30))
        train(tmp_path / "out", "--num_epochs", 1)
        if gib == 8:
            before = times(tmp_path / "out")
    assert times(tmp_path / "out") == before and chosen[0] != chosen[1]


def test_a_lossy_index_reaches_the_recall_and_its_neighbours_have_exact_distances(six_rows, train, tmp_path, base, capsys):
    folder = train(shutil.copytree(six_rows, tmp_path / "out"), "--index", "PCA8,IVF16,SQ8", "--recall", 0.9, "--num_epochs", 1)
    found = re.search(r"recall@8 .* (.*), reads (.*) of 16 inverted lists\n", capsys.readouterr().out)
    recall, lists = map(float, found.groups())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0.9 <= recall < 1 and lists < 16 and recall == round(metrics["index_recall"], 3)
    assert index.inverted_lists(faiss.read_index(str(folder / "faiss_index.bin"))).nprobe == metrics["index_nprobe"] == lists
    keys = datastore.open_keys(next(folder.glob("stages/datastore-*/keys.f16")), base.width).astype(np.float64)
    D, I = (np.load(next(folder.glob(f"stages/neighbours-*/neighbours_{name}.npy"))) for name in "DI")
    np.testing.assert_allclose(D, ((keys[:, None] - keys[I]) ** 2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("change", [("--max_length", 64), ("--max_examples", 5), ("--positions", "last", "--k", 2),
                                    ("--template", "{Question}\n{Answer}")])
def test_other_texts_or_positions_make_another_datastore(change, six_rows, train, tmp_path):
    folder = shutil.copytree(six_rows, tmp_path / "out")
    before = times(folder)
    train(folder, *change, "--num_epochs", 1)
    assert not times(folder).keys() & before.keys()
    assert len([path for path in (folder / "stages").iterdir() if path.is_dir()]) == 5


def test_one_seed_trains_one_decoder_and_another_seed_another(six_rows, train, tmp_path):
    again, other = train(tmp_path / "again"), train(tmp_path / "other", "--seed", 1)
    assert contents(again)[again / "datastore_values.npy"] == contents(six_rows)[six_rows / "datastore_values.npy"]
    assert weights(again).keys() == weights(six_rows).keys()
    torch.testing.assert_close(weights(again), weights(six_rows), rtol=1e-3, atol=1e-4)
    gap = weights(other)["blocks.0.qkv.weight"] - weights(six_rows)["blocks.0.qkv.weight"]
    assert gap.abs().mean() > 1e-2


def test_held_out_rows_are_in_no_entry(trained, rows_file, base):
    rows, stored = [json.loads(line) for line in rows_file.read_text().splitlines()], stored_rows(trained)
    held = [row for row in rows if row not in stored]
    assert len(stored) == 22 and len(held) == 2 and all(row in rows for row in stored)
    metrics = json.loads((trained / "metrics.json").read_text())
    ids = [encode_row(base, TEMPLATE, row) for row in held]
    positions = sorted(len(text) - 1 - first_place(base, text) for text in ids)
    assert sorted((metrics["held_out"]["positions"], metrics["chosen"]["positions"])) == positions


def test_a_validation_dataset_is_held_out_whole(rows_file, tmp_path):
    apart = jsonl(tmp_path / "held.jsonl", ROWS[1:4])
    corpus = Corpus.read(Options(dataset=str(rows_file), validation_dataset=str(apart), max_examples=7))
    assert corpus.sources == [{"name": "rows.jsonl", "template": ORIGINAL}] and [e.row for e in corpus.held] == ROWS[1:4]
    assert len(corpus.examples) == 7 and all(example.row in ROWS for example in corpus.examples)


def test_another_template_and_a_csv_file_train_from_the_command_to_the_report(train, tmp_path):
    rows = [{"context": row["Title"], "ask": row["Question"], "reply": row["Answer"][:80].strip()} for row in ROWS[:8]]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader(), writer.writerows(rows)
    pattern = "Q: {ask} A: {reply}"
    folder = train(tmp_path / "out", "--dataset", tmp_path / "rows.csv", "--template", pattern, "--num_epochs", 1)
    stored = stored_rows(folder)
    assert len(stored) == 6 and all(row in [{"ask": r["ask"], "reply": r["reply"]} for r in rows] for row in stored)
    assert read_manifest(folder)["sources"][0]["template"] == pattern
    assert "| memory alone |" in (folder / "report.md").read_text()


def test_weight_decay_shrinks_the_weights(six_rows, train, tmp_path):
    plain, decayed = (weights(folder)["blocks.0.qkv.weight"].norm()
                      for folder in (six_rows, train(tmp_path / "out", "--weight_decay", 50)))
    assert decayed < 0.95 * plain


def test_demo_sets_the_embedded_model_and_data():
    options = parse_options(["--demo"])
    assert options.base_model == DEMO_MODEL
    assert Path(options.dataset) == ROOT / "demo/legal_qa.jsonl" and Path(options.dataset).exists()
    assert Path(options.output_dir) == ROOT / "demo/trained_models"
    assert {name: getattr(options, name) for name in script.DEMO} == script.DEMO
    options.check()


def readme_table():
    """(option, default, original) of every line of the README's table of parameters, as text."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^\| `--(\w+)` \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)


def test_the_readmes_table_of_parameters_has_the_defaults_and_those_of_original():
    plain, original = parse_options([]), parse_options(["--original"])
    for name, default, first in readme_table():
        for options, said in ((plain, default), (original, first)):
            value = getattr(options, name)
            assert type(value)(said) == value, name
    assert {name for name, *_ in readme_table()} >= {"num_epochs", "decoder_lr", "decoder_dim", "k", "context", "head_init"}


@pytest.mark.parametrize("flags", [["--original"], ["--original", "--demo"], ["--demo", "--original"]])
def test_original_sets_the_original_demos_defaults_even_beside_demo(flags):
    options = parse_options(flags)
    assert (options.num_epochs, options.dropout, options.kl_weight) == (3, 0.1, 0.5)
    assert (options.decoder_lr, options.context, options.norm, options.head_init) == (1e-4, 1, "post", "random")
    assert (options.knn_temperature, options.positions, options.k) == (math.inf, "last", 32)
    assert options.base_model == (DEMO_MODEL if "--demo" in flags else Options.base_model)
    options.check()


@pytest.mark.parametrize("flags", [("--demo",), ("--original",), ("--demo", "--original")])
def test_explicit_flags_win_over_demo_and_original_wherever_they_stand(flags):
    explicit = ["--decoder_lr", "0.5", "--context", "7", "--norm", "pre", "--max_length", "99", "--output_dir", "mine",
                "--knn_temperature", "3"]
    for arguments in ([*flags, *explicit], [*explicit, *flags]):
        options = parse_options(arguments)
        assert (options.decoder_lr, options.context, options.norm, options.max_length) == (0.5, 7, "pre", 99)
        assert (options.output_dir, options.knn_temperature) == ("mine", 3)
        assert options.head_init == ("random" if "--original" in flags else "base")
