"""How app.py ends, in one sentence, when it cannot open its page."""

import importlib.util
import json
import shutil
import socket
import sys

import gradio as gr
import pytest
from conftest import make_tiny_gemma

import app
from base_model import DEMO_MODEL, DEMO_PACKAGE, INSTALL_DEMO
from memory_decoder import read_manifest

LAUNCH = gr.Blocks.launch


def launch_and_fail(page, **settings):
    LAUNCH(page, **settings, prevent_thread_lock=True)
    page.close()
    pytest.fail("app.py opened its page")


@pytest.fixture
def the_line(monkeypatch, capsys):
    """Runs app.py's main(), which must not open its page; returns the one line of stderr that is not a progress bar."""
    def run(*arguments):
        monkeypatch.setattr(gr.Blocks, "launch", launch_and_fail)
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
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
    assert app.Chat.open(options, read_manifest(trained)).model.base.name == str(moved)


def test_a_memory_of_the_demos_model_without_its_package_names_the_pip_command(copied, the_line, monkeypatch):
    manifest = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**manifest, "base_model": DEMO_MODEL}))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == DEMO_PACKAGE else real(name, *more))
    line = the_line("--model_dir", copied, "--device", "cpu")
    assert DEMO_MODEL in line and f"`{INSTALL_DEMO}`" in line


@pytest.mark.parametrize(("flag", "value"), [("--base_model", "no/such/folder"), ("--device", "abacus"),
                                             ("--server_port", "99999"), ("--temperature", "3.0"), ("--max_turns", "-1"),
                                             ("--no_repeat", "51"), ("--no_repeat", "-1")])
def test_a_setting_that_cannot_work_is_named(trained, the_line, flag, value):
    assert value in the_line("--model_dir", trained, flag, value)


@pytest.mark.parametrize("late", [False, True], ids=["before anything is loaded", "taken in the meantime"])
def test_a_port_that_is_in_use_is_named(trained, the_line, monkeypatch, late):
    monkeypatch.setattr(app, "check_address", (lambda options: None) if late else app.check_address)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = the_line("--model_dir", trained, "--server_port", port, "--device", "cpu")
    assert line == f"error: Port {port} is in use; name another with --server_port."
