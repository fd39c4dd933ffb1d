"""Errors of the Hugging Face hub and of the connection to it. Each becomes one sentence that says what to do."""

import errno
import os
import re
import ssl
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants, errors, get_token

from support.command import one_line

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")
TOKENS = "https://huggingface.co/settings/tokens"
SAID_OF_TOKENS = ("invalid credentials", "expired", "access token", "invalid token")
# By kind: its page on the hub, where else it may be, its flag, what to name instead, and what to do without the hub.
PAGES = {"model": "https://huggingface.co/", "dataset": "https://huggingface.co/datasets/"}
PLACES = {"model": "no folder", "dataset": "no file or folder"}
FLAGS = {"model": "--base_model", "dataset": "--dataset"}
OTHERS = {"model": "name an ungated model, e.g. --base_model Qwen/Qwen2.5-0.5B", "dataset": "name another --dataset"}
WITHOUT = {"model": "train the embedded default with --demo", "dataset": "name a file on this machine with --dataset"}

SENTENCES = {
    "gated": "The {kind} {name} is gated: accept its terms at {page} (and wait, where its authors look at each "
             "request), run `hf auth login`, then try again; or {other}.",
    "awaited": "The {kind} {name} is gated and its authors have not answered your request yet; wait for them, see {page}, "
               "or {other}.",
    "rejected": "The {kind} {name} is gated and its authors have rejected your request; {other}.",
    "narrow": "The token may not read gated repositories, and the {kind} {name} is one; allow it that at " + TOKENS + ", "
              "or {other}.",
    "missing": "There is no {kind} {name} on the hub and {place} of that name, or it is private; check {flag}, or run "
               "`hf auth login` with a token that is valid and may read it.",
    "unnamed": "There is {place} {name} here, and no {kind} on the hub can have that name (owner/name); check {flag}.",
    "token": "The hub does not accept the token {token}: it has expired or is mistyped; make a new one at " + TOKENS
             + " and {renew}.",
    "forbidden": "The hub does not let you read the {kind} {name} ({said}); give your token that right at " + TOKENS + ", "
                 "run `hf auth login` as someone who has it, or {other}.",
    "disabled": "The {kind} {name} is disabled on the hub; name another with {flag}.",
    "limit": "The hub takes no more requests from you for now (rate limit, 429); wait five minutes and try again; "
             "`hf auth login` raises the limit.",
    "trouble": "The hub has trouble of its own ({said}); try again later, see https://status.huggingface.co.",
    "refused": "The hub refused the request for the {kind} {name} ({said}); check {flag}.",
    "offline": "The {kind} {name} is not on this machine and {offline} forbids to ask the hub; unset it, or {without}.",
    "certificate": "The certificate of the hub ({hub}) cannot be verified; if your network has its own, name its file in "
                   "SSL_CERT_FILE, else check the clock of this machine; or {without}.",
    "proxy": "The proxy does not lead to the hub ({hub}); check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, or {without}.",
    "stranger": "What answers at {hub} is not the hub; check HF_ENDPOINT, the proxy and whether the network asks for a login, "
                "or {without}.",
    "timeout": "The {kind} {name} is not on this machine and the hub cannot be reached in time ({hub} does not answer); check the "
               "network and try again, or {without}.",
    "network": "The {kind} {name} is not on this machine and the hub cannot be reached ({hub}); check the network, or {without}.",
    "disk": "The disk is full, so the {kind} {name} cannot be stored in {home}; make room there, or set HF_HOME to a folder on "
            "another disk.",
    "cache": "The {kind} {name} cannot be stored in {home}, where you may not write; set HF_HOME to a folder of your own.",
    "cut": "The download of the {kind} {name} was cut short; try again.",
}


def explain(kind, name, error):
    """One sentence for an error of the hub, the network or the download cache. None for any other error.

    kind: "model" or "dataset". error: what transformers, huggingface_hub or datasets raised.
    """
    found = classify(error)
    if any(isinstance(one, DatasetNotFoundError) for one in chained(error)):
        found = asked_again(name) or found
    if found is None:
        return None
    word, said = found
    word = "proxy" if word == "network" and goes_through_proxy() else word
    variable = next(filter(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")), None)
    return SENTENCES[word].format(
        kind=kind, name=name, said=said, page=PAGES[kind] + str(name), place=PLACES[kind], flag=FLAGS[kind], other=OTHERS[kind],
        without=WITHOUT[kind], hub=constants.ENDPOINT, home=constants.HF_HOME,
        token=f"in the environment variable {variable}" if variable else "that `hf auth login` stored",
        renew="set the variable to it, or unset it" if variable else "run `hf auth login`, or `hf auth logout` to go without",
        offline=next(filter(is_set, OFFLINE), OFFLINE[0]))


def classify(error):
    """(a key of SENTENCES, what the server said) for an error of the hub, else None."""
    chain = chained(error)
    for one in chain:
        if word := of_this_machine(one):
            return word, ""
    for one in chain:
        if (response := answer(one)) is not None:
            return of_answer(response)
    word = next(filter(None, map(of_library, chain)), None) or of_network(chain)
    return (word, "") if word else None


def asked_again(name):
    """Ask the hub for a dataset again, since datasets drops its answer. Returns classify() of the answer, or None."""
    try:
        HfApi().auth_check(str(name), repo_type="dataset")
    except Exception as error:  # if it is not from the hub, the error of datasets counts
        return classify(error) if answer(error) is not None else None
    return None


def chained(error):
    """The error and all its causes and contexts, nearest first. `raise ... from None` hides a context but keeps it."""
    chain, waiting = [], [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and not any(one is known for known in chain):
            chain.append(one)
            waiting += [one.__cause__, one.__context__]
    return chain


def answer(error):
    """The server's response that the error holds, if the request failed as a whole."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if not isinstance(status, int) or status < 400 or isinstance(error, errors.EntryNotFoundError):
        return None
    # A missing file is normal: the libraries request files to find out which a repository has.
    return None if response.headers.get("X-Error-Code") == "EntryNotFound" else response


def of_answer(response):
    """(a key of SENTENCES, a short text) for a response, by its status and headers."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    message = response.headers.get("X-Error-Message", "")
    said = f"{status}: {one_line(message)[:120]}" if message else str(status)
    if code == "GatedRepo":
        return of_gate(message.lower()), said
    if message == "Access to this resource is disabled." or status in (410, 451):
        return "disabled", said
    if status == 401 and code != "RepoNotFound":
        sent = "authorization" in response.request.headers
        about_token = any(words in message.lower() for words in SAID_OF_TOKENS)
        return "token" if about_token or (sent and not message) else "missing", said
    if code in ("RepoNotFound", "RevisionNotFound") or status == 404:
        return "missing", said
    words = {403: "forbidden", 407: "proxy", 408: "timeout", 429: "limit", 507: "trouble"}
    return words.get(status, "trouble" if status >= 500 else "refused"), said


def of_gate(message):
    """The key for a gated repository, by the hub's own message."""
    for word, said in (("awaited", "awaiting"), ("awaited", "pending"), ("rejected", "rejected"), ("narrow", "fine-grained")):
        if said in message:
            return word
    return "gated"


def of_this_machine(error):
    """The key for a full disk or a cache that cannot be written, else None."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or re.search("no space left on device|not enough disk space", str(error).lower()):
        return "disk"
    path = str(getattr(error, "filename", None) or "")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) and path.startswith(str(constants.HF_HOME)):
        return "cache"
    return None


def of_library(error):
    """The key for an error of the libraries that holds no response, else None."""
    if isinstance(error, DatasetNotFoundError):
        return "gated" if "gated dataset on the Hub" in str(error) else "missing"
    if isinstance(error, errors.GatedRepoError):
        return "gated"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "missing"
    if isinstance(error, errors.HFValidationError):
        return "unnamed"
    if isinstance(error, errors.FileMetadataError):
        return "stranger"
    return "cut" if "Consistency check failed" in str(error) else None


def of_network(chain):
    """The key for a failed connection to the hub: the most specific of the chain, or None."""
    words = set(map(of_connection, chain))
    return next((word for word in ("token", "offline", "certificate", "proxy", "timeout", "network") if word in words), None)


def of_connection(error):
    """The key for one error of the connection to the hub, else None."""
    name, from_http = type(error).__name__, type(error).__module__.split(".")[0] in HTTP_LIBRARIES
    token = get_token() or ""
    if (name == "LocalProtocolError" and from_http) or (isinstance(error, UnicodeEncodeError) and not token.isascii()):
        return "token"  # a header cannot hold it
    reached = isinstance(error, ConnectionError | errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
    if isinstance(error, errors.OfflineModeIsEnabled) or (reached and is_offline()):
        return "offline"
    if isinstance(error, ssl.SSLCertVerificationError) or (from_http and "CERTIFICATE_VERIFY_FAILED" in str(error)):
        return "certificate"
    if (from_http and name == "ProxyError") or re.search(r"proxy URL|SOCKS proxy", str(error)):
        return "proxy"
    if isinstance(error, TimeoutError) or (from_http and "Timeout" in name):
        return "timeout"
    if reached or (from_http and name != "HTTPStatusError") or name == "XetDownloadError" or name == "gaierror":
        return "network"
    return None


def goes_through_proxy():
    """Whether an environment variable sends requests to the hub through a proxy."""
    where, proxies = urlsplit(constants.ENDPOINT), getproxies_environment()
    return bool(proxies.get(where.scheme) or proxies.get("all")) and not proxy_bypass_environment(where.netloc, proxies)


def is_offline():
    """Whether an environment variable forbids requests to the hub."""
    return constants.is_offline_mode() or is_set("HF_DATASETS_OFFLINE")


def is_set(variable):
    """Whether an environment variable is on, as the libraries read it."""
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
