"""Neither script uses the network, but for the hub call that was asked for. Both run with nothing that forbids it.

Python tells an audit hook of every address that a process looks up or connects to. The hook also is in processes that these start.
The page's own requests are watched by tests/test_browser.py, in a real browser.
"""

import ipaddress
import json
import os
import re
import subprocess
import sys
import time

import httpx
import pytest
from conftest import ROOT, SMALL, wait_for
from gradio_client import Client

QUESTION = "Can my boss refuse to pay me overtime?"
# A file of this name is run by every Python before its program.
HOOK = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        where = arguments[1] if event == "socket.connect" else arguments[-1]
        where = where[0] if isinstance(where, tuple) else "a file"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        where = arguments[0]
    else:
        return
    file = os.open(os.environ["NETWORK_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{event} {where}\\n".encode())
    os.close(file)

sys.addaudithook(note)
"""
FORBIDS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK",
           "GRADIO_ANALYTICS_ENABLED")


@pytest.fixture
def watched(tmp_path):
    """Environment variables for a process that notes where it connects to, and the function that returns the hosts so far."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(HOOK)
    log = tmp_path / "network.txt"
    variables = {name: value for name, value in os.environ.items() if name not in FORBIDS and not name.lower().endswith("_proxy")}
    variables |= {"PYTHONPATH": str(tmp_path / "hook"), "NETWORK_LOG": str(log), "OMP_NUM_THREADS": "1"}
    return variables, lambda: [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.exists() else []


def foreign(hosts):
    """Those hosts that are not this machine."""
    def is_here(host):
        try:
            return ipaddress.ip_address(host.partition("%")[0]).is_loopback
        except ValueError:
            return host in ("localhost", "a file", "None")
    return [host for host in hosts if not is_here(host)]


def run(variables, *arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_watch_sees_names_and_addresses_and_knows_this_machine(watched):
    variables, hosts = watched
    run(variables, "-c", "import socket, subprocess, sys\n"
                         "for port in 9, 9:\n    socket.socket().connect_ex(('127.0.0.1', port))\n"
                         "subprocess.run([sys.executable, '-c', 'import socket; socket.socket().connect_ex((\"::1\", 9))'])\n"
                         "try: socket.getaddrinfo('no.such.host.invalid', 80)\nexcept OSError: pass\n")
    assert "127.0.0.1" in hosts() and foreign(hosts()) == ["no.such.host.invalid"]
    others = ["203.0.113.7", "0.0.0.0", "huggingface.co"]
    assert foreign(["::1", "127.0.0.2", "localhost", *others]) == others


def test_the_hub_is_asked_where_it_is_named_so_that_the_watch_would_see_any_other_call(watched):
    variables, hosts = watched
    variables |= {"HF_ENDPOINT": "http://hub.invalid", "PYTHONPATH": f"{variables['PYTHONPATH']}:{ROOT}"}
    program = "from base_model import BaseLM\nBaseLM.load('nobody/has-this-model', device='cpu')"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=variables, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not hosts():
                time.sleep(0.1)
        finally:
            process.kill()  # it would try again for a minute
    assert set(foreign(hosts())) == {"hub.invalid"}


@pytest.mark.parametrize("form", ["rows", "folder of tables", "documents"])
def test_a_training_uses_no_network(watched, tiny_gemma, rows_file, tmp_path, form):
    variables, hosts = watched
    data = tmp_path / "data"
    data.mkdir()
    text = rows_file.read_text()
    name = {"rows": "rows.jsonl", "folder of tables": "train.jsonl", "documents": "a.txt"}[form]
    (data / name).write_text("\n\n".join(" ".join(json.loads(line).values()) for line in text.splitlines())
                             if form == "documents" else text)
    run(variables, "train_memory_decoder.py", "--base_model", tiny_gemma, "--dataset", data / name if form == "rows" else data,
        "--output_dir", tmp_path / "out", *SMALL, "--max_examples", "8", "--num_epochs", "1")
    assert (tmp_path / "out/config.json").exists() and foreign(hosts()) == []


def test_an_answer_in_the_terminal_uses_no_network(watched, trained):
    variables, hosts = watched
    assert run(variables, "app.py", "--model_dir", trained, "--device", "cpu", "--ask", QUESTION, "--temperature", "2").strip()
    assert foreign(hosts()) == []


def test_the_page_and_a_request_to_it_use_no_network_and_the_page_names_no_file_elsewhere(watched, trained, tmp_path):
    variables, hosts = watched
    log = tmp_path / "log.txt"
    command = [sys.executable, "-u", "app.py", "--model_dir", str(trained), "--device", "cpu"]
    with open(log, "w") as out, subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            address = printed_address(process, log)
            page = httpx.get(address).raise_for_status().text
            client = Client(address, verbose=False, analytics_enabled=False)
            assert client.predict(QUESTION, seed=3, max_new_tokens=5, temperature=2, api_name="/chat")[1]["content"]
            client.close()
            styles = [httpx.get(address + path).raise_for_status().text for path in style_sheets(page)]
        finally:
            process.kill()
    assert hosts() and foreign(hosts()) == []
    assert styles and not foreign(loaded_from("".join([page, *styles])))


@pytest.mark.parametrize("text", ["<link href='https://fonts.example/a.css'>", '<script src="//fonts.example/x.js"></script>',
                                  "a { background: url(http://fonts.example/a.png) }", '@import "https://fonts.example/a.css";'])
def test_a_file_elsewhere_would_be_noticed(text):
    assert loaded_from(text) == ["fonts.example"]


def test_a_link_to_follow_is_no_file_that_a_page_loads():
    assert loaded_from('<a href="https://a.example/">x</a><meta content="https://b.example/x.png"><link href="./x.css">') == []


def style_sheets(page):
    return [path.removeprefix("./") for path in re.findall(r'<link rel="stylesheet"[^>]* href="([^"]+)"', page)]


def loaded_from(text):
    """The hosts of files that a page or a style sheet loads by itself. Links to follow are not among them, nor is its own host."""
    text = re.sub(r"<a [^>]*>|<meta [^>]*>", "", text)
    return re.findall(r"""(?:src=|href=|url\(|@import )["']?(?:https?:)?//([^/:"')\s]+)""", text)


def printed_address(process, log):
    while "public link" not in log.read_text():  # the last thing that gradio prints
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    address = re.search(r"URL: +(\S+)", log.read_text())[1] + "/"
    wait_for(process, address, log)
    return address
