"""The README's pictures, taken of the demo's own page in a headless Chromium.

    make pictures    # after make demo; needs the packages of requirements-dev.txt and a Chromium

One stored question is asked with one seed, so the same memory gives the same pictures.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
from browser import NoBrowser, chromium
from chat import Chat
from memory_decoder import read_manifest
from web import page

FOLDER = ROOT / "demo/pictures"
QUESTION = "Who do I serve when I am suing an LLC?"
WAIT = 180_000
VOICES_HEIGHT = 430  # of the first picture, in which the answers may run on below


def fill(view, name, value):
    view.locator(f"#{name} input[type=number], #{name} textarea, #{name} input[type=text]").first.fill(str(value))
    view.keyboard.press("Tab")


def opened(browser, address, width, height):
    view = browser.new_page(viewport={"width": width, "height": height})
    view.set_default_timeout(WAIT)
    view.goto(f"{address}?__theme=light")
    view.wait_for_selector("#question textarea")
    view.wait_for_timeout(1000)  # until a narrow page has folded its settings
    return view


def ask(view, question):
    view.locator("#question textarea").fill(question)
    view.keyboard.press("Enter")
    view.wait_for_selector("#candidates table")
    view.wait_for_timeout(1000)


def take(browser, address):
    view = opened(browser, address, 1280, 800)
    fill(view, "seed", 1)
    view.get_by_role("tab", name="Three voices").click()
    view.locator("#voices_question textarea, #voices_question input").first.fill(QUESTION)
    view.keyboard.press("Enter")
    view.wait_for_selector("#compare .voice")
    view.wait_for_function("document.querySelector('#voices_stop').disabled")
    box = view.locator("#compare").bounding_box()
    view.set_viewport_size({"width": 1280, "height": int(box["y"]) + VOICES_HEIGHT})
    view.wait_for_timeout(1000)
    view.screenshot(path=FOLDER / "three_voices.png", clip={**view.locator("#compare").bounding_box(), "height": VOICES_HEIGHT})

    view.get_by_role("tab", name="Chat").click()
    ask(view, QUESTION)
    view.locator("#tokens .token").nth(19).click()
    view.wait_for_timeout(1500)
    view.set_viewport_size({"width": 1280, "height": 1150})
    view.screenshot(path=FOLDER / "opened_token.png")

    view.get_by_role("tab", name="Alpha explorer").click()
    view.locator("#take").click()
    view.wait_for_timeout(1000)
    view.locator("#measure").click()
    view.wait_for_selector("#curve svg, #curve canvas")
    view.wait_for_timeout(1500)
    view.set_viewport_size({"width": 1280, "height": 1060})
    view.screenshot(path=FOLDER / "explorer.png")

    view = opened(browser, address, 390, 844)
    ask(view, QUESTION)
    view.evaluate("window.scrollTo(0, document.querySelector('#chat').getBoundingClientRect().top + scrollY - 60)")
    view.screenshot(path=FOLDER / "phone.png")


def main():
    options = app.parse_options(["--demo", *sys.argv[1:]])
    manifest = read_manifest(options.model_dir)
    if manifest is None:
        sys.exit("Nothing is trained yet; run make demo first.")
    blocks = page.Page(Chat.open(options, manifest), options).build()
    _, address, _ = page.launch(blocks, prevent_thread_lock=True, quiet=True)
    FOLDER.mkdir(exist_ok=True)
    try:
        with chromium() as browser:
            take(browser, address)
    except NoBrowser as error:
        sys.exit(str(error))
    for picture in sorted(FOLDER.iterdir()):
        print(f"{picture.name}: {picture.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
