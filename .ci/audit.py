"""Known vulnerabilities of what is pinned and installed here, by pip-audit. CI runs it after the tests.

The exit code is 1 if one is found that is not in ACCEPTED. Where the service of vulnerabilities cannot be asked, one line says why,
and the exit code is 0. pip-audit finds nothing in a package index that only mirrors files, so a release that is known to be
vulnerable is asked about first.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN = "jinja2==2.4.1"  # has had vulnerabilities for years
ACCEPTED = {}  # id of a vulnerability -> why it does not matter here
PINS = ["-r", "requirements-dev.txt", "-r", "benchmarks/requirements.txt", "-r", "requirements.txt"]


def pip_audit(*arguments):
    """What pip-audit says of packages: a list of {"name", "version", "vulns"}. Raises ValueError, with its last line, if none."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        raise ValueError("no answer in five minutes") from None
    except ValueError:
        raise ValueError((done.stderr.strip() or "it printed nothing").splitlines()[-1][:200]) from None


def cannot_be_asked(audit):
    """Why the service cannot be asked, or None."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "known.txt"
        path.write_text(KNOWN + "\n")
        try:
            [found] = audit("-r", str(path), "--no-deps", "--disable-pip")
        except ValueError as error:
            return str(error)
    return None if found.get("vulns") else f"the service knows nothing about {KNOWN}, which has known vulnerabilities"


def main(audit=pip_audit):
    if reason := cannot_be_asked(audit):
        print(f"supply: not audited: {reason}")
        return 0
    found, asked, skipped = {}, set(), set()
    for arguments in ((*PINS, "--no-deps", "--disable-pip"), ("-r", "requirements-demo.txt", "--disable-pip"), ()):
        for package in audit(*arguments):
            name = f"{package['name']} {package.get('version', '')}".strip()
            (skipped if "skip_reason" in package else asked).add(name)
            found |= {vulnerability["id"]: name for vulnerability in package.get("vulns", [])}
    for number, name in sorted(found.items()):
        print(f"supply: {name}: {number}: {ACCEPTED.get(number, 'update it, or say in ACCEPTED why it does not matter')}")
    left_out = f", {len(skipped)} not known to the service" if skipped else ""
    print(f"supply: {len(asked)} releases audited{left_out}, {len(found)} known vulnerabilities")
    return int(bool(found.keys() - ACCEPTED.keys()))


if __name__ == "__main__":
    sys.exit(main())
