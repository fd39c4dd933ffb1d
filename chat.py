"""The chat behind page, API and terminal. It writes answers token by token and explains each token.

An Answer is kept as a record: plain data, the same on the page, in the exported file and after a reload.
"""

import contextlib
import dataclasses
import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import evaluation
from base_model import BaseLM
from compiled import compile_step
from datastore import Datastore, knn_weights
from generation import AUTO, KNN, RULES, Gate, MemoryAugmentedLM, Reading, Settings, token_bytes
from memory_decoder import MemoryDecoder
from support.command import UserError, whole_text
from texts import Template, Window, encode_row, encode_to_end, shared_prefix

EVERY_RULE = (*RULES, AUTO, KNN)
# Name, lowest, highest: also enforced for values that arrive through the API.
RANGES = {"alpha": (0, 1), "temperature": (0, 2), "top_k": (1, 200), "max_new_tokens": (1, 1000), "k": (1, 32),
          "no_repeat": (0, 50), "knn_k": (1, 256), "knn_temperature": (1e-3, 1e6)}
SEEDS = 2**31
CHARACTERS = 32  # of a text for each position of the base model; a longer text is refused before it is tokenized
SNIPPET = 40  # tokens of a passage before the entry's own
END = "(end)"
VOICES = ("base alone", "blend", "memory alone")


@dataclass
class Answer:
    """An answer while it is written: its question and settings, and its tokens so far as plain data."""

    question: str
    turns: list  # earlier (message, answer) pairs that it reads
    settings: Settings
    max_new_tokens: int
    seed: int
    k: int  # neighbours kept of each token
    kept: int = 0  # tokens taken over from an earlier answer
    tokens: list = field(default_factory=list)
    states: dict = field(default_factory=dict)  # token number -> query state (H,), until its neighbours are found
    seconds: float = 0.0
    reading: Reading | None = None  # what has been read of the conversation so far

    @property
    def text(self):
        return "".join(token["text"] for token in self.tokens)

    @property
    def changed(self):
        """Share of the tokens just written at which the blend's best candidate is not the base's."""
        new = self.tokens[self.kept:]
        return sum(map(is_changed, new)) / max(1, len(new))

    @property
    def speed(self):
        """Tokens a second."""
        return (len(self.tokens) - self.kept) / max(self.seconds, 1e-9)

    def record(self):
        """The answer as plain data."""
        return {"question": self.question, "answer": self.text, **dataclasses.asdict(self.settings),
                "max_new_tokens": self.max_new_tokens, "seed": self.seed, "k": self.k, "kept": self.kept,
                "seconds": round(self.seconds, 3), "tokens": self.tokens}

    @classmethod
    def of_record(cls, record, turns=()):
        """The Answer of a record. turns: the earlier ones."""
        settings = Settings(**{f.name: record[f.name] for f in dataclasses.fields(Settings)})
        return cls(record["question"], list(turns), settings, record["max_new_tokens"], record["seed"], record["k"],
                   record["kept"], record["tokens"], {}, record["seconds"])

    def going_on(self, number, fresh):
        """The Answer `fresh` to the same question, with this one's turns and its first `number` tokens."""
        if number >= fresh.max_new_tokens:
            raise UserError(f"The answer has {number} tokens before this one already; raise max new tokens.")
        return dataclasses.replace(fresh, turns=self.turns, kept=number, tokens=self.tokens[:number])


class Chat:
    """A model with its datastore: writes Answers and explains their tokens."""

    def __init__(self, model, store, templates, chosen, max_turns=100, metrics=None, manifest=None):
        """templates: one for each source of examples. Questions are asked in the form of the first."""
        self.model, self.store, self.templates, self.template, self.chosen = model, store, templates, templates[0].asked, chosen
        self.max_turns, self.metrics, self.manifest = max_turns, metrics or {}, manifest or {}

    @classmethod
    def open(cls, options, manifest, base=None):
        """Load everything the manifest names. Raises UserError if the base model is not the one used in training.

        base: the base model, if it is loaded already.
        """
        base = base or BaseLM.load(options.base_model or manifest["base_model"], manifest["dtype"], options.device)
        if base.fingerprint != manifest["base_fingerprint"]:
            raise UserError(f"The base model {base.name} is not the one this memory was trained with "
                            f"({manifest['base_model']}); name that one with --base_model or train again.")
        if options.compile and not base.step:
            print("compiling the base: up to a minute, less where it was done before", file=sys.stderr, flush=True)
            compile_step(base)
        templates, folder = [Template.parse(source["template"], base) for source in manifest["sources"]], Path(options.model_dir)
        decoder, store = MemoryDecoder.load(folder / "memory_decoder.pt"), Datastore.open(folder)
        chosen = manifest["chosen"]
        model = MemoryAugmentedLM(base, decoder, templates[0].asked, Gate(**chosen["gate"]), store)
        metrics = json.loads((folder / "metrics.json").read_text())
        return cls(model, store, templates, chosen, options.max_turns, metrics, manifest)

    def chosen_alpha(self, rule):
        """The alpha that training chose for a rule. For auto and kNN-LM it is that of probabilities."""
        return self.chosen[f"alpha_{rule if rule in RULES else RULES[1]}"]

    @property
    def search_defaults(self):
        """Neighbours and temperature of the rule kNN-LM from training, limited to the ranges of the controls."""
        found = {"knn_k": self.metrics.get("k", 32), "knn_temperature": self.chosen["knn_temperature"]}
        return {name: min(max(value, RANGES[name][0]), RANGES[name][1]) for name, value in found.items()}

    def begin(self, message, turns=(), max_new_tokens=256, k=8, seed=None, **values):
        """An Answer with no token yet. values: fields of Settings. Raises UserError for values that the page cannot give.

        seed: the same whole number and settings give the same answer. None or "" draws a seed.
        """
        if not isinstance(message, str) or not message.strip():
            raise UserError("Type a question first.")
        message = whole_text(message.strip())
        self.check_length(message)
        turns = [(whole_text(asked), whole_text(said)) for asked, said in self.recent(turns)]
        values = self.search_defaults | values
        rule = values.pop("rule", RULES[0])
        if rule not in EVERY_RULE:
            raise UserError(f"The blend rule is one of {', '.join(EVERY_RULE)}, not {named(rule)}.")
        values = check_ranges(max_new_tokens=max_new_tokens, k=k, **values)
        length, k, seed = values.pop("max_new_tokens"), values.pop("k"), whole_seed(seed)
        self.model.check(rule, len(self.model.base.encode(self.template.prompt(message))), length)
        return Answer(message, turns, Settings(rule=rule, **values), length,
                      random.randrange(SEEDS) if seed is None else seed, k)

    @property
    def most_characters(self):
        return CHARACTERS * self.model.base.max_positions

    def check_length(self, *texts):
        """Raise UserError for texts that are surely too long."""
        if (length := sum(map(len, texts))) > self.most_characters:
            raise UserError(f"The text has {length:,} characters, and {self.model.base.title} never reads more than "
                            f"{self.most_characters:,}; shorten it.")

    def recent(self, turns):
        """The last turns, without those that would surely not fit."""
        kept, left = [], self.most_characters
        for asked, said in reversed(turns[max(0, len(turns) - self.max_turns):]):
            left -= len(asked) + len(said)
            if left < 0:
                break
            kept.insert(0, (asked, said))
        return kept

    def write(self, answer, first=None):
        """Yield the answer after each token that is added to it. first: the id of the first one, if it is not to be sampled."""
        prompt = self.prompt(answer.question, answer.turns, answer.max_new_tokens)
        kept = [token["id"] for token in answer.tokens]
        for step in self.model.stream(prompt, answer.settings, answer.max_new_tokens, answer.seed, kept, first, answer.reading):
            answer.states[len(answer.tokens)] = step.hidden
            answer.tokens.append(self.token(step))
            answer.seconds += step.seconds
            yield answer

    def questions(self):
        """The questions of the memory's examples, each once."""
        return list(dict.fromkeys(self.templates[example.source].question(example) for example in self.store.examples))

    def token(self, step):
        """A Step as plain data."""
        candidates = [{"id": i, "text": self.show(i), "base": short(b), "memory": short(m), "blended": short(p)}
                      for i, b, m, p in step.candidates]
        return {"id": step.token, "text": step.text, "end": step.token in self.model.ends, "base": short(step.base),
                "memory": short(step.memory), "blended": short(step.blended), "alpha": short(step.alpha), "cut": short(step.cut),
                "candidates": candidates}

    def show(self, token):
        """The text of one token. Pieces of a character are shown as bytes, e.g. <F0 9F>, special tokens by their names."""
        if token in self.model.ends:
            return END
        text = token_bytes(self.model.base.tokenizer, token).decode("utf-8", "surrogateescape")
        text = LOOSE_BYTES.sub(lambda loose: f"<{loose[0].encode('utf-8', 'surrogateescape').hex(' ').upper()}>", text)
        return text or self.model.base.tokenizer.decode([token])

    def prompt(self, message, turns, max_new_tokens):
        """The text to continue: as many earlier turns as the base model's positions allow, then the message."""
        base = self.model.base
        while turns and len(base.encode(self.template.prompt(message, turns))) + max_new_tokens > base.max_positions:
            turns = turns[1:]
        return self.template.prompt(message, turns)

    def trace(self, answer):
        """Add to every new token its k nearest entries, as pairs of squared distance and entry."""
        if answer.states:
            numbers = list(answer.states)
            states = torch.stack([answer.states[number] for number in numbers]).numpy()
            for number, *found in zip(numbers, *self.store.search(states, min(answer.k, len(self.store))), strict=True):
                answer.tokens[number]["neighbours"] = [(short(d), int(i)) for d, i in zip(*found, strict=True) if i >= 0]
            answer.states.clear()
        return answer

    def passages(self, neighbours):
        """The passages of pairs of squared distance and entry, as plain data, the nearest first.

        before, token, after: the passage; token is the entry's value. weight: in the kNN distribution.
        """
        D = np.array([[distance for distance, _ in neighbours]], np.float32)
        weights = knn_weights(D, self.chosen["knn_temperature"])[0] if neighbours else []
        return [self.passage(entry) | {"distance": distance, "weight": short(weight)}
                for (distance, entry), weight in zip(neighbours, weights, strict=True)]

    def passage(self, entry):
        """One entry as plain data: its example's name and title, its token, and the text around it."""
        base, number, here = self.model.base, int(self.store.example[entry]), int(self.store.position[entry]) + 1
        example = self.store.examples[number]
        template = self.templates[example.source]
        ids = encode_row(base, template, example.row)
        # The title is the question's, so a passage in the answer begins with the answer at the earliest.
        answer = shared_prefix(base.encode(template.begun(example.row)), ids)
        first = answer if here >= answer else self.model.skipped(ids)
        start = max(first, here - SNIPPET)
        before, token, after = (base.tokenizer.decode(part, skip_special_tokens=True)
                                for part in (ids[start:here], ids[here:here + 1], ids[here + 1:here + 12]))
        return {"entry": entry, "row": number, "name": example.name, "title": template.title(example),
                "before": ("" if start == first else "… ") + before, "token": token or END, "after": after}

    def voices(self, answer):
        """Yield three Answers as they grow in turn: the base alone, the answer's own blend, and the memory alone."""
        blend = RULES[1] if answer.settings.rule in (AUTO, KNN) else answer.settings.rule
        alone = KNN if answer.settings.rule == KNN else blend
        ends = [dataclasses.replace(answer.settings, alpha=alpha, rule=rule) for alpha, rule in ((0, blend), (1, alone))]
        answers = [dataclasses.replace(answer, settings=settings, tokens=[], states={})
                   for settings in (ends[0], answer.settings, ends[1])]
        writing = [self.write(each) for each in answers]
        while writing:
            writing = [voice for voice in writing if next(voice, None) is not None]
            yield answers

    def explore(self, question, text):
        """The perplexity of an answer at every alpha under both rules, and under the gate.

        Returns a dict: alpha (A,), logits (A,), probabilities (A,), auto, mean_auto_alpha, and tokens (the answer's length).
        """
        base, model = self.model.base, self.model
        if not all(isinstance(given, str) and given.strip() for given in (question, text)):
            raise UserError("Type a question and an answer first.")
        question, text = whole_text(question.strip()), whole_text(text.strip())
        self.check_length(question, text)
        ids = encode_to_end(base, self.template, self.template.answered(question, text))
        begin = min(shared_prefix(base.encode(self.template.prompt(question)), ids), len(ids) - 1)
        if len(ids) > base.max_positions:
            raise UserError(f"Question and answer have {len(ids)} tokens, but {base.title} reads at most {base.max_positions}.")
        skip = model.skipped(ids)
        scores = evaluation.score_positions(base, model.decoder, [Window(0, ids, skip, skip)], sweep=True)
        auto, alpha = evaluation.gated(model.gate, scores, evaluation.evidence_before(scores))
        own = slice(max(0, begin - 1 - skip), None)
        mixed = evaluation.mix_probabilities(scores["base"][own], scores["memory"][own])
        return {"alpha": evaluation.ALPHAS.tolist(), "logits": evaluation.perplexities(scores["blend_logits"][own]).tolist(),
                "probabilities": evaluation.perplexities(mixed).tolist(), "auto": evaluation.perplexity(auto[own]),
                "mean_auto_alpha": float(alpha[own].mean()), "tokens": len(auto[own])}


def is_changed(token):
    """Whether the blend's best candidate is not the base's. A token without candidates has this recorded."""
    if "candidates" not in token:
        return token["changed"]
    return max(token["candidates"], key=lambda c: c["base"])["id"] != token["candidates"][0]["id"]


def logprobs(tokens):
    """The tokens' log probabilities in the usual shape of language model APIs, with base and memory beside the blend."""
    def entry(text, chances):
        logs = {name: float(np.log(max(chances[key], 1e-45))) for name, key in
                (("logprob", "blended"), ("base_logprob", "base"), ("memory_logprob", "memory"))}
        return {"token": text, "id": chances["id"], "bytes": list(text.encode()), **logs}
    return {"content": [entry(t["text"], t) | {"alpha": t["alpha"], "top_logprobs": [entry(c["text"], c) for c in t["candidates"]]}
                        for t in tokens]}


def short(value):
    """A number to five digits, since records may be kept in a browser's small storage."""
    return float(f"{value:.5g}")


LOOSE_BYTES = re.compile("[\udc80-\udcff]+")  # bytes that are not UTF-8, as surrogateescape decodes them


def check_ranges(**values):
    """The values by name, whole numbers as int. Raises UserError for one that no slider would give."""
    return {name: in_range(name, value) for name, value in values.items()}


def in_range(name, value):
    low, high = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be from {low:g} to {high:g}, not {named(value)}.")
    kind = Settings.__annotations__.get(name, int)  # values that are not in Settings are whole numbers
    if kind(value) != value:
        raise UserError(f"{name} must be a whole number, not {named(value)}.")
    return kind(value)


def whole_seed(seed):
    """The seed as an int, from a number or its digits. None, for a new draw, if it is empty. Otherwise raises UserError."""
    if seed is None or (isinstance(seed, str) and not seed.strip()):
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if 0 <= (number := whole_number(seed)) < SEEDS:
            return number
    raise UserError(f"seed must be empty or a whole number from 0 to {SEEDS - 1}, not {named(seed)}.")


def whole_number(value):
    """A number, or its digits, as an int, also 3.0 and 1e2. Raises ValueError or OverflowError if it is not a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not float(value).is_integer():
        raise ValueError(value)
    return int(float(value))


def named(value):
    """A wrong value as an error message shows it."""
    try:
        return repr(value)[:40]
    except ValueError:  # Python does not write out a number of thousands of digits
        return "so long a number"
