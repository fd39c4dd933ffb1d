"""The page as a user sees it, in a headless Chromium, on a tiny memory."""

import json
import re

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from runs import stored_rows

from app import Options
from chat import Chat
from generation import token_bytes
from memory_decoder import read_manifest

QUESTION = "Can my boss refuse to pay me overtime?"
ODD = "Write to <address> about <title>, <b>now</b> and <landlord> 1 < 2, **x** or $y$ &lt;"
WAIT = 60_000
LONG = 450  # tokens that take seconds even here


@pytest.fixture
def visit(browser, address):
    """Opens pages for new visitors. At the end, no page may have had an error or sent a request to another address."""
    errors, foreign, contexts = [], [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: message.type == "error" and errors.append(f"{message.text} {message.location}"))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("http", "ws")) and not request.url.startswith(address)
                and foreign.append(request.url))
        page.goto(address)
        page.wait_for_selector("#question textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert contexts and errors == [] and foreign == []


@pytest.fixture(scope="module")
def chat(trained):
    return Chat.open(Options(model_dir=str(trained), device="cpu"), read_manifest(trained))


def number(page, name):
    return page.locator(f"#{name} input[type=number]")


def put(page, **values):
    """Set controls to values."""
    for name, value in values.items():
        field = page.locator("#seed textarea, #seed input") if name == "seed" else number(page, name)
        field.first.fill(str(value))
        field.first.press("Tab")


def send(page, question=QUESTION):
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")


def settled(page):
    """Wait until an answer and its panels are complete. Returns the answer as shown."""
    page.wait_for_selector("#candidates table")
    return page.locator("#tokens .answer").inner_text()


def ask(page, question=QUESTION, **values):
    put(page, **{"temperature": 1, "max_new_tokens": 24, "seed": 3} | values)
    send(page, question)
    return settled(page)


def letters(text):
    """The comparable part of a random model's text, without spaces, control characters and pieces of characters."""
    return "".join(c for c in text if c.isprintable() and not c.isspace() and c != "\ufffd")


def test_the_page_offers_every_control_at_its_default(visit):
    page = visit()
    sliders = ("alpha", "temperature", "top_k", "max_new_tokens", "k")
    values = {name: float(number(page, name).input_value()) for name in sliders}
    assert 0 <= values.pop("alpha") <= 1
    assert values == {"temperature": 0.7, "top_k": 50, "max_new_tokens": 256, "k": 8}
    assert page.locator("#rule input[type=radio]").count() == 4 and page.locator("#seed textarea").input_value() == ""


def test_at_alpha_0_the_answer_is_the_bases_own_greedy_one(visit, chat):
    shown = ask(visit(), alpha=0, temperature=0)
    base = chat.model.base
    ids = torch.tensor([base.encode(chat.template.prompt(QUESTION))])
    ends = sorted(chat.model.ends)
    out = base.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=base.eos)
    # Byte by byte, since a tokenizer's decoder drops a letter that is a byte token beside a piece of a character.
    text = b"".join(token_bytes(base.tokenizer, token) for token in out[0, ids.shape[1]:].tolist()).decode("utf-8", "replace")
    text = min((text.split(stop)[0] for stop in chat.model.stops), key=len, default=text)
    assert letters(shown) == letters(text)


def test_a_clicked_token_shows_probabilities_that_are_the_models_and_add_up(visit, chat):
    page = visit()
    ask(page, alpha=0.4)
    answer = chat.begin(QUESTION, alpha=0.4, temperature=1.0, top_k=50, seed=3, max_new_tokens=24)
    *_, answer = chat.write(answer)
    for place in (0, len(answer.tokens) - 1):
        page.locator("#tokens .token").nth(place).click()
        expect(page.locator("#candidates h2")).to_contain_text(f"Token {place + 1}:")
        rows = [[float(re.search(r"[\d.]+", cell)[0]) for cell in row.locator("td").all_inner_texts()[1:]]
                for row in page.locator("#candidates tbody tr").all()]
        assert all(abs(sum(column) - 100) < 1 for column in zip(*rows, strict=True))  # "under 0.1%" counts as 0.1
        token = answer.tokens[place]
        (chosen,) = page.locator("#candidates tr.chosen").all()
        for cell, name in zip(chosen.locator("td").all_inner_texts()[1:], ("base", "memory", "blended"), strict=True):
            assert cell.startswith("under") or float(cell.strip().removesuffix("%")) == pytest.approx(100 * token[name], abs=0.1)


def test_the_first_token_opens_with_the_entries_nearest_to_the_prompt(visit, chat, trained):
    page = visit()
    ask(page, k=3)
    page.locator("#tokens .token").first.click()
    expect(page.locator("#candidates h2")).to_contain_text("Token 1:")
    hidden = chat.model.base.hidden(torch.tensor([chat.model.base.encode(chat.template.prompt(QUESTION))]))[0, -1:]
    D, _ = chat.store.search(hidden.float().numpy(), 3)
    passages = page.locator("#passages .passage").all_inner_texts()
    assert [f"squared distance {d:.3g}" in text for d, text in zip(D[0], passages, strict=True)] == [True] * 3
    titles = [row["Title"][:120] for row in stored_rows(trained)]
    assert all(any(title in text for title in titles) for text in passages)


def test_another_candidate_goes_on_from_its_place_and_keeps_what_stands_before(visit):
    page = visit()
    ask(page)
    before, shown = page.locator("#tokens .token").all_inner_texts(), page.locator("#candidates h2").inner_text()
    page.locator("#tokens .token").nth(6).click()
    expect(page.locator("#candidates h2")).not_to_have_text(shown)
    place = page.locator("#candidates h2").inner_text()
    other = page.locator("#candidates tr:not(.chosen) button").first
    name = other.inner_text()
    other.click()
    expect(page.locator("#tokens .token.kept")).to_have_count(6)
    page.wait_for_function("document.querySelector('#stop').disabled")
    settled(page)
    after = page.locator("#tokens .token").all_inner_texts()
    assert after[:6] == before[:6] and letters(after[6].replace("\n", "⏎")) == letters(name.replace("␣", "")) and place


def test_three_voices_answer_one_question_with_one_seed(visit):
    page = visit()
    ask(page, alpha=1)
    alone = page.locator("#tokens .answer").inner_text()
    page.get_by_role("tab", name="Three voices").click()
    page.locator("#voices_question textarea, #voices_question input").fill(QUESTION)
    page.locator("#voices_question textarea, #voices_question input").press("Enter")
    page.wait_for_selector("#compare .voice")
    page.wait_for_function("document.querySelector('#voices_stop').disabled")
    voices = page.locator("#compare .answer").all_inner_texts()
    assert len(voices) == 3 and voices[1] == voices[2] == alone != voices[0]
    assert page.locator("#compare").inner_text().count("a second") == 3


def test_an_example_is_a_stored_question_and_opens_the_three_voices(visit, trained):
    page = visit()
    put(page, max_new_tokens=5)
    examples = page.locator("#examples button")
    stored = [row["Question"] for row in stored_rows(trained)]
    shown = [text.removesuffix("...") for text in examples.all_inner_texts()]
    assert len(shown) == 4 and all(any(question.startswith(text) for question in stored) for text in shown)
    examples.first.click()
    page.wait_for_selector("#compare .voice")
    assert page.locator("#voices_question textarea, #voices_question input").input_value() in stored
    page.wait_for_function("document.querySelector('#voices_stop').disabled")


def test_texts_appear_letter_for_letter(visit):
    page = visit()
    ask(page, ODD)
    ask(page)
    assert ODD in page.locator("#chat").inner_text()


def test_stop_keeps_what_was_written_and_shows_its_panels(visit):
    page = visit()
    put(page, max_new_tokens=LONG, temperature=1, seed=5)
    send(page)
    expect(page.locator("#candidates table")).to_have_count(0)
    page.wait_for_function("document.querySelectorAll('#tokens .token').length > 3")
    page.keyboard.press("Escape")
    text = settled(page)
    assert text and "stopped after" in page.locator("#facts").inner_text()
    assert page.locator("#passages .passage").count() > 0


def test_an_edited_question_can_be_stopped_and_replaces_the_first(visit):
    page = visit()
    ask(page)
    put(page, max_new_tokens=LONG)
    page.locator("#chat .user").first.hover()
    page.locator("#chat button[aria-label*=dit], #chat button[title*=dit]").first.click()
    page.locator("#chat .user textarea").fill("May I record a call?")
    page.locator("#chat button[aria-label*=ubmit], #chat button[title*=ubmit]").first.click()
    # Once it is longer than the first one, and at once, since the tiny model writes the whole answer in two seconds.
    page.wait_for_function("""() => {
        const longer = document.querySelectorAll('#tokens .token').length > 24;
        if (longer) document.querySelector('#stop').click();
        return longer;
    }""")
    expect(page.locator("#facts")).to_contain_text("stopped after")
    chat = page.locator("#chat").inner_text()
    assert "May I record a call?" in chat and QUESTION not in chat


def test_clear_in_the_middle_stays_empty_and_the_model_is_free(visit):
    page = visit()
    put(page, max_new_tokens=LONG, temperature=1)
    send(page)
    page.wait_for_function("document.querySelectorAll('#tokens .token').length > 3")
    page.locator("#clear").click()
    page.wait_for_function("document.querySelector('#stop').disabled")
    page.wait_for_timeout(1000)
    assert page.locator("#tokens .token").count() == 0 and QUESTION not in page.locator("#chat").inner_text()
    assert ask(page)


def test_undo_gives_the_question_back_and_empties_the_panels(visit):
    page = visit()
    ask(page)
    page.locator("#undo").click()
    expect(page.locator("#question textarea")).to_have_value(QUESTION)
    assert page.locator("#tokens .token").count() == page.locator("#passages .passage").count() == 0
    assert page.locator("#candidates table").count() == 0


def test_a_slider_moved_during_an_answer_acts_on_the_rest(visit):
    for _ in range(5):  # an answer may be written before the move arrives
        page = visit()
        page.locator("#rule").get_by_text("probabilities", exact=True).click()
        page.locator("#colouring").get_by_text("alpha", exact=True).click()
        put(page, alpha=0, temperature=1, max_new_tokens=LONG)
        send(page)
        page.wait_for_function("document.querySelectorAll('#tokens .token').length > 3")
        put(page, alpha=1)
        settled(page)
        spans = page.locator("#tokens .answer.alpha .token").all()
        shares = [float(span.get_attribute("style").split("--alpha:")[1].split(";")[0]) for span in (spans[0], spans[-1])]
        if shares != [0, 0]:
            break
    assert shares == [0, 1]


def test_the_history_outlives_a_reload_and_its_tokens_still_open(visit):
    page = visit()
    text = ask(page)
    page.wait_for_function("localStorage.length > 0")
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_selector("#tokens .token")
    assert page.locator("#tokens .answer").inner_text() == text and QUESTION in page.locator("#chat").inner_text()
    page.locator("#tokens .token").nth(2).click()
    page.wait_for_selector("#candidates table")
    assert page.locator("#passages .passage").count() > 0


def test_the_conversation_is_exported(visit):
    page = visit()
    text = ask(page)
    with page.expect_download() as download:
        page.locator("#export").click()
    (answer,) = json.loads(download.value.path().read_text(encoding="utf-8"))["answers"]
    assert answer["question"] == QUESTION and letters(answer["answer"]) == letters(text) and answer["seed"] == 3
    assert all(0 <= token["blended"] <= 1 and token["passages"] for token in answer["tokens"])


@pytest.mark.parametrize("secure", [True, False])
def test_an_answer_is_copied_with_and_without_the_browsers_clipboard(visit, secure):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    text = ask(page)
    page.evaluate("navigator.clipboard.writeText('something else')")  # an earlier test copied the same answer
    if not secure:  # as on http beyond this machine
        page.evaluate("Object.defineProperty(Navigator.prototype, 'clipboard', {get: () => undefined})")
    page.locator("#copy").click()
    box, pasted = page.locator("#question textarea"), ""
    for _ in range(50):  # the browser copies some time after the click
        box.fill("")
        box.press("Control+V")
        if (pasted := letters(box.input_value())) == letters(text):
            break
        page.wait_for_timeout(100)
    assert pasted == letters(text) != ""


def test_shift_enter_makes_a_line_and_enter_asks(visit):
    page = visit()
    put(page, max_new_tokens=5)
    box = page.locator("#question textarea")
    box.fill("One")
    box.press("Shift+Enter")
    page.keyboard.type("two?")
    assert box.input_value() == "One\ntwo?"
    box.press("Enter")
    settled(page)
    assert "One\ntwo?" in page.locator("#chat").inner_text()


def test_the_explorer_measures_the_last_answer(visit):
    page = visit()
    text = ask(page)
    page.get_by_role("tab", name="Alpha explorer").click()
    page.locator("#take").click()
    expect(page.locator("#explorer_question textarea, #explorer_question input")).to_have_value(QUESTION)
    page.locator("#measure").click()
    expect(page.locator("#curve_words")).to_contain_text("The gate:")
    page.wait_for_selector("#curve svg, #curve canvas")
    assert text


def test_a_preset_sets_temperature_and_top_k(visit):
    page = visit()
    page.locator("#preset").get_by_text("lively", exact=True).click()
    expect(number(page, "temperature")).to_have_value("1")
    expect(number(page, "top_k")).to_have_value("100")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, address, theme):
    page = visit()
    page.goto(f"{address}?__theme={theme}")
    page.wait_for_selector("#question textarea")
    ask(page)
    for tab in ("Chat", "Three voices", "Alpha explorer", "About this memory"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        bad = [v for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert bad == [], (tab, [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in bad])


def test_on_a_phone_the_answer_comes_first_and_the_settings_are_folded(visit):
    page = visit(viewport={"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert not number(page, "top_k").is_visible()
    page.locator("#settings button").first.click()
    ask(page)
    assert page.locator("#tokens").bounding_box()["y"] < page.locator("#settings").bounding_box()["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_plots_about_a_memory_show_their_legends_and_its_sources_are_named(visit):
    page = visit()
    page.get_by_role("tab", name="About this memory").click()
    page.locator("#about .role-legend-label").first.wait_for(state="attached")
    page.wait_for_timeout(500)
    shown = page.evaluate("""[...document.querySelectorAll('#about .role-legend-label text')].map(label => {
        const block = label.closest('.block'), below = block.nextElementSibling?.getBoundingClientRect().top ?? Infinity;
        const bottom = label.getBoundingClientRect().bottom;
        return [label.textContent, bottom <= below && (bottom <= block.getBoundingClientRect().bottom ||
                                                       getComputedStyle(block).overflow == 'visible')];
    })""")
    assert sorted(shown) == sorted([name, True] for name in ("logits", "probabilities", "loss", "KL", "cross-entropy"))
    assert "rows.jsonl" in page.locator("#about").inner_text()
