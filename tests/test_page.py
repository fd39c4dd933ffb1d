"""The page's components and their initial values, without a browser."""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import rows_of

import app
import train_memory_decoder
from chat import EVERY_RULE, RANGES, Chat
from generation import KNN
from memory_decoder import read_manifest
from web import page
from web.session import CONTROLS


@pytest.fixture(scope="module")
def chat(trained):
    return Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


def built(chat, **options):
    return page.Page(chat, app.Options(**options)).build().get_config_file()


def parts(config):
    """{elem_id: properties} of the page's components."""
    return {part["props"].get("elem_id"): part["props"] for part in config["components"]}


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_the_page_starts_with_the_rule_and_the_alpha_that_training_chose(chat, rule):
    other = copy.copy(chat)
    other.chosen = {**chat.chosen, "alpha_logits": 0.25, "alpha_probabilities": 0.75}
    found = parts(built(other, rule=rule, temperature=0.3, no_repeat=6))
    assert found["rule"]["value"] == rule and found["alpha"]["value"] == (0.25 if rule == "logits" else 0.75)
    assert found["temperature"]["value"] == 0.3 and found["no_repeat"]["value"] == 6 and found["seed"]["value"] == ""


def test_the_command_line_sets_where_alpha_and_seed_start(chat):
    found = parts(built(chat, alpha=0.0, seed=0))
    assert found["alpha"]["value"] == 0 and found["seed"]["value"] == "0"


def test_every_slider_goes_as_far_as_a_request_may(chat):
    found = parts(built(chat))
    sliders = {name: (found[name]["minimum"], found[name]["maximum"]) for name in RANGES if "minimum" in found[name]}
    assert set(RANGES) - set(sliders) == {"knn_temperature"} and all(RANGES[name] == ends for name, ends in sliders.items())


def test_the_search_starts_as_in_training_and_within_its_sliders(chat):
    other = copy.copy(chat)
    other.metrics, other.chosen = {**chat.metrics, "k": 1000}, {**chat.chosen, "knn_temperature": 1e-5}
    for one, k, temperature in ((chat, 8, chat.chosen["knn_temperature"]), (other, *(RANGES["knn_k"][1], 1e-3))):
        found = parts(built(one))
        assert (found["knn_k"]["value"], found["knn_temperature"]["value"]) == (k, temperature)


def test_the_controls_of_the_search_show_under_its_rule_only(chat):
    shown = [[part["props"]["visible"] for part in built(chat, rule=rule)["components"] if part["type"] == "group"]
             for rule in EVERY_RULE]
    assert shown == [[rule == KNN] for rule in EVERY_RULE]


def test_handlers_get_the_controls_in_the_order_in_which_they_read_them(chat):
    config = built(chat)
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    handed = [[names[part] for part in call["inputs"]] for call in config["dependencies"]]
    handed = [inputs for inputs in handed if len(set(inputs) & set(CONTROLS)) > 1]
    assert len(handed) > 4 and all(inputs[-len(CONTROLS):] == list(CONTROLS) for inputs in handed)


def test_all_that_asks_the_model_waits_in_one_line(chat):
    blocks = page.Page(chat, app.Options()).build()
    functions = list(blocks.fns.values())
    model = [fn for fn in functions if fn.concurrency_id == "model"]
    assert len(model) > 8 and {fn.concurrency_limit for fn in model} == {1} and all(fn.queue for fn in model)
    stop = [fn for fn in functions if getattr(fn.fn, "__name__", "") in ("stop", "clear", "undo", "change")]
    assert len(stop) > 3 and not any(fn.queue for fn in stop)


def test_only_three_endpoints_have_names(chat):
    named = [call["api_name"] for call in built(chat)["dependencies"] if call["api_visibility"] == "public"]
    assert sorted(named) == ["candidates", "chat", "passages"]


def test_the_examples_are_questions_that_the_memory_holds(chat):
    examples = page.example_questions(chat.questions())
    stored = [row["Question"] for row in rows_of(chat.store)]
    assert len(set(examples)) == 4 and set(examples) <= set(stored)
    assert page.example_questions(["One?", "Two?"]) == ["One?", "Two?"]


@pytest.fixture
def replaced(chat, trained, tmp_path):
    """A page over a copy of the trained folder, and a function that puts another manifest there (None: none)."""
    folder = shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("stages"))
    open_page = page.Page(chat, app.Options(model_dir=str(folder)))

    def replace(manifest):
        (folder / "config.json").unlink(missing_ok=True)
        if manifest is not None:
            (folder / "config.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        return open_page.trained_again()
    return open_page, replace


def test_a_page_says_when_its_memory_was_trained_again(chat, replaced):
    open_page, replace = replaced
    assert not open_page.trained_again().visible
    other = {**chat.manifest, "files": {**chat.manifest["files"], "memory_decoder.pt": "0" * 64}}
    news = replace(other)
    assert news.visible and "This memory was trained again. Restart app.py to load it." in news.value
    news = replace(chat.manifest)  # the old one is back
    assert not news.visible and news.value == ""


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"files": []}', '{"files": null}'])
def test_a_folder_whose_files_are_just_replaced_says_nothing(replaced, manifest):
    assert not replaced[1](manifest).visible


def test_the_page_looks_for_another_memory_when_it_opens_and_after_each_answer(chat):
    blocks = page.Page(chat, app.Options()).build()
    looks = [fn for fn in blocks.fns.values() if getattr(fn.fn, "__name__", "") == "trained_again"]
    model = [fn for fn in blocks.fns.values() if fn.concurrency_id == "model" and fn.api_visibility == "private"]
    writes = [fn for fn in model if fn.fn.__name__ != "explore"]
    assert len(looks) == len(writes) + 1 > 5 and {fn.outputs[0].elem_id for fn in looks} == {"news"}
    assert sum(any(event == "load" for _, event in fn.targets) for fn in looks) == 1 and not any(fn.queue for fn in looks)


@pytest.mark.parametrize("arguments", [[], ["--demo"], ["--model_dir", "other folder/of mine"]],
                         ids=["plain", "demo", "other folder"])
def test_the_untrained_page_names_the_command_that_trains_what_the_page_opens(arguments):
    options = app.parse_options(arguments)
    config = page.untrained(options.model_dir, app.training_command(options), options.demo).get_config_file()
    text = "\n".join(part["props"]["value"] for part in config["components"] if part["type"] == "markdown")
    command = shlex.split(re.search(r"^ {4}(python train_memory_decoder\.py.*)$", text, re.MULTILINE)[1])
    assert Path(options.model_dir).name in text and str(Path.cwd()) not in text
    assert ("add `--demo`" in text) == (arguments != ["--demo"])
    assert train_memory_decoder.parse_options(command[2:]).output_dir == options.model_dir


def test_demo_opens_what_training_with_demo_writes():
    options = app.parse_options(["--demo"])
    assert options.demo and options.model_dir == train_memory_decoder.parse_options(["--demo"]).output_dir
    assert options.base_model is None  # the manifest names it
    plain = app.parse_options([])
    assert not plain.demo and (plain.model_dir, plain.base_model) == ("trained_models", None)


def test_a_named_folder_goes_before_the_default_of_demo():
    assert app.parse_options(["--demo", "--model_dir", "mine"]).model_dir == "mine"


def test_only_a_memory_of_law_is_said_to_be_no_legal_advice(chat):
    law = copy.copy(chat)
    law.manifest = {**chat.manifest, "options": {"dataset": "demo/legal_qa.jsonl"}}
    assert not page.is_legal(chat) and page.is_legal(law)
    assert page.LEGAL in parts(built(law))["title"]["value"] and page.LEGAL not in parts(built(chat))["title"]["value"]
