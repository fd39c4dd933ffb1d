"""Errors of the hub and of the connection to it. Each is one sentence that says what to do, for models and for datasets."""

import errno
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

try:
    import httpx2 as http  # as newer releases of huggingface_hub do
except ModuleNotFoundError:
    import httpx as http
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, errors
from huggingface_hub.utils import hf_raise_for_status

from support import hub

MODEL_PAGE, DATASET_PAGE = "https://huggingface.co/x/", "https://huggingface.co/datasets/x/"
TERMS = ["is gated: accept its terms at", "hf auth login"]
MISSING = ["There is no", "on the hub", "private", "hf auth login"]
TOKEN = ["does not accept the token in the environment variable HF_TOKEN", "https://huggingface.co/settings/tokens"]
LIMIT, TROUBLE = ["429", "wait five minutes"], ["The hub has trouble of its own", "try again later"]
UNREACHED = ["is not on this machine and the hub cannot be reached (http://127.0.0.1", "check the network"]
PROXY = ["The proxy does not lead to the hub", "HTTP_PROXY"]
SAID = {
    "not-logged-in": TERMS, "not-accepted": TERMS, "awaiting": ["have not answered your request yet", "wait for them"],
    "rejected": ["have rejected your request"], "narrow-token": ["token may not read gated", "https://huggingface.co/settings/tokens"],
    "missing": MISSING, "missing-or-private": MISSING, "without-code": MISSING, "bare-404": MISSING,
    "bad-token": TOKEN, "expired-token": TOKEN, "bare-401": TOKEN, "token-no-header-holds": TOKEN,
    "forbidden": ["does not let you read", "403: You don't have", "settings/tokens"], "disabled": ["is disabled on the hub"],
    "limited": LIMIT, "bare-429": LIMIT, "error-500": [*TROUBLE, "(500: Internal Error"], "error-502": [*TROUBLE, "(502)"],
    "error-503": [*TROUBLE, "(503)"], "error-504": [*TROUBLE, "(504)"],
    "odd-request": ["refused the request", "400: Something odd"],
    "stranger": ["is not the hub", "HF_ENDPOINT"], "full": ["The disk is full", "HF_HOME"],
    "odd-name": ["can have that name (owner/name)"], "hangs-up": UNREACHED, "closed": UNREACHED, "no-such-host": UNREACHED,
    "proxy": PROXY, "proxy-of-no-kind": PROXY, "offline": ["HF_HUB_OFFLINE forbids to ask the hub", "unset it"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: {call: sentence}} of the libraries' own calls to a hub that refuses."""
    script = Path(__file__).with_name("fake_hub.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path_factory.mktemp("hub"))], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_of_the_fake_hub_is_looked_at(answers):
    assert set(answers) == set(SAID)


@pytest.mark.parametrize("case", SAID)
def test_what_the_hub_answers_is_one_sentence_that_says_what_to_do(answers, case):
    assert list(answers[case]) == ["model", "load_dataset", "builder", "names"]
    for call, sentence in answers[case].items():
        assert all(part in sentence for part in SAID[case]), f"{call}: {sentence}"
        assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 500 and "hf_x" not in sentence


@pytest.mark.parametrize("case", ["not-logged-in", "not-accepted", "awaiting"])
def test_a_gate_names_the_page_and_what_to_name_instead(answers, case):
    assert MODEL_PAGE + case in answers[case]["model"] and "--base_model Qwen/Qwen2.5-0.5B" in answers[case]["model"]
    for call in ("load_dataset", "builder", "names"):
        assert DATASET_PAGE + case in answers[case][call] and "--dataset" in answers[case][call]
        assert "--base_model" not in answers[case][call]


def test_who_cannot_reach_the_hub_learns_what_works_without(answers):
    for case in ("closed", "no-such-host", "hangs-up", "proxy", "offline", "stranger"):
        assert "train the embedded default with --demo" in answers[case]["model"]
        assert "name a file on this machine with --dataset" in answers[case]["names"]


def raised_by(status, headers, url="https://huggingface.co/x/y/resolve/main/config.json", token="hf_x"):
    """The error that huggingface_hub raises for a response of the real hub."""
    request = http.Request("HEAD", url, headers={"authorization": f"Bearer {token}"} if token else {})
    with pytest.raises(errors.HfHubHTTPError) as error:
        hf_raise_for_status(http.Response(status, headers=headers, request=request))
    return error.value


def test_a_token_that_the_library_takes_for_a_missing_model_is_called_a_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    error = raised_by(401, {"X-Error-Message": 'User Access Token "laptop" is expired'})
    assert isinstance(error, errors.RepositoryNotFoundError)
    said = hub.explain("model", "x/y", error)
    assert "the token that `hf auth login` stored" in said and "run `hf auth login`, or `hf auth logout`" in said
    assert "There is no model x/y" in hub.explain("model", "x/y", raised_by(401, {}, token=None))  # no token, so not a bad one


def wrapped(error, *outer):
    """The last of some errors. Each is raised from the one before, and the last `from None`, as datasets does."""
    for one in outer:
        one.__cause__ = one.__context__ = error
        error = one
    error.__cause__, error.__suppress_context__ = None, True
    return error


REFUSED = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
CHAINS = [
    (wrapped(REFUSED, http.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), errors.LocalEntryNotFoundError("no"), OSError("no")),
     "The certificate of the hub"),
    (wrapped(http.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), OSError("no")), "SSL_CERT_FILE"),
    (wrapped(http.ConnectTimeout("timed out"), errors.LocalEntryNotFoundError("no"), ConnectionError("no")), "does not answer"),
    (wrapped(TimeoutError("timed out"), OSError("no")), "does not answer"),
    (wrapped(http.ReadError("broke off"), ValueError("no")), "check the network"),
    (wrapped(errors.XetDownloadError("broke off"), OSError("no")), "check the network"),
    (wrapped(http.ProxyError("407 Proxy Authentication Required"), OSError("no")), "The proxy does not lead"),
    (wrapped(http.LocalProtocolError("Illegal header value b'Bearer hf_secret'"), OSError("no")), "does not accept the token"),
    (wrapped(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("no"), ValueError("no")), "The disk is full"),
    (wrapped(OSError(errno.EDQUOT, "Disk quota exceeded"), ValueError("no")), "The disk is full"),
    (RuntimeError("Data processing error: File reconstruction error: No space left on device (os error 28)"), "The disk is full"),
    (OSError("Not enough disk space. Needed: 1 GB (download: 1 GB, generated: 0)"), "The disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", f"{constants.HF_HOME}/hub/.locks"), "where you may not write"),
    (OSError("Consistency check failed: file should be of size 9 but has size 4"), "was cut short; try again"),
]


@pytest.mark.parametrize(("error", "said"), CHAINS, ids=[f"{said} {i}" for i, (_, said) in enumerate(CHAINS)])
def test_an_error_on_the_way_is_found_in_the_chain(error, said, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for kind in ("model", "dataset"):
        sentence = hub.explain(kind, "x/y", error)
        assert said in sentence and "secret" not in sentence


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_the_switch_that_is_on_is_named(variable, monkeypatch):
    for name in hub.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "yes")
    assert f"and {variable} forbids" in hub.explain("dataset", "x/y", ConnectionError("Couldn't reach 'x/y' on the Hub"))


def test_a_proxy_that_the_hub_is_exempt_from_is_not_blamed(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    error = http.ConnectError("All connection attempts failed")
    assert "check the network" in hub.explain("model", "x/y", error)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert "The proxy does not lead" in hub.explain("model", "x/y", error)
    monkeypatch.setenv("no_proxy", "huggingface.co")
    assert "check the network" in hub.explain("model", "x/y", error)


def test_a_dataset_that_was_not_found_needs_no_second_answer():
    lost = DatasetNotFoundError("Dataset 'x/y' is a gated dataset on the Hub. You must be authenticated to access it.")
    assert "is gated: accept its terms at https://huggingface.co/datasets/x/y" in hub.explain("dataset", "x/y", lost)
    lost = DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub or cannot be accessed.")
    assert "There is no dataset x/y on the hub and no file or folder of that name" in hub.explain("dataset", "x/y", lost)


@pytest.mark.parametrize("error", [
    ValueError("401 gated 404 connection offline"), KeyError("missing"), RuntimeError("shapes do not match"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    PermissionError(errno.EACCES, "Permission denied", "/x/rows.csv"),
    UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"),
    wrapped(raised_by(404, {"X-Error-Code": "EntryNotFound"}), ValueError("no config"))])
def test_an_error_that_is_not_the_hubs_is_left_to_others(error):
    for kind in ("model", "dataset"):
        assert hub.explain(kind, "x/y", error) is None


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("1"), ValueError("2")
    first.__context__, second.__context__ = second, first
    assert hub.chained(first) == [first, second]
