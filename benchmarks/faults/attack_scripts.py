"""Scripts that are planted wherever the page shows a text, in a real Chromium that notes each one that runs."""

import json

from browser import chromium
from faults import page as pages
from faults.common import Outcome
from faults.page import questions, said

NAME = "<img src=x onerror=hit(0)>"  # of the model's folder and of the table: it can hold no slash
COUNT = {True: 10, False: 40}
FIRST, AGAIN = "hit({n})", "window['h'+'it']({n})"
SHAPES = (
    "<script>{js}</script>", "<img src=x onerror={js}>", "<svg onload={js}>", "${{{js}}}",
    "{{{{constructor.constructor('{js}')()}}}}",
    "<iframe src=javascript:parent.{js}></iframe>", "[click](javascript:{js})", "\"><img src=x onerror={js}>",
    "</div></span><script>{js}</script>", "<img src=http://evil.example/{n}.png>", "<body onload={js}>",
    "<details open ontoggle={js}>",
    "<video><source onerror={js}></video>", "<input autofocus onfocus={js}>", "<style onload={js}></style>",
    "<math><mi//xlink:href='data:x,<script>{js}</script>'>", "' onmouseover='{js}", "<a href=javascript:{js}>x</a>",
    "<svg><animate onbegin={js} attributeName=x dur=1s></svg>", "&lt;img src=x onerror={js}&gt;",
    "<link rel=stylesheet href=http://evil.example/{n}.css>")
INIT = "window.hits = []; window.hit = n => window.hits.push(n);"
HOST = "http://127.0.0.1"


def payloads(place):
    """Scripts that note their numbers, from 1 on."""
    made = [shape.format(js=js.format(n=n), n=n) for n, (shape, js) in
            enumerate(((shape, js) for js in (FIRST, AGAIN) for shape in SHAPES), 1)]
    return made[:COUNT[place.short]]


def rows(place):
    """A table in which every text is a script, and a few plain rows."""
    plain = [{"Title": f"Title {n}", "Question": text, "Answer": f"Ask somebody about {n}."} for n, text in
             enumerate(questions()[:14])]
    return plain + [{"Title": f"{script} title", "Question": f"{script}?", "Answer": f"{script} Yes."} for script in
                    payloads(place)]


def record(script, entries=4):
    """An answer whose every text is a script, as a browser may have kept it."""
    chances = {"id": 300, "text": script, "base": 0.1, "memory": 0.6, "blended": 0.3}
    token = chances | {"alpha": 0.5, "cut": 0.01, "end": False, "candidates": [chances, chances | {"id": 301}],
                       "neighbours": [[1.0, entry] for entry in range(entries)]}
    return {"question": script, "answer": script, "rule": "logits", "alpha": 0.5, "temperature": 1.0, "top_k": 50, "no_repeat": 0,
            "knn_k": 8, "knn_temperature": 1.0, "max_new_tokens": 20, "seed": 3, "k": 4, "kept": 0, "seconds": 1.0,
            "tokens": [token, token]}


def broken(script):
    """Records in which a script is in the place of a number or of a rule."""
    whole = record(script)
    tokens = [[{**whole["tokens"][0], name: script}] for name in ("id", "base", "alpha", "end", "neighbours", "candidates")]
    return [whole | {name: script} for name in ("rule", "seed", "k", "alpha", "kept", "seconds", "knn_k")] + [
        whole | {"tokens": made} for made in tokens]


class Watched:
    """A page of a browser that notes what runs, what asks, and what is fetched from elsewhere."""

    def __init__(self, browser):
        self.context = browser.new_context()
        self.visit, self.seen = self.context.new_page(), []
        self.visit.set_default_timeout(pages.WAIT * 1000)
        self.visit.add_init_script(INIT)
        self.visit.on("dialog", self.dialog)
        self.visit.on("request", lambda request: self.request(request.url))

    def dialog(self, dialog):
        self.seen.append(f"A dialog says {dialog.message!r}.")
        dialog.dismiss()

    def request(self, url):
        if url.startswith(("http", "ws")) and not url.startswith(HOST):
            self.seen.append(f"It asks for {url}.")

    def faults(self):
        """A sentence for each script that ran, and for each other thing that was seen."""
        hits = sorted(set(self.visit.evaluate("window.hits")))
        return [f"Script {number} ran." for number in hits] + self.seen

    def close(self):
        self.context.close()


def planted(place, page):
    """Scripts in the memory's texts and names, in questions, in messages of errors, and in what a browser kept."""
    outcome, scripts, found, unseen = Outcome("a script that is planted"), payloads(place), [], []
    with chromium() as browser:
        for number in range(0, len(scripts), 10):
            some = scripts[number:number + 10]
            for visited in (kept, typed, unreadable):
                watched = Watched(browser)
                unseen += visited(watched.visit, page, some)
                watched.visit.wait_for_timeout(300)  # for what runs late
                found += watched.faults()
                watched.close()
    for script in dict.fromkeys((NAME, *scripts, *unseen)):
        outcome.add(f"{script} was not shown, so it was not tried." if script in unseen else None)
    for wrong in found:
        outcome.add(wrong)
    outcome.note = "each in a title, a question, an answer, a passage, a candidate, an error and 13 places of a record"
    return outcome


def opened(visit, page, records=None):
    """Open the page. records: what the browser kept, put in the place of what it really sends."""
    visit.route("**/run/predict", lambda route: replaced(route, records) if records else route.continue_())
    visit.goto(page.address)
    visit.wait_for_selector("#question textarea")
    visit.wait_for_function("document.querySelectorAll('#examples button, #examples td, #examples .gallery-item').length > 0")


def replaced(route, records):
    """Let a request go on. That with which the page restores what the browser kept, which has three values, gets other records."""
    body = json.loads(route.request.post_data)
    if len(body["data"]) == 3 and body["data"][0] == []:
        body["data"][0] = records
    route.continue_(post_data=json.dumps(body))


def shows(visit, selector, text):
    """Whether a part of the page shows a text letter by letter, whatever its spaces."""
    shown = "".join(visit.locator(selector).all_inner_texts())
    return "".join(text.split()) in "".join(shown.replace("␣", " ").split())


def kept(visit, page, scripts):
    """The scripts come back from the browser, as questions and answers. Every tab is opened. Returns what was not shown."""
    opened(visit, page, [record(script) for script in scripts])
    visit.wait_for_selector("#tokens .token")
    visit.locator("#tokens .token").first.click()
    visit.wait_for_selector("#passages .passage")
    unseen = [script for script in scripts[:-1] if not shows(visit, "#chat", script)]
    unseen += [scripts[-1]] if not all(shows(visit, part, scripts[-1]) for part in ("#tokens", "#candidates")) else []
    for name in ("Three voices", "Alpha explorer", "About this memory"):
        visit.get_by_role("tab", name=name).click()
    unseen += [] if shows(visit, "#about", NAME) and shows(visit, "#title", NAME) else [NAME]
    visit.get_by_role("tab", name="Chat").click()
    visit.locator("#undo").click()  # the question goes back into its box, and the answer before it is shown
    visit.wait_for_function("text => document.querySelector('#question textarea').value === text", arg=scripts[-1])
    return unseen


def typed(visit, page, scripts):
    """The scripts are typed as questions, of which the nearest texts are scripts too, and as seeds, which are refused by name."""
    opened(visit, page)
    put(visit, "#max_new_tokens input[type=number]", "2")
    stored = False
    for script in scripts:
        visit.locator("#question textarea").fill(script)
        visit.locator("#question textarea").press("Enter")
        said(visit, script)
        stored = stored or shows(visit, "#passages", "hit(")
    for script in scripts:
        put(visit, "#seed textarea, #seed input", script)
        visit.locator("#retry").click()
        visit.wait_for_selector(".toast-body, [data-testid=toast-body]")
        visit.locator(".toast-close, [data-testid=toast-close]").first.click()
    put(visit, "#seed textarea, #seed input", "3")
    visit.locator("#examples button, #examples td, #examples .gallery-item").first.click()
    visit.wait_for_selector("#compare .voice")
    return [] if stored and shows(visit, "#examples", "hit(") else ["A stored text with a script"]


def unreadable(visit, page, scripts):
    """Records in which a script is in the place of a number. None of them is shown."""
    for number, script in enumerate(scripts):
        made = broken(script)
        opened(visit, page, [made[number % len(made)]])
        visit.unroute("**/run/predict")
    return []


def put(visit, selector, text):
    field = visit.locator(selector).first
    field.fill(text)
    field.press("Tab")
