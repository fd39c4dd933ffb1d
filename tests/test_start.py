"""app.py ends with one sentence when it cannot open its page or answer. Also its answers in the terminal."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

import gradio as gr
import httpx
import pytest
from conftest import ROOT, make_tiny_gemma, run_script
from gradio import http_server
from gradio_client import Client

import app
import train_memory_decoder
from base_model import DEMO_MODEL, DEMO_PACKAGE, INSTALL_DEMO
from chat import Chat
from memory_decoder import read_manifest
from support.sealed import sealed, unsealed

QUESTION = "Can my boss refuse to pay me overtime?"
LIVELY = ("--device", "cpu", "--temperature", "2", "--alpha", "0.5", "--seed", "3")
LAUNCH = gr.Blocks.launch


def launch_and_fail(page, **settings):
    LAUNCH(page, **settings, prevent_thread_lock=True)
    page.close()
    pytest.fail("app.py opened its page")


@pytest.fixture
def the_line(monkeypatch, capsys):
    """Runs app.py's main(), which must not open its page or answer. Returns its one line of stderr, without progress bars."""
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
    manifest = unsealed(copied / "config.json")
    (copied / "config.json").write_text(sealed({**manifest, "base_model": DEMO_MODEL}))
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


@pytest.mark.parametrize("arguments", [("--seed", "3.0", "--no_repeat", "8.0"), ("--seed", "3e0", "--no_repeat", "8")])
def test_a_flags_whole_number_may_have_the_form_of_a_float(arguments):
    options = app.parse_options([*arguments, "--max_turns", "2.0", "--server_port", "7870.0"])
    assert (options.seed, options.no_repeat, options.max_turns, options.server_port) == (3, 8, 2, 7870)
    assert {type(value) for value in (options.seed, options.no_repeat, options.max_turns, options.server_port)} == {int}


@pytest.mark.parametrize("name", ["mémoire 记忆 🙂", "my folder"])
def test_a_folder_may_have_any_name_and_be_named_in_any_way(trained, tmp_path, monkeypatch, capsys, name):
    copy = shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("stages"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    answers = set()
    for way in (trained, copy, f"{copy}/", name, f"./{name}/", f"~/{name}"):
        monkeypatch.setattr(sys, "argv", ["app.py", "--model_dir", str(way), "--ask", QUESTION, *LIVELY])
        app.main()
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1 and answers.pop().strip()


def test_an_argument_that_is_no_utf8_is_read_as_far_as_it_is(trained):
    arguments = ["--model_dir", str(trained), *LIVELY, "--ask"]
    answers = []
    for question in (b"caf\xe9 \xed\xa0\x80?", "caf\ufffd \ufffd\ufffd\ufffd?".encode()):
        done = subprocess.run([os.fsencode(part) for part in (sys.executable, ROOT / "app.py", *arguments)] + [question],
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] and answers[0].strip()


@pytest.fixture
def said(trained, monkeypatch, capsys):
    """Runs app.py's main() with a question. Returns standard output as it was after each token, and at the end."""
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


def ipv6_is_here():
    try:
        app.bind("::1", 0)
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not ipv6_is_here(), reason="this machine has no IPv6 loopback")


@pytest.fixture
def opened(tmp_path, monkeypatch, capsys):
    """Serves the page without a memory. Returns the address that it printed, and the content there."""
    def run(*arguments):
        def launch(page, **settings):
            LAUNCH(page, **settings, prevent_thread_lock=True)
            address = re.search(r"URL: +(\S+)", capsys.readouterr().out)[1]
            found.extend((address, httpx.get(address).raise_for_status().text))
            page.close(verbose=False)
        found = []
        monkeypatch.setattr(gr.Blocks, "launch", launch)
        monkeypatch.setattr(sys, "argv", ["app.py", "--model_dir", str(tmp_path), *map(str, arguments)])
        app.main()
        return found
    return run


@pytest.mark.parametrize(("name", "printed"), [
    ("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"),
    *(pytest.param(name, printed, marks=needs_ipv6) for name, printed in (("::1", "[::1]"), ("[::1]", "[::1]"), ("::", "[::]"),
                                                                          ("0:0:0:0:0:0:0:1", "[::1]")))])
@pytest.mark.parametrize("given", [False, True], ids=["any port", "a port"])
def test_the_page_opens_at_the_address_that_it_prints(opened, name, printed, given):
    port = app.free_port(app.host_of(name))
    address, text = opened("--server_name", name, "--open", *(["--server_port", port] if given else []))
    assert address.startswith(f"http://{printed}:") and "Memory Decoder" in text
    assert not given or address == f"http://{printed}:{port}"


@contextlib.contextmanager
def listening(host):
    """Takes a port at a host. Yields its number. At ::1 it is one that nothing uses at 127.0.0.1."""
    port = 0
    if ":" in host:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        yield other.getsockname()[1]


@needs_ipv6
@pytest.mark.parametrize("name", ["::1", "[::1]", "::"])
def test_a_port_that_is_in_use_on_ipv6_alone_is_named_there_and_free_elsewhere(opened, the_line, trained, name):
    with listening("::1") as port:
        assert opened("--server_port", port)[0] == f"http://127.0.0.1:{port}"
        line = the_line("--model_dir", trained, "--server_name", name, "--server_port", port)
    assert line == f"error: Port {port} is in use; name another with --server_port."


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_the_first_port_that_is_free_is_taken_and_none_is_told(opened, the_line, tmp_path, monkeypatch, host):
    with listening(host) as port:
        monkeypatch.setattr(http_server, "INITIAL_PORT_VALUE", port)
        assert port < int(opened("--server_name", host)[0].rpartition(":")[2]) < port + http_server.TRY_NUM_PORTS
        monkeypatch.setattr(http_server, "TRY_NUM_PORTS", 1)
        assert f"ports from {port} on are in use" in the_line("--model_dir", tmp_path, "--server_name", host)


@pytest.mark.parametrize("name", ["no.such.host.invalid", "203.0.113.7", "2001:db8::7", "..", "x" * 70, "", "::ffff:1.2.3.4",
                                  "fe80::1%none", "http://127.0.0.1", "[::1]:7860", "[::1", "127.0.0.1:7860", "256.1.1.1"])
def test_an_address_that_cannot_work_is_named_before_anything_is_loaded(trained, the_line, monkeypatch, name):
    monkeypatch.setattr(Chat, "open", lambda *_: pytest.fail("the model was loaded"))
    line = the_line("--model_dir", trained, "--server_name", name)
    assert f"cannot listen at {name}:".encode(errors="backslashreplace").decode() in line and "--server_name" in line


@pytest.mark.parametrize("name", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_a_page_beyond_this_machine_needs_a_login_or_open(opened, the_line, trained, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(Chat, "open", lambda *_: pytest.fail("the model was loaded"))
        line = the_line("--model_dir", trained, "--server_name", name)
    assert f"at {name}" in line and "--auth user:password" in line and "--open" in line
    for words, *more in (("Memory Decoder", "--open"), ('"auth_required":true', "--auth", "ann:secret")):
        assert words in opened("--server_name", name, *more)[1]


def test_a_host_name_of_another_address_counts_as_beyond_this_machine(the_line, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "host_of", lambda name: "0.0.0.0")
    assert "at my.host;" in the_line("--model_dir", tmp_path, "--server_name", "my.host")


@pytest.mark.parametrize("value", ["", "secret", ":secret", " :secret", "secret:"])
def test_a_malformed_login_is_refused_and_not_shown(the_line, trained, monkeypatch, value):
    monkeypatch.setattr(Chat, "open", lambda *_: pytest.fail("the model was loaded"))
    expected = "error: {} must have the form user:password, with neither part empty."
    assert the_line("--model_dir", trained, "--auth", value) == expected.format("--auth")
    monkeypatch.setenv("MEMORY_DECODER_AUTH", value)
    assert the_line("--model_dir", trained) == expected.format("MEMORY_DECODER_AUTH")


def test_the_flag_goes_before_the_environment_and_a_password_may_hold_colons(monkeypatch):
    assert app.credentials(app.Options()) is None
    monkeypatch.setenv("MEMORY_DECODER_AUTH", "bob:from the environment")
    assert app.credentials(app.Options()) == ("bob", "from the environment")
    assert app.credentials(app.Options(auth="ann:a:b ")) == ("ann", "a:b ")


CLOSED = [("GET", "config"), ("GET", "gradio_api/info"), ("GET", "gradio_api/openapi.json"),
          ("POST", "gradio_api/queue/join"), ("GET", "gradio_api/queue/data?session_hash=a"),
          *(("POST", f"gradio_api/{way}/{name}") for name in ("chat", "candidates", "passages") for way in ("call", "run", "api"))]


def test_page_and_api_are_closed_without_a_login_and_open_with_it(trained, tmp_path):
    log = tmp_path / "log.txt"
    with started(log, "--model_dir", trained, MEMORY_DECODER_AUTH="ann:it's sécret") as address, \
            httpx.Client(base_url=address) as visitor:
        assert visitor.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        for method, path in CLOSED:
            assert visitor.request(method, path, **{"json": {"data": [QUESTION]}} if method == "POST" else {}).status_code == 401
        page = visitor.get("/").text
        assert '"auth_required":true' in page and '"components":[]' in page and "a memory of" not in page
        with pytest.raises(ValueError, match="Could not login"):
            Client(address, verbose=False, analytics_enabled=False, auth=("ann", "wrong"))
        visitor.post("/login", data={"username": "ann", "password": "it's sécret"}).raise_for_status()
        assert "a memory of" in visitor.get("/").text and visitor.get("config").status_code == 200
        client = Client(address, verbose=False, analytics_enabled=False, auth=("ann", "it's sécret"))
        assert client.predict(QUESTION, k=3, api_name="/passages")
        client.close()
    assert "cret" not in log.read_text()


@contextlib.contextmanager
def started(log, *arguments, **variables):
    """Starts app.py with more environment variables. Yields the address that it prints once the page is open."""
    command = [sys.executable, "-u", "app.py", "--device", "cpu", *map(str, arguments)]
    with open(log, "w") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                                 env=os.environ | variables) as process:
        try:
            give_up = time.monotonic() + 240
            while "public link" not in log.read_text():  # the last thing that gradio prints
                assert process.poll() is None and time.monotonic() < give_up, log.read_text()
                time.sleep(0.2)
            yield re.search(r"URL: +(\S+)", log.read_text())[1]
        finally:
            process.kill()


@pytest.mark.parametrize(("name", "proxy"), [("127.0.0.1", "http://127.0.0.1:9"), ("127.0.0.1", "socks5://127.0.0.1:9"),
                                             pytest.param("::1", "socks://[::1]:9", marks=needs_ipv6)])
def test_the_page_opens_and_answers_whatever_proxy_the_environment_names(trained, tmp_path, name, proxy):
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    more = dict.fromkeys(names, proxy) | {"NO_PROXY": "example.org"}
    with started(tmp_path / "log.txt", "--model_dir", trained, "--server_name", name, **more) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        text, found = client.predict(QUESTION, seed=3, max_new_tokens=5, temperature=2, api_name="/chat")
        client.close()
    assert len(found["content"]) <= 5 and "".join(entry["token"] for entry in found["content"]) == text
