"""The page as a user sees it, in a headless Chromium."""

import itertools
import os
import shutil

import pytest
from playwright.sync_api import sync_playwright
from runs import stored_rows

from app import NO_ANSWER

SEED = "#seed textarea, #seed input"
QUESTION = "Can my boss refuse to pay me overtime?"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# Notes every text that the bot's bubble has held.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const bubble = document.querySelector('#chat [data-testid=bot]');
        const text = bubble ? bubble.innerText.trim() : '';
        if (text && text !== window.seen.at(-1)) window.seen.push(text);
    }).observe(document.querySelector('#chat'), {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no chromium, chromium-browser or google-chrome is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens fresh pages; at the end, none of them may have had an error or asked anything of another address."""
    errors, foreign, pages = [], [], []

    def open_page():
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: message.type == "error" and errors.append(f"{message.text} {message.location}"))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("http", "ws")) and not request.url.startswith(address)
                and foreign.append(request.url))
        page.goto(address)
        page.wait_for_selector("#alpha input[type=number]")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert pages and errors == [] and foreign == []


def number(page, name):
    return page.locator(f"#{name} input[type=number]")


def ask(page, **values):
    """(every text the answer went through, the passages) of QUESTION, drawn with a seed unless told otherwise."""
    seed = values.pop("seed", "3")
    for name, value in {"temperature": 1, "max_new_tokens": 40, **values}.items():
        number(page, name).fill(str(value))
        number(page, name).press("Tab")
    page.locator(SEED).fill(seed)
    page.evaluate(WATCH)
    page.locator("textarea").first.fill(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#passages .passage")
    final = page.locator("#chat [data-testid=bot]").inner_text().strip()
    assert final and NO_ANSWER.strip("*") not in final
    return [*page.evaluate("window.seen"), final], page.locator("#passages .passage").all_inner_texts()


def test_the_page_offers_every_control_at_its_default(visit):
    page = visit()
    sliders = ("alpha", "temperature", "top_k", "max_new_tokens", "k")
    values = {name: float(number(page, name).input_value()) for name in sliders}
    assert 0 <= values.pop("alpha") <= 1
    assert values == {"temperature": 0.7, "top_k": 50, "max_new_tokens": 256, "k": 8}
    assert page.locator("#rule input[type=radio]").count() == 3


def test_an_answer_grows_and_passages_appear(visit, trained):
    texts, passages = ask(visit(), k=3)
    titles = [row["Title"][:120] for row in stored_rows(trained)]
    assert len(set(texts)) > 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert 1 <= len(passages) <= 3 and all(any(title in passage for title in titles) for passage in passages)


def test_auto_shows_each_tokens_alpha(visit):
    page = visit()
    page.locator("#rule").get_by_text("auto", exact=True).click()
    answer = ask(page)[0][-1]
    shown = page.locator("#alphas").inner_text().removeprefix("alpha of each token: the redder, the more the memory decided")
    assert "".join(shown.split()) == "".join(answer.split())


def test_moving_alpha_to_the_other_end_changes_the_answer(visit):
    first = visit()
    start = float(number(first, "alpha").input_value())
    assert ask(first)[0][-1] != ask(visit(), alpha=0 if start > 0.5 else 1)[0][-1]


def test_the_seed_is_empty_at_first_and_a_number_there_repeats_the_answer(visit):
    draws = {}
    for seed in ("", "", "7", "7"):
        page = visit()
        assert page.locator(SEED).input_value() == ""
        draws.setdefault(seed, []).append(ask(page, temperature=2, top_k=200, seed=seed)[0][-1])
    assert draws[""][0] != draws[""][1] and draws["7"][0] == draws["7"][1]


def test_an_example_question_is_asked_by_a_click(visit):
    page = visit()
    number(page, "max_new_tokens").fill("5")
    number(page, "max_new_tokens").press("Tab")
    page.get_by_text("Is there an income cutoff for filing Chapter 7?").click()
    page.wait_for_selector("#passages .passage")
    assert page.locator("#chat [data-testid=user]").inner_text().strip() == "Is there an income cutoff for filing Chapter 7?"
    assert page.locator("#chat [data-testid=bot]").inner_text().strip()
