"""The page under attack: requests that are drawn, files that are asked for, scripts that are planted, and no login.

The page runs over a small memory whose texts, titles and model name hold scripts, and a secret file lies beside it.
"""

import shutil

from faults import attack_requests, attack_scripts
from faults.common import Outcome, Place, refusal, script
from faults.page import served
from faults.runs_beside import finished, tell

LOGIN = "ann:a long secret"


def outcomes(place):
    folder = poisoned(place)
    found = []

    def add(outcome, page):
        if page and (wrong := page.fault()):
            outcome.add(wrong)
        tell(f"attack: {outcome.fault}, {outcome.note}")
        found.append(outcome)
    with served(folder, place.work / "attack", "--seed", "3") as page:
        add(attack_requests.files(place, page, folder), page)
        add(attack_requests.drawn(place, page), page)
        add(attack_requests.large(page), page)
        add(attack_scripts.planted(place, page), page)
    with served(folder, place.work / "login", "--auth", LOGIN) as page:
        add(attack_requests.without_login(page, LOGIN), page)
    add(beyond_this_machine(folder), None)
    return found


def poisoned(place):
    """A folder trained on rows, and with a model, whose names and texts are scripts."""
    from conftest import SMALL, make_tiny_gemma
    from runs import jsonl

    work = place.work / "poisoned"
    folder = work / "trained"
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = make_tiny_gemma(work / attack_scripts.NAME)
    rows = jsonl(work / f"{attack_scripts.NAME}.jsonl", attack_scripts.rows(place))
    training = ["--base_model", str(model), "--dataset", str(rows), *SMALL]
    done = finished(Place(work, training), folder)
    assert done.returncode == 0, done.stderr
    return folder


def beyond_this_machine(folder):
    """The page at every address of the machine, without a login."""
    outcome = Outcome("a page for other machines without a login")
    for name in ("0.0.0.0", "::"):
        sentence = refusal(script("app.py", "--model_dir", folder, "--device", "cpu", "--server_name", name))
        outcome.add(None if sentence and "--auth" in sentence else f"At {name} it said {sentence!r}.")
    outcome.note = "refused before anything is loaded"
    return outcome
