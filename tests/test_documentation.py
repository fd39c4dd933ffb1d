"""Files, headings, scripts, tests and flags that the documentation names exist."""

import re
import shlex

import pytest
from conftest import ROOT

import app
import train_memory_decoder
from support import command

PAGES = [path for folder in (".", "docs", "demo", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    for link in links:
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_scripts_that_a_page_names_are_there(page):
    for name in re.findall(r"(?:python |\b(?=benchmarks/))([\w./-]+\.py)\b", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_the_tests_that_the_method_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/method.md").read_text(encoding="utf-8")))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 20 and named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))


@pytest.mark.parametrize("script", [train_memory_decoder, app], ids=["train_memory_decoder", "app"])
def test_the_commands_of_the_documentation_have_flags_that_exist(script):
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = re.findall(rf"(?:python|accelerate launch) (?:--[^`\n]* )?{script.__name__}\.py([^`\n]*)", text)
    for line in lines:
        arguments = shlex.split(line, comments=True)
        if "--help" not in arguments:
            command.parse_options(script.Options, "", arguments, {})
    assert lines


def test_every_file_beside_the_readme_has_its_place_in_the_tree():
    tree = re.search(r"## The tree\n+```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.suffix in (".py", ".md", ".cff") and path.name != "README.md":
            assert path.name in tree, path.name
