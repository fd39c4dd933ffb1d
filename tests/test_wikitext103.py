"""benchmarks/wikitext103.py on a tiny model and a small text: windows and scores against slow twins, the table, errors."""

import math
import re
import shlex
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, make_decoder, make_tiny_gemma
from runs import failure_of

import train_memory_decoder
from sources.tables import Table
from support.command import UserError

sys.path.append(str(ROOT / "benchmarks"))
import wikitext103 as script

CONTEXT, SCORED = 16, 8
LINES = [line for row in ROWS[1:200:25] for line in (f" = {row['Title']} = \n", "", f" {row['Answer'][:200]} \n")]
SIZES = ("--context", 64, "--scored", 32, "--parts", 2, "--device", "cpu")


@pytest.fixture
def text(tmp_path):
    """A file of these lines, with blank lines between them as in the original text."""
    path = tmp_path / "test.txt"
    path.write_text("".join(line or " \n" for line in LINES))
    return path


def streams(base, parts):
    """The ids of each part, read line by line and cut as in the paper's code."""
    rows = datasets.Dataset.from_dict({"text": LINES})
    for part in range(parts):
        lines = rows.shard(parts, part, contiguous=True)["text"]
        ids = [token for line in lines for token in base.tokenizer(line, add_special_tokens=False).input_ids]
        yield ids[:len(ids) - len(ids) % CONTEXT]


@torch.no_grad()
def slow_scores(base, parts):
    """Log probability of every token except each part's first. Each has its own forward pass over exactly its context."""
    found = []
    for ids in streams(base, parts):
        for place in range(1, len(ids)):
            end = place // SCORED * SCORED + SCORED  # of the window that scores it
            logits = base.model(torch.tensor([ids[max(0, end - CONTEXT):place]])).logits[0, -1]
            found.append(float(torch.log_softmax(logits.double(), -1)[ids[place]]))
    return np.array(found)


@pytest.mark.parametrize("parts", [1, 3])
def test_every_token_is_scored_once_from_the_tokens_before_it_in_its_window(base, parts):
    windows = script.sliding_windows(base, LINES, parts, CONTEXT, SCORED)
    scored = [(w.example, w.position + i + 1, token) for w in windows for i, token in enumerate(w.ids[w.skip + 1:])]
    assert scored == [(part, place, ids[place]) for part, ids in enumerate(streams(base, parts)) for place in range(1, len(ids))]
    assert {len(w.ids) for w in windows} == {SCORED, CONTEXT} and len(scored) > 300


@pytest.mark.parametrize("parts", [1, 3])
def test_perplexity_is_that_of_scoring_each_token_alone(base, parts):
    windows = script.sliding_windows(base, LINES, parts, CONTEXT, SCORED)
    np.testing.assert_allclose(script.base_scores(base, windows, 5), slow_scores(base, parts), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_memory_reads_each_window_from_its_start(base):
    windows, decoder = script.sliding_windows(base, LINES[:9], 1, CONTEXT, SCORED), make_decoder(context=CONTEXT)
    scores, expected = script.memory_scores(base, decoder, windows, 4), []
    for window in windows:
        hidden = base.hidden(torch.tensor([window.ids]))
        m = decoder.log_probabilities(decoder.features(hidden), base.logits(hidden))[0]
        expected += [float(m[i, window.ids[i + 1]]) for i in range(window.skip, len(window.ids) - 1)]
    np.testing.assert_allclose(scores["memory"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores["base"], script.base_scores(base, windows, 4), rtol=1e-4, atol=1e-4)
    assert scores["position"].tolist() == list(range(len(expected)))


def test_a_text_shorter_than_a_window_stays_whole(base):
    ids = base.tokenizer(LINES[2], add_special_tokens=False).input_ids
    windows = script.sliding_windows(base, LINES[2:3], 32, 4 * len(ids), 2 * len(ids))
    assert [(w.ids, w.skip) for w in windows] == [(ids, 0)]
    with pytest.raises(UserError, match="no two tokens"):
        script.sliding_windows(base, ["", ""], 32, 16, 8)


def test_a_file_has_the_lines_that_the_hub_has(text, monkeypatch):
    asked = []
    hub = Table("wikitext", ["text"], lambda names: [{"text": line} for line in LINES])
    monkeypatch.setattr(script, "read_table", lambda *names: asked.append(names) or hub)
    assert script.read_rows(str(text), "test") == script.read_rows(None, "test") == LINES
    assert asked == [("Salesforce/wikitext:wikitext-103-raw-v1", "test")]


def run(monkeypatch, capsys, *arguments):
    """What main() prints."""
    monkeypatch.setattr(sys, "argv", ["wikitext103.py", *map(str, arguments)])
    script.main()
    return capsys.readouterr().out


def test_it_stops_where_the_base_is_not_as_good_or_bad_as_expected(base, tiny_gemma, text, monkeypatch, capsys):
    windows = script.sliding_windows(base, LINES, 2, 64, 32)
    known = math.exp(-script.base_scores(base, windows, 8).mean())
    given = ("--base_model", tiny_gemma, "--test", text, *SIZES)
    assert f"perplexity {known:.2f} over" in run(monkeypatch, capsys, *given, "--expected", f"{known + 0.09}")
    sentence = failure_of(script.main, "wikitext103.py", [*given, "--expected", f"{known + 0.11}"], monkeypatch, capsys)
    assert f"is {known:.2f} and not" in sentence and "--expected None" in sentence
    assert "is " in failure_of(script.main, "wikitext103.py", given, monkeypatch, capsys)  # gpt2's 24.9


def test_the_table_has_the_memory_beside_the_base(tiny_gemma, trained, text, monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--base_model", tiny_gemma, "--model_dir", trained, "--test", text, "--validation", text,
              *SIZES, "--expected", "None")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]
    assert [re.sub("alpha [0-9.]+", "alpha", row[0]) for row in cells[1:]] \
        == ["base alone", "memory alone", "memory, alpha", "memory, automatic alpha"]
    values = [float(row[1]) for row in cells[1:]]
    assert [float(row[2]) for row in cells[1:]] == pytest.approx([value / values[0] for value in values], abs=1e-3)
    assert values[2] <= min(values[:2])  # alpha was chosen on this very text
    assert all(row[3] == "" for row in cells[1:])


def test_alpha_is_chosen_on_the_validation_text_alone(monkeypatch):
    sure, unsure = np.log([0.5, 0.4, 0.6]), np.log([0.1, 0.1, 0.2])
    scores = {"validation": {"base": sure, "memory": unsure}, "test": {"base": unsure, "memory": sure}}
    monkeypatch.setattr(script, "memory_scores", lambda base, decoder, windows, batch_size: scores[windows])
    found, alpha = script.measure(None, None, None, "validation", "test", 1)
    assert alpha == 0 and list(found) == ["memory alone", script.MEMORY]
    assert found["memory alone"] < found[script.MEMORY] == pytest.approx(math.exp(-unsure.mean()))


def test_the_papers_figures_stand_beside_its_own_models_only(capsys):
    script.print_table("openai-community/gpt2", {script.BASE: 24.9, script.MEMORY: 20.0}, 0.55)
    rows = capsys.readouterr().out.splitlines()[3:]
    assert rows == ["| base alone | 24.90 | 1.000 | 24.89 |", "| memory, alpha 0.55 | 20.00 | 0.803 | 13.36 |",
                    "| kNN-LM |  |  | 15.62 |", "| full tuning (DAPT) |  |  | 14.76 |"]


@pytest.mark.parametrize("arguments, said", [
    (["--scored", 65], "--scored must be"), (["--parts", 0], "--parts"), (["--test", "absent.txt"], "check --test"),
    (["--context", 4096], "more than the 512 positions"), (["--model_dir", "absent"], "holds no memory"),
])
def test_what_cannot_work_is_one_sentence(tiny_gemma, text, arguments, said, monkeypatch, capsys):
    given = ["--base_model", tiny_gemma, "--test", text, *SIZES, *arguments]
    assert said in failure_of(script.main, "wikitext103.py", given, monkeypatch, capsys)


def test_a_memory_of_another_base_is_refused(trained, text, tmp_path, monkeypatch, capsys):
    given = ["--base_model", make_tiny_gemma(tmp_path / "other", seed=1), "--model_dir", trained, "--test", text, *SIZES]
    assert "This memory was trained with" in failure_of(script.main, "wikitext103.py", given, monkeypatch, capsys)


def test_the_training_that_it_names_is_one_that_script_1_takes():
    line = script.__doc__.split("python train_memory_decoder.py ")[1].split("\n\n")[0]
    options = train_memory_decoder.parse_options(shlex.split(line))
    options.check()
    assert (options.base_model, options.dataset, options.max_length) == ("gpt2", "train.txt", 1024)
