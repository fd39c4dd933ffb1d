"""Wrong inputs from the table of benchmarks/faults: each ends with exit code 2 and one sentence, and nothing is written."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

sys.path.append(str(ROOT / "benchmarks"))
from faults import inputs
from faults.inputs import CHAT, TRAIN, Field, Wrong, all_cases, spread

CASES = all_cases()
SOME = spread(CASES, 40)
GOOD = Wrong("good", TRAIN, ("--max_examples", "6", "--num_epochs", "1"))


@pytest.fixture(scope="module")
def field(tmp_path_factory, tiny_gemma, rows_file, trained):
    training = ["--base_model", str(tiny_gemma), "--dataset", str(rows_file), *SMALL]
    return Field(tmp_path_factory.mktemp("wrong"), training, trained)


@pytest.mark.parametrize("number", range(len(SOME)), ids=lambda number: ascii(str(SOME[number]))[:90])
def test_a_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(field, number):
    assert field.tried(SOME[number], number) is None


def test_the_table_is_long_holds_no_case_twice_and_names_every_flag():
    assert len(CASES) >= 250 and max(Counter(map(repr, CASES)).values()) == 1
    kinds = Counter(case.kind for case in CASES)
    assert len(kinds) >= 10 and min(kinds.values()) >= 8
    for script, name in ((TRAIN, "train_memory_decoder"), (CHAT, "app")):
        options = __import__(name).Options
        named = {part for case in CASES if case.script == script for part in case.arguments}
        assert {f"--{field}" for field in options.__dataclass_fields__} <= named


def test_a_spread_has_cases_of_every_kind_and_another_seed_gives_others():
    kinds = {case.kind for case in CASES}
    assert {case.kind for case in SOME} == kinds and spread(CASES, 40) == SOME != spread(CASES, 40, 1)
    assert len(spread(CASES, inputs.SPREAD)) >= 100


def test_an_input_that_is_good_counts_as_not_survived(field):
    assert "exit code 0" in field.tried(GOOD, 0)
    assert "exit code 0" in field.tried(Wrong("good", CHAT, ("--ask", "Why?", "--temperature", "0")))


@pytest.mark.parametrize(("code", "err", "said"), [
    (1, "error: No.\n", "exit code 1"), (2, "", "0 lines"), (2, "error: One.\nerror: Two.\n", "2 lines"), (2, "Oh.\n", "1 lines"),
    (2, 'Traceback (most recent call last):\n  File "x"\nerror: No.\n', "3 lines"), (2, "error: no end\n", "no sentence"),
    (2, f"error: {'x' * 800}.\n", "no sentence"), (-11, "", "exit code -11")])
def test_another_end_counts_as_not_survived(code, err, said):
    assert said in inputs.complaint(subprocess.CompletedProcess([], code, "", err))


def test_one_sentence_beside_a_progress_bar_is_survived():
    assert inputs.complaint(subprocess.CompletedProcess([], 2, "", "Loading: 100%|###| 3/3\nerror: It is broken.\n")) is None


def test_what_appears_goes_or_changes_is_noticed(field):
    before = field.contents()
    for change, undo in ((lambda path: path.write_text("x"), Path.unlink), (Path.mkdir, Path.rmdir)):
        change(field.folder / "more")
        assert "more" in inputs.written(before, field.contents())
        undo(field.folder / "more")
    memory = field.memory / "report.md"
    whole = memory.read_bytes()
    memory.write_bytes(whole[:-1] + b"?")
    assert str(memory) in inputs.written(before, field.contents())
    memory.unlink()
    assert str(memory) in inputs.written(before, field.contents())
    memory.write_bytes(whole)
    assert inputs.written(before, field.contents()) is None
