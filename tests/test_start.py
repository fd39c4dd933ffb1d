"""How app.py ends, in one sentence, when it cannot open its page or answer; and its answers in the terminal."""

import importlib.util
import json
import shlex
import shutil
import socket
import sys

import gradio as gr
import pytest
from conftest import make_tiny_gemma, run_script

import app
import train_memory_decoder
from base_model import DEMO_MODEL, DEMO_PACKAGE, INSTALL_DEMO
from chat import Chat
from memory_decoder import read_manifest

QUESTION = "Can my boss refuse to pay me overtime?"
LIVELY = ("--device", "cpu", "--temperature", "2", "--alpha", "0.5", "--seed", "3")
LAUNCH = gr.Blocks.launch


def launch_and_fail(page, **settings):
    LAUNCH(page, **settings, prevent_thread_lock=True)
    page.close()
    pytest.fail("app.py opened its page")


@pytest.fixture
def the_line(monkeypatch, capsys):
    """Runs app.py's main(), which must neither open its page nor answer; returns its one line of stderr but for progress bars."""
    def run(*arguments):
        monkeypatch.setattr(gr.Blocks, "launch", launch_and_fail)
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line and "%|" not in line]
        assert out == ""
        assert ended.value.code == 2 and len(lines) == 1, (ended.value.code, lines)
        assert lines[0].startswith("error: ") and lines[0].endswith(".")
        return lines[0]
    return run


@pytest.fixture
def copied(trained, tmp_path):
    """The artefacts without the stages, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("stages"))


def test_a_flipped_byte_in_any_artefact_is_named(copied, the_line):
    names = list(json.loads((copied / "config.json").read_text())["files"])
    assert len(names) >= 5
    for name in names:
        whole = (copied / name).read_bytes()
        half = len(whole) // 2
        (copied / name).write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:])
        line = the_line("--model_dir", copied)
        assert name in line and "train again" in line
        (copied / name).write_bytes(whole)


def test_a_missing_artefact_is_named(copied, the_line):
    for name in json.loads((copied / "config.json").read_text())["files"]:
        (copied / name).rename(copied / "away")
        line = the_line("--model_dir", copied)
        assert name in line and "missing" in line
        (copied / "away").rename(copied / name)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"files": []}', '{"files": {}}', "\x00\xff"])
def test_a_damaged_manifest_is_named(copied, the_line, text):
    (copied / "config.json").write_text(text, encoding="latin-1")
    line = the_line("--model_dir", copied)
    assert "config.json" in line and "train again" in line


def test_another_base_model_is_named(trained, tmp_path, the_line):
    other = make_tiny_gemma(tmp_path / "other", seed=1)
    line = the_line("--model_dir", trained, "--base_model", other, "--device", "cpu")
    assert str(other) in line and "--base_model" in line


def test_the_right_base_model_at_another_place_is_accepted(trained, tiny_gemma, tmp_path):
    moved = shutil.copytree(tiny_gemma, tmp_path / "moved")
    options = app.Options(model_dir=str(trained), base_model=str(moved), device="cpu")
    assert Chat.open(options, read_manifest(trained)).model.base.name == str(moved)


def test_a_memory_of_the_demos_model_without_its_package_names_the_pip_command(copied, the_line, monkeypatch):
    manifest = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**manifest, "base_model": DEMO_MODEL}))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == DEMO_PACKAGE else real(name, *more))
    line = the_line("--model_dir", copied, "--device", "cpu")
    assert DEMO_MODEL in line and f"`{INSTALL_DEMO}`" in line


@pytest.mark.parametrize(("flag", "value"), [("--base_model", "no/such/folder"), ("--device", "abacus"),
                                             ("--server_port", "99999"), ("--temperature", "3.0"), ("--max_turns", "-1"),
                                             ("--no_repeat", "51"), ("--no_repeat", "-1"), ("--alpha", "1.5"), ("--alpha", "nan"),
                                             ("--seed", "-1"), ("--seed", str(2**31))])
@pytest.mark.parametrize("more", [(), ("--ask", QUESTION)], ids=["page", "terminal"])
def test_a_setting_that_cannot_work_is_named(trained, the_line, flag, value, more):
    more = () if flag == "--server_port" else more  # an answer in the terminal needs none
    assert value in the_line("--model_dir", trained, flag, value, *more)


@pytest.mark.parametrize(("flag", "value"), [("--rule", "mean"), ("--alpha", "much"), ("--seed", "1.5")])
def test_a_value_of_the_wrong_kind_ends_with_code_2_and_the_flags_name(capsys, flag, value):
    with pytest.raises(SystemExit) as ended:
        app.parse_options(["--ask", QUESTION, flag, value])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and f"argument {flag}: invalid" in last and value in last


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_refused_and_opens_no_page(trained, the_line, question):
    assert the_line("--model_dir", trained, "--device", "cpu", "--ask", question) == "error: Type a question first."


def test_a_question_that_is_too_long_is_refused(trained, the_line):
    assert "shorten the question" in the_line("--model_dir", trained, "--device", "cpu", "--ask", "why " * 600)


@pytest.mark.parametrize("name", ["none", "my folder"])
def test_a_question_before_training_is_refused_with_the_command_that_trains(tmp_path, the_line, name):
    line = the_line("--model_dir", tmp_path / name, "--ask", QUESTION)
    command = shlex.split(line.split("`")[1])
    assert command[:2] == ["python", "train_memory_decoder.py"]
    assert train_memory_decoder.parse_options(command[2:]).output_dir == str(tmp_path / name)


@pytest.mark.parametrize("more", [[], ["--demo"]], ids=["plain", "demo"])
def test_the_training_command_fills_the_folder_that_the_same_options_open(more):
    options = app.parse_options(more)
    command = shlex.split(app.training_command(options))
    assert train_memory_decoder.parse_options(command[2:]).output_dir == options.model_dir and command[2:] == more


@pytest.fixture
def said(trained, monkeypatch, capsys):
    """Runs app.py's main() with a question; returns what stood on standard output after each token, and what came at the end."""
    real = Chat.write

    def run(*more):
        pieces = []

        def write(*arguments):
            for answer in real(*arguments):
                yield answer
                pieces.append((answer.tokens[-1]["text"], capsys.readouterr().out))
        monkeypatch.setattr(Chat, "write", write)
        monkeypatch.setattr(sys, "argv", ["app.py", "--model_dir", str(trained), "--ask", QUESTION, *LIVELY, *more])
        app.main()
        return pieces, capsys.readouterr().out
    return run


def test_an_answer_comes_to_standard_output_token_by_token(said, trained):
    pieces, rest = said()
    assert all(out == text for text, out in pieces) and len(pieces) > 5 and rest == "\n"
    chat = Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))
    *_, answer = chat.write(chat.begin(QUESTION, temperature=2, alpha=0.5, seed=3))
    assert "".join(out for _, out in pieces) == answer.text


def test_the_same_seed_gives_the_same_answer_and_the_other_options_count(said):
    first, _ = said()
    assert said()[0] == first
    assert all(said(*change)[0] != first for change in (("--seed", "4"), ("--alpha", "0"), ("--rule", "auto")))


def test_the_script_itself_answers_in_the_terminal_without_a_page(trained, said):
    done = run_script("app.py", "--model_dir", trained, "--ask", QUESTION, *LIVELY)
    assert done.code == 0 and done.out == "".join(out for _, out in said()[0]) + "\n" and "Traceback" not in done.err


@pytest.mark.parametrize("late", [False, True], ids=["before anything is loaded", "taken in the meantime"])
def test_a_port_that_is_in_use_is_named(trained, the_line, monkeypatch, late):
    monkeypatch.setattr(app, "check_address", (lambda options: None) if late else app.check_address)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = the_line("--model_dir", trained, "--server_port", port, "--device", "cpu")
    assert line == f"error: Port {port} is in use; name another with --server_port."
