"""A hub that refuses: `python fake_hub.py` asks it for models and datasets and prints {case: {call: sentence}} as JSON.

It runs in its own process, since huggingface_hub reads its environment when it is imported. Status codes, headers and
messages are the real hub's.
"""

import errno
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GATE = {"X-Error-Code": "GatedRepo"}
CASES = {
    "not-logged-in": (401, {**GATE, "X-Error-Message": "Access to model x/y is restricted. You must have access to it and be "
                            "authenticated to access it. Please log in."}),
    "not-accepted": (403, {**GATE, "X-Error-Message": "Access to model x/y is restricted and you are not in the authorized list. "
                           "Visit https://huggingface.co/x/y to ask for access."}),
    "awaiting": (403, {**GATE, "X-Error-Message": "Your request to access model x/y is awaiting a review from the repo authors."}),
    "rejected": (403, {**GATE, "X-Error-Message": "Your request to access model x/y has been rejected by the repo's authors."}),
    "narrow-token": (403, {**GATE, "X-Error-Message": "Please enable access to public gated repositories in your fine-grained "
                           "token settings to view this repository."}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "missing-or-private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}),
    "without-code": (401, {"X-Error-Message": "Invalid username or password."}),
    "bare-404": (404, {}),
    "bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "expired-token": (401, {"X-Error-Message": 'User Access Token "laptop" is expired'}),
    "bare-401": (401, {}),
    "forbidden": (403, {"X-Error-Message": "You don't have the required permissions to do this"}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "limited": (429, {"RateLimit": '"resolvers";r=0;t=1', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}),
    "bare-429": (429, {}),
    "error-500": (500, {"X-Error-Message": "Internal Error - We're working hard to fix this as soon as possible!"}),
    "error-502": (502, {}), "error-503": (503, {}), "error-504": (504, {}),
    "odd-request": (400, {"X-Error-Message": "Something odd"}),
    "stranger": (200, {}),
    "full": (200, {"X-Repo-Commit": "0" * 40, "ETag": '"1"'}),
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = re.search(r"/x/([\w-]+)", self.path)
        if name and name[1] == "hangs-up":
            return self.connection.shutdown(socket.SHUT_RDWR)
        status, headers = CASES.get(name and name[1], (404, {}))
        self.send_response(status)
        for header, value in {**headers, "Content-Type": "application/json", "Content-Length": "2"}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def main():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in [name for name in os.environ if name.upper().endswith(("_PROXY", "_OFFLINE"))]:
        del os.environ[variable]
    os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=tempfile.mkdtemp(dir=sys.argv[1]),
                      HF_TOKEN="hf_x", HF_HUB_DISABLE_TELEMETRY="1")
    os.chdir(sys.argv[1])
    time.sleep = lambda seconds: None  # the library waits and tries again
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    ask = asker()
    answers = {case: ask(f"x/{case}") for case in CASES if case != "full"}
    answers |= on_the_way(ask, server)
    print(json.dumps(answers))


def asker():
    """A function of a name that returns the sentences for a model, a dataset and the names of its configurations."""
    import datasets

    from base_model import BaseLM
    from support import hub
    from support.command import UserError

    def sentence(call, name):
        try:
            call(name)
        except UserError as error:
            return str(error)
        except Exception as error:
            return hub.explain("dataset", name, error) or f"not explained: {error!r}"

    calls = {"model": lambda name: BaseLM.load(name, device="cpu"), "load_dataset": datasets.load_dataset,
             "builder": datasets.load_dataset_builder, "names": datasets.get_dataset_config_names}
    return lambda name: {kind: sentence(call, name) for kind, call in calls.items()}


def on_the_way(ask, server):
    """The sentences for what goes wrong before the hub answers, or after."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    def changed(case, name="x/y", **variables):
        before = {variable: os.environ.get(variable) for variable in variables}
        os.environ.update(variables)
        huggingface_hub.close_session()
        answers[case] = ask(name)
        for variable, value in before.items():
            os.environ.pop(variable) if value is None else os.environ.update({variable: value})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def nowhere(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    answers = {"odd-name": ask("two words/a"), "hangs-up": ask("x/hangs-up")}
    changed("token-no-header-holds", HF_TOKEN="hf_\u00e9")
    changed("proxy", HTTP_PROXY="http://127.0.0.1:9")
    changed("proxy-of-no-kind", HTTP_PROXY="banana://127.0.0.1:9")
    real, file_download.http_get = file_download.http_get, full
    changed("full", "x/full")
    file_download.http_get = real
    server.shutdown(), server.server_close()
    changed("closed")
    real, socket.getaddrinfo = socket.getaddrinfo, nowhere
    changed("no-such-host")
    socket.getaddrinfo = real
    constants.HF_HUB_OFFLINE = True
    changed("offline", HF_HUB_OFFLINE="1")
    return answers


if __name__ == "__main__":
    main()
