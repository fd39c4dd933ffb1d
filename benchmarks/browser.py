"""The Chromium that is installed here, for the pictures, the faults and the browser tests."""

import shutil
from contextlib import contextmanager

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Of the page's own files, so that nothing is fetched from elsewhere.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-component-update"]


class NoBrowser(RuntimeError):
    """There is no Chromium here."""


@contextmanager
def chromium():
    """A headless browser. Raises NoBrowser, in one sentence, if there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise NoBrowser(f"No {', '.join(NAMES[:-1])} or {NAMES[-1]} is on the path; install one.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
