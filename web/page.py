"""The Gradio page: its components and their events."""

import html
import json
import shlex
from functools import partial
from pathlib import Path
from threading import Thread

import gradio as gr
import pandas as pd

from chat import EVERY_RULE, RANGES, Chat
from generation import KNN, RULES
from memory_decoder import read_manifest
from support.command import UserError, whole_text
from web import limits, panels
from web.api import Api, refusal
from web.session import CONTROLS, Desk, Session

EXAMPLES = 4
PRESETS = {"precise": (0.2, 50), "balanced": (0.7, 50), "lively": (1.0, 100)}  # temperature, top-k
TRAINED_AGAIN = "This memory was trained again."
LEGAL = "General information, not legal advice."
PHONE = 768  # pixels up to which the settings are folded at first
COPY_JS = """() => {
    const text = document.querySelector('#tokens .answer')?.innerText ?? '';
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const box = document.createElement('textarea');  // a browser offers a clipboard on https and on this machine only
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand('copy');
    box.remove();
}"""
DOWNLOAD_JS = """text => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
    link.download = 'memory_decoder_chat.json';
    link.click();
    URL.revokeObjectURL(link.href);
}"""
LIVE = ("alpha", "temperature", "top_k", "no_repeat", "knn_k", "knn_temperature")  # act at the next token


class Page:
    """The page of a Chat."""

    def __init__(self, chat, options):
        self.chat, self.options, self.desk = chat, options, Desk(chat)
        self.newer = self.closing = None  # the Chat of the memory that was trained since, once a visitor has asked for it

    def build(self):
        """The gr.Blocks of the whole page."""
        chat, model = self.chat, self.chat.model
        name = html.escape(Path(model.base.title).name)
        with limits.Blocks(title="Memory Decoder") as page:
            gr.HTML(f"<h1>Memory Decoder</h1><p>{name}, frozen, with a memory of {len(chat.store.examples):,} texts "
                    f"({len(chat.store):,} entries). {LEGAL if is_legal(chat) else ''}</p>", elem_id="title")
            self.news = gr.HTML(visible=False, elem_id="news", js_on_load=panels.NEWS_JS)
            self.session, self.width = gr.State(Session()), gr.Number(visible="hidden", label="width")
            self.browser = gr.BrowserState([], storage_key=f"memory-decoder-{self.mark()}", secret=self.mark())
            samples = [[question] for question in example_questions(chat.questions())]
            self.examples = gr.Dataset(components=[gr.Textbox(visible=False)], samples=samples,
                                       label="Ask what it knows: base, blend and memory answer side by side", elem_id="examples")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self.build_tabs()
                with gr.Column(scale=2, min_width=260):
                    self.build_controls()
            self.wire(page)
            self.build_api()
        self.blocks = page
        return page

    def mark(self):
        """A text that tells this memory from others: the first digits of its checksum."""
        return self.chat.manifest.get("files", {}).get("memory_decoder.pt", "none")[:16]

    def trained_again(self):
        """What `news` shows: a line if the folder holds another memory by now. The page goes on with the one that it loaded."""
        try:
            manifest = json.loads((Path(self.options.model_dir) / "config.json").read_text())
            other = not manifest["files"]["memory_decoder.pt"].startswith(self.mark())
        except (OSError, ValueError, LookupError, TypeError):  # a training is just putting its files in place
            other = False
        return gr.HTML(f'<p role="status">{TRAINED_AGAIN} <button>Load it</button></p>' if other else "", visible=other)

    def load_again(self):
        """Load the memory that is in the folder by now, and close this page. app.py then opens another at the same address.

        If the new memory cannot be opened, this page stays and says why.
        """
        if self.closing or not self.trained_again().visible:
            return
        try:
            manifest = read_manifest(self.options.model_dir)
            if manifest is None:
                raise UserError("A training is just putting its files in place; try again.")
            same = all(manifest[name] == self.chat.manifest[name] for name in ("base_model", "base_fingerprint", "dtype"))
            self.newer = Chat.open(self.options, manifest, self.chat.model.base if same else None)
        except UserError as error:
            raise refusal(error) from None
        self.closing = Thread(target=self.blocks.close)  # a thread of its own, since this request must still be answered
        self.closing.start()

    def followed_by(self):
        """The Chat of the page that comes after this one, once this one is closed. None if nobody asked for one."""
        if self.closing:
            self.closing.join()
        return self.newer

    def build_api(self):
        api = Api(self.chat, {name: control.value for name, control in self.controls.items()})
        for name in ("chat", "candidates", "passages"):
            gr.api(getattr(api, name), api_name=name, concurrency_id="model", concurrency_limit=1)

    def build_tabs(self):
        with gr.Tabs() as self.tabs:
            with gr.Tab("Chat", id="ask"):
                self.build_chat()
            with gr.Tab("Three voices", id="voices"):
                self.voices_question = gr.Textbox(label="Question", elem_id="voices_question", submit_btn="Ask all three")
                self.voices_stop = button("Stop", "voices_stop", variant="stop", interactive=False)
                self.compare = gr.HTML(elem_id="compare")
            with gr.Tab("Alpha explorer", id="explorer"):
                self.build_explorer()
            with gr.Tab("About this memory", id="about"):
                self.build_about()

    def build_chat(self):
        with gr.Column(elem_id="chat"):
            self.said = gr.Chatbot(show_label=False, height=None, min_height=60, max_height=420, editable="user",
                                   render_markdown=False, buttons=[], container=False, feedback_options=None,
                                   placeholder="Ask a question below, or choose one above.")
            self.tokens = gr.HTML(elem_id="tokens", js_on_load=panels.TOKENS_JS)
        self.facts = gr.HTML(elem_id="facts")
        first = next(iter(panels.COLOURINGS))
        self.colouring = gr.Radio(list(panels.COLOURINGS), value=first, label="colour of the tokens", elem_id="colouring",
                                  container=False)
        self.legend = gr.HTML(panels.legend(first), elem_id="legend")
        self.question = gr.Textbox(show_label=False, label="Question", placeholder="Your question", lines=1, max_lines=8,
                                   submit_btn="Ask", elem_id="question", autofocus=True)
        with gr.Row():
            self.stop_button = button("Stop", "stop", variant="stop", interactive=False)
            self.retry_button, self.undo_button = button("Retry", "retry"), button("Undo", "undo")
            self.clear_button, self.copy_button = button("Clear", "clear"), button("Copy answer", "copy")
            self.export_button, self.exported = button("Export", "export"), gr.Textbox(visible="hidden", label="exported")
        with gr.Row():
            with gr.Column(min_width=320):
                self.candidates = gr.HTML(elem_id="candidates", apply_default_css=False, js_on_load=panels.CANDIDATES_JS)
            with gr.Column(min_width=320):
                self.passages = gr.HTML(elem_id="passages", apply_default_css=False)

    def build_explorer(self):
        with gr.Column(elem_id="explorer"):
            gr.Markdown("How well would each alpha have predicted an answer? Lower is better.")
            self.explored_question = gr.Textbox(label="Question", elem_id="explorer_question")
            self.explored_answer = gr.Textbox(label="Answer", lines=4, elem_id="explorer_answer")
            with gr.Row():
                self.take_button = button("Take the last answer", "take")
                self.measure_button = button("Measure", "measure", variant="primary")
            self.curve = gr.LinePlot(x="alpha", y="perplexity", color="rule", height=320, show_label=False, elem_id="curve",
                                     visible=False)
            self.curve_words = gr.Markdown(elem_id="curve_words")

    def build_about(self):
        metrics = self.chat.metrics
        with gr.Column(elem_id="about"):
            gr.HTML(panels.about(self.chat), apply_default_css=False)
            sweep = metrics["alpha_sweep"]
            gr.LinePlot(pd.DataFrame([(a, p, rule) for rule in RULES for a, p in zip(sweep["alpha"], sweep[rule], strict=True)],
                                     columns=["alpha", "perplexity", "rule"]),
                        x="alpha", y="perplexity", color="rule", height=340, label="Held-out perplexity over alpha")
            gr.LinePlot(pd.DataFrame([(step, value, name) for step, *values in metrics.get("losses", [])
                                      for name, value in zip(("loss", "KL", "cross-entropy"), values, strict=True)],
                                     columns=["step", "nats a token", "loss"]),
                        x="step", y="nats a token", color="loss", height=340, label="Training loss")

    def build_controls(self):
        options, chat, chosen, search = self.options, self.chat, self.chat.chosen, self.chat.search_defaults
        with gr.Accordion("Settings", open=True, elem_id="settings") as self.settings:
            self.preset = gr.Radio(list(PRESETS), label="preset", elem_id="preset", value=None)
            start = chat.chosen_alpha(options.rule) if options.alpha is None else options.alpha
            rule = gr.Radio(list(EVERY_RULE), value=options.rule, label="blend rule", elem_id="rule",
                            info="auto: a gate chooses alpha for every token. kNN-LM: the search itself, in the memory's place")
            alpha = slider("alpha", start, 0.01, "alpha", "0: base alone, 1: memory alone; no effect under auto. Chosen in "
                           f"training: {chosen['alpha_logits']:g} for logits, {chosen['alpha_probabilities']:g} for probabilities")
            temperature = slider("temperature", options.temperature, 0.01, "temperature", "0: always the most probable token")
            top_k = slider("top_k", 50, 1, "top-k", "sample among this many of the best tokens")
            length = slider("max_new_tokens", 256, 1, "max new tokens", "longest answer")
            # Text, since an empty gr.Number arrives as 0.
            seed = gr.Textbox("" if options.seed is None else str(options.seed), label="seed", elem_id="seed",
                              placeholder="empty: a new draw every time", info="the same number and settings give the same answer")
            no_repeat = slider("no_repeat", options.no_repeat, 1, "no repeated run", "of this many tokens; 0: any may repeat")
            k = slider("k", 8, 1, "K", "stored entries shown for a token")
            with gr.Group(visible=options.rule == KNN) as self.search_controls:
                knn_k = slider("knn_k", search["knn_k"], 1, "kNN-LM: K", "neighbours that vote")
                warmth = gr.Number(search["knn_temperature"], label="kNN-LM: temperature", elem_id="knn_temperature",
                                   info="in squared distance")
        self.controls = {"alpha": alpha, "temperature": temperature, "top_k": top_k, "max_new_tokens": length, "k": k, "rule": rule,
                         "seed": seed, "no_repeat": no_repeat, "knn_k": knn_k, "knn_temperature": warmth}

    def wire(self, page):
        """Connect events with their handlers."""
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        model = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
        desk, controls = self.desk, [self.controls[name] for name in CONTROLS]
        shown = [self.said, self.tokens, self.facts, self.candidates, self.passages]
        here = [self.session, self.colouring]

        def keep(event):
            return event.then(Session.records, self.session, self.browser, **quick)

        def writes(event, handler, inputs, outputs, stop):
            """Connect an event with a handler that writes tokens. Its stop button works meanwhile. The result is kept."""
            event(asked, self.session, stop, **quick)
            done = keep(event(handler, inputs, outputs, **model)).then(lambda: gr.Button(interactive=False), None, stop, **quick)
            done.then(self.trained_again, None, self.news, **quick)

        writes(self.question.submit, desk.ask, [self.session, self.question, self.colouring, *controls], shown, self.stop_button)
        self.question.submit(lambda: "", None, self.question, **quick)
        for event, handler in ((self.retry_button.click, desk.again), (self.said.edit, desk.edited),
                               (self.candidates.select, desk.go_on)):
            writes(event, handler, [*here, *controls], shown, self.stop_button)
        self.tokens.select(desk.open_token, here, [self.tokens, self.candidates, self.passages], **quick)
        for event in (self.clear_button.click, self.said.clear):
            keep(event(desk.clear, here, shown, **quick))
        keep(self.undo_button.click(desk.undo, here, [*shown, self.question], **quick))
        for button in (self.stop_button, self.voices_stop):
            button.click(Session.stop, self.session, None, **quick)
        self.copy_button.click(None, js=COPY_JS, api_visibility="private")
        self.export_button.click(desk.export, self.session, self.exported, **quick).then(
            None, self.exported, js=DOWNLOAD_JS, api_visibility="private")
        self.colouring.change(desk.coloured, here, [self.legend, self.tokens], **quick)

        self.preset.input(lambda name: PRESETS[name], self.preset, [self.controls["temperature"], self.controls["top_k"]], **quick)
        rule = self.controls["rule"]
        rule.change(lambda name: gr.Group(visible=name == KNN), rule, self.search_controls, **quick)
        for name in LIVE:
            self.controls[name].change(partial(Session.change, name=name), [self.session, self.controls[name]], None, **quick)

        voices = [self.session, self.voices_question, self.colouring, *controls]
        writes(self.voices_question.submit, desk.voices, voices, self.compare, self.voices_stop)
        picked = self.examples.click(lambda sample: (sample[0], gr.Tabs(selected="voices")), self.examples,
                                     [self.voices_question, self.tabs], **quick)
        writes(picked.then, desk.voices, voices, self.compare, self.voices_stop)

        self.take_button.click(desk.take, self.session, [self.explored_question, self.explored_answer], **quick)
        self.measure_button.click(desk.explore, [self.explored_question, self.explored_answer, self.controls["alpha"]],
                                  [self.curve, self.curve_words], **model)
        page.load(self.trained_again, None, self.news, **quick)
        self.news.select(None, js=panels.LOAD_JS, api_visibility="private")
        self.news.select(self.load_again, None, None, **model)
        page.load(desk.restore, [self.browser, *here], shown, **quick)
        page.load(lambda width: gr.Accordion(open=width > PHONE), self.width, self.settings, js="() => window.innerWidth", **quick)


def asked(session):
    """Note that an answer was asked for, and let its stop button work."""
    session.ask()
    return gr.Button(interactive=True)


def button(words, name, **more):
    return gr.Button(words, elem_id=name, elem_classes="stop" if words == "Stop" else None, size="sm", min_width=60, **more)


def slider(name, value, step, label, info):
    low, high = RANGES[name]
    return gr.Slider(low, high, value=value, step=step, label=label, info=info, elem_id=name)


def example_questions(questions):
    """A few short questions, spread over all that the memory can be asked."""
    size = max(1, len(questions) // EXAMPLES)
    return [min(questions[i:i + size], key=len)[:300] for i in range(0, len(questions), size)][:EXAMPLES]


def untrained(folder, line, demo):
    """The page that is shown when there is no memory yet. An absolute folder is not for visitors to know."""
    if Path(folder).is_absolute():
        line = line.replace(shlex.quote(folder), "FOLDER")
        folder = Path(folder).name
    with limits.Blocks(title="Memory Decoder") as page:
        words = (f"## Nothing is trained yet\nThere is no memory in `{folder}`. Run\n\n    {line}\n\nand start this page again."
                 + ("" if demo else " Without a GPU, account or network, add `--demo` to both commands."))
        gr.Markdown(whole_text(words))
    return page


def launch(blocks, **address):
    """Serve the page. address: keywords of gr.Blocks.launch."""
    dark = "*primary_600"  # Soft's own colour is too pale behind white letters
    theme = gr.themes.Soft().set(button_primary_background_fill=dark, button_primary_background_fill_dark=dark,
                                 button_primary_background_fill_hover=dark, button_primary_background_fill_hover_dark=dark,
                                 checkbox_label_background_fill_selected=dark, checkbox_label_background_fill_selected_dark=dark,
                                 block_title_text_color="*primary_700", block_label_text_color="*primary_700",
                                 body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
                                 block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    # Without the queue, requests could use the model at the same time.
    blocks.queue(max_size=limits.WAITING, api_open=False)
    return blocks.launch(share=False, theme=theme, css=panels.CSS, footer_links=["api"], **limits.settings(), **address)


def is_legal(chat):
    return "legal" in str(chat.manifest.get("options", {}).get("dataset", "")).lower()

