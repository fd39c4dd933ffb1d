"""Script 2: chat in the browser with the base model and its memory, blended by a fixed or an automatic alpha.

    python app.py --demo                          # what `train_memory_decoder.py --demo` made
    python app.py --model_dir trained_models
"""

import errno
import html
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch

import command
from base_model import BaseLM
from command import UserError, fail, one_line, option
from datastore import Datastore
from generation import AUTO, RULES, Gate, MemoryAugmentedLM
from memory_decoder import MemoryDecoder, read_manifest
from texts import Template, encode_row

HERE = Path(__file__).resolve().parent
# The gate lets a sure memory win over a base that is sure and wrong. The demo's memory learned single questions, so an
# earlier answer in front of the next question only leads it astray.
DEMO = {"model_dir": str(HERE / "demo/trained_models"), "rule": "auto", "temperature": 0.2, "max_turns": 0, "no_repeat": 8}
QUESTIONS = [  # of rows that --demo remembers
    "I want a divorce but my husband says he will never sign anything. Can he stop me?",
    "Arrested and questioned, never read my rights. Is my case dismissed?",
    "Is there an income cutoff for filing Chapter 7?",
    "Are movie clips under ten seconds always legal in my review videos?",
]
# Name, lowest, highest: also enforced for values that arrive through the API.
RANGES = {"alpha": (0, 1), "temperature": (0, 2), "top_k": (1, 200), "max_new_tokens": (1, 1000), "k": (1, 32),
          "no_repeat": (0, 50)}
SEEDS = 2**31
PORT_IN_USE = "Port {} is in use; name another with --server_port."
NO_ANSWER = "*(The model ended its answer at once; ask in other words or choose another rule or alpha.)*"
SNIPPET = 40  # tokens of a passage shown before the remembered position
CSS = """
.passage { border-left: 3px solid var(--color-accent); padding: 0 0 0 .7em; margin: 0 0 .9em 0; font-size: .92em; }
.passage mark { background: var(--color-accent-soft); color: inherit; border-radius: 3px; padding: 0 2px; font-weight: 600; }
.passage small { color: var(--body-text-color-subdued); display: block; }
"""


@dataclass
class Options:
    model_dir: str = option("trained_models", "folder that train_memory_decoder.py wrote")
    base_model: str | None = option(None, "where the base model is now, if not where it was in training")
    server_name: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens the page to the network")
    server_port: int | None = option(None, "port; default: the first free one from 7860")
    device: str = option("auto", "auto, cpu, cuda or mps")
    temperature: float = option(0.7, "where the page's temperature slider starts")
    max_turns: int = option(100, "earlier turns of the chat that an answer reads, as far as they fit; 0 answers each alone")
    no_repeat: int = option(0, "where the page's slider starts that forbids runs of so many tokens to come twice; 0 allows all")
    rule: str = option("logits", "blend rule that the page starts with", choices=[*RULES, AUTO])
    demo: bool = option(False, "open what train_memory_decoder.py --demo made")


def parse_options(arguments=None):
    return command.parse_options(Options, __doc__.split("\n")[0], arguments, {"demo": DEMO})


class Chat:
    """What the page asks: answers in a stream, and the passages that an answer's memories come from."""

    def __init__(self, model, store, template, chosen, max_turns):
        self.model, self.store, self.template, self.chosen, self.max_turns = model, store, template, chosen, max_turns

    @classmethod
    def open(cls, options, manifest):
        """Load everything the manifest names; raises UserError if the base model is not the one trained with."""
        base = BaseLM.load(options.base_model or manifest["base_model"], manifest["dtype"], options.device)
        if base.fingerprint != manifest["base_fingerprint"]:
            raise UserError(f"The base model {base.name} is not the one this memory was trained with "
                            f"({manifest['base_model']}); name that one with --base_model or train again.")
        template = Template.parse(manifest["template"], base)
        decoder = MemoryDecoder.load(Path(options.model_dir) / "memory_decoder.pt")
        chosen = manifest["chosen"]
        model = MemoryAugmentedLM(base, decoder, template, Gate(**chosen["gate"]))
        return cls(model, Datastore.open(options.model_dir), template, chosen, options.max_turns)

    def answer(self, message, history, alpha, temperature, top_k, max_new_tokens, k, rule, seed=None, no_repeat=0):
        """Yield (answer so far, tokens with the change that the memory made to each, tokens with alpha, passages as HTML).

        seed: the same whole number and settings give the same answer; None draws anew.
        """
        try:
            check_request(message, rule, alpha=alpha, temperature=temperature, top_k=top_k, max_new_tokens=max_new_tokens, k=k,
                          no_repeat=no_repeat)
            seed = whole_seed(seed)
            turns = turns_of(history)
            prompt = self.prompt(message.strip(), turns[max(0, len(turns) - self.max_turns):], int(max_new_tokens))
            answer, tokens, alphas, states = "", [], [], []
            for step in self.model.stream(prompt, alpha, temperature, int(top_k), int(max_new_tokens), rule, seed,
                                          int(no_repeat)):
                answer += step.text
                tokens.append((step.text, step.memory - step.base))
                alphas.append((step.text, step.alpha))
                states = [*states, step.hidden][-int(k):]
                yield answer, merge_tokens(tokens), merge_tokens(alphas, max), gr.skip()
        except UserError as error:
            raise gr.Error(str(error), title="Please change one thing", print_exception=False) from None
        sources = self.passages(torch.stack(states), int(k))
        yield answer or NO_ANSWER, merge_tokens(tokens), merge_tokens(alphas, max), sources

    def prompt(self, message, turns, max_new_tokens):
        """The text to continue: as many earlier turns as the base model's positions allow, then the message."""
        base = self.model.base
        while turns and len(base.encode(self.template.prompt(message, turns))) + max_new_tokens > base.max_positions:
            turns = turns[1:]
        return self.template.prompt(message, turns)

    def passages(self, states, k):
        """HTML of the K nearest entries of the last query states (Q, H), the nearest of each example only."""
        D, I = self.store.search(states.numpy(), min(k, len(self.store)))
        nearest = {}
        for distance, entry in sorted((float(d), int(i)) for d, i in zip(D.flat, I.flat, strict=True) if i >= 0):
            nearest.setdefault(int(self.store.example[entry]), (distance, entry))
        return "".join(self.passage(distance, entry) for distance, entry in list(nearest.values())[:k])

    def passage(self, distance, entry):
        """One source text up to the remembered position, the token that came next marked."""
        base, row = self.model.base, self.store.rows[self.store.example[entry]]
        ids, here = encode_row(base, self.template, row), int(self.store.position[entry]) + 1
        start = max(1, here - SNIPPET)
        before, token, after = (base.tokenizer.decode(part, skip_special_tokens=True)
                                for part in (ids[start:here], ids[here:here + 1], ids[here + 1:here + 12]))
        dots = "" if start == 1 else "… "
        title = " ".join(row[self.template.fields[0]].split())
        return (f'<div class="passage">{dots}{html.escape(before)}<mark>{html.escape(token) or "(end)"}</mark>{html.escape(after)}'
                f"<small>{html.escape(title[:120])} · squared distance {distance:.3g}</small></div>")


def check_request(message, rule, **values):
    """Raise UserError for a message or a value that no slider would give."""
    if not isinstance(message, str) or not message.strip():
        raise UserError("Type a question first.")
    if rule not in (*RULES, AUTO):
        raise UserError(f"The blend rule is {', '.join(RULES)} or {AUTO}, not {rule}.")
    check_ranges(**values)


def check_ranges(**values):
    for name, value in values.items():
        low, high = RANGES[name]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, not {value}.")


def whole_seed(seed):
    """The seed as an int, from a number or its digits, or None for a new draw if it is empty; else raises UserError."""
    text = "" if seed is None else str(seed).strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(SEEDS)) and int(text) < SEEDS):
        raise UserError(f"seed must be empty or a whole number from 0 to {SEEDS - 1}, not {text[:40]}.")
    return int(text)


def turns_of(history):
    """(message, answer) pairs of Gradio's message list, whose content is text or a list of blocks."""
    turns, question = [], None
    for item in history or []:
        content = item["content"]
        if not isinstance(content, str):
            content = "".join(block if isinstance(block, str) else block.get("text", "") for block in content)
        if item["role"] == "user":
            question = content
        elif question is not None:
            if content != NO_ANSWER:
                turns.append((question, content))
            question = None
    return turns


def merge_tokens(tokens, join=sum):
    """Tokens for the page, joined where the first of them shows no text yet; `join` makes one value of theirs."""
    shown, pending = [], []
    for text, value in tokens:
        pending.append(value)
        if text:
            shown.append((text, max(-1.0, min(1.0, join(pending)))))
            pending = []
    return shown


def slider(name, value, step, label, info):
    low, high = RANGES[name]
    return gr.Slider(low, high, value=value, step=step, label=label, info=info, elem_id=name)


def build_page(chat, options):
    """The Gradio page: chat on the left; sliders, the memory's share and the passages on the right."""
    rule = options.rule
    with gr.Blocks(title="Memory Decoder") as page:
        gr.Markdown(f"## Memory Decoder\n`{html.escape(Path(chat.model.base.name).name)}`, frozen, with a memory of "
                    f"{len(chat.store.rows):,} texts ({len(chat.store):,} entries). General information, not legal advice.")
        with gr.Row():
            left = gr.Column(scale=3)
            with gr.Column(scale=2):
                chosen = chat.chosen
                share = slider("alpha", chosen[f"alpha_{RULES[1] if rule == AUTO else rule}"], 0.01, "alpha",
                               "0: base model alone, 1: memory alone. Chosen in training: "
                               f"{chosen['alpha_logits']:g} for logits, {chosen['alpha_probabilities']:g} for probabilities.")
                blending = gr.Radio([*RULES, AUTO], value=rule, label="blend rule", elem_id="rule",
                                    info="auto: alpha is chosen anew for every token, whatever the slider says")
                inputs = [
                    share,
                    slider("temperature", options.temperature, 0.01, "temperature", "0: always the most probable token"),
                    slider("top_k", 50, 1, "top-k", "sample among so many tokens"),
                    slider("max_new_tokens", 256, 1, "max new tokens", "longest answer"),
                    slider("k", 8, 1, "K", "passages shown below, and last positions they are looked up for"),
                    blending,
                    # Text, since an empty gr.Number arrives as 0.
                    gr.Textbox("", label="seed", elem_id="seed", placeholder="empty: a new draw every time",
                               info="with a number here, change rule or alpha and retry the answer to see what the memory does"),
                    slider("no_repeat", options.no_repeat, 1, "no repeated run", "of so many tokens in an answer; 0: any"),
                ]
                gr.Markdown("**Passages its memories come from** (nearest entries of the answer's last positions)")
                passages = gr.HTML(elem_id="passages")
        shown = {"color_map": {}, "show_legend": False, "render": False}  # below the chat, which has to know them first
        tokens = gr.HighlightedText(label="What the memory changed: red tokens it made more probable, blue ones less",
                                    elem_id="tokens", **shown)
        alphas = gr.HighlightedText(label="alpha of each token: the redder, the more the memory decided", elem_id="alphas", **shown)
        with left:
            gr.ChatInterface(
                chat.answer, chatbot=gr.Chatbot(height=560, label="chat", buttons=["copy", "copy_all"], elem_id="chat"),
                additional_inputs=inputs, additional_outputs=[tokens, alphas, passages], editable=True,
                examples=[[q] for q in QUESTIONS],
                run_examples_on_click=True, cache_examples=False, concurrency_limit=1, api_name="chat")
            tokens.render(), alphas.render()
    return page


def untrained_page(options):
    usual = DEMO["model_dir"] if options.demo else Options.model_dir
    line = "python train_memory_decoder.py" + (" --demo" if options.demo else "")
    line += "" if options.model_dir == usual else f" --output_dir {shlex.quote(options.model_dir)}"
    with gr.Blocks(title="Memory Decoder") as page:
        gr.Markdown(f"## Nothing is trained yet\nThere is no memory in `{options.model_dir}`. Run\n\n    {line}\n\n"
                    "and start this page again." + ("" if options.demo else " Without a GPU, account or network, add `--demo` "
                                                    "to both commands."))
    return page


def check_address(options):
    """Raise UserError if the page cannot listen where it is told to."""
    port = options.server_port
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--server_port must be from 1 to 65535, not {port}.")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.server_name, port or 0))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(PORT_IN_USE.format(port)) from None
        raise UserError(f"The page cannot listen at {options.server_name}: {error.strerror}; check --server_name and "
                        "--server_port.") from None


def main():
    options = parse_options()
    try:
        check_address(options)
        check_ranges(temperature=options.temperature, no_repeat=options.no_repeat)
        if options.max_turns < 0:
            raise UserError(f"--max_turns must be at least 0, not {options.max_turns}.")
        manifest = read_manifest(options.model_dir)
        page = build_page(Chat.open(options, manifest), options) if manifest else untrained_page(options)
        if not manifest:
            print(f"Nothing is trained yet in {options.model_dir}; the page says how.", flush=True)
        page.queue(max_size=16)
        page.launch(server_name=options.server_name, server_port=options.server_port, share=False, css=CSS,
                    theme=gr.themes.Soft(), enable_monitoring=False, footer_links=["api"], max_file_size=1)
    except UserError as error:
        sys.exit(fail(str(error)))
    except OSError as error:
        if "port" not in str(error).lower():
            raise
        sys.exit(fail(PORT_IN_USE.format(options.server_port) if options.server_port else one_line(error)))


if __name__ == "__main__":
    main()
