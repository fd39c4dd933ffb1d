"""Answers of the demo's memory beside those of the base alone, of BM25 and of LoRA, and counts over 235 questions.

    python benchmarks/answers.py --model_dir build/compare/demo/seed_0 --lora build/compare/demo/lora_0 > answers.md

That memory and that LoRA come from benchmarks/compare.py --demo. Without these options it asks the memory of make demo.

Asks the memory through the page's own code, with the page's own defaults and one seed, and writes Markdown. Every other way has
the same temperature, top-k and ban on repeated runs of tokens. Nothing is selected or edited.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
from base_model import BaseLM
from chat import Chat
from generation import AUTO
from memory_decoder import read_manifest
from retrieval import BM25
from web.panels import NO_ANSWER

SEED = 0
SETTINGS = {"top_k": 50, "max_new_tokens": 256, "k": 8, "seed": SEED}
SHORT = 48  # new tokens of an answer to a general question


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = read(ROOT / "demo/legal_qa.jsonl")
UNSEEN, GENERAL = (read(Path(__file__).parent / f"{name}_questions.jsonl") for name in ("unseen", "general"))
READ = 20  # of the unseen questions whose answers are printed
STORED = 40  # stored questions that are asked
RUN = 5  # words; an answer in which so many come twice in the same order repeats itself
# Numbers, and words with a capital after a word without one: what an answer must get right to be of use.
FACT = re.compile(r"\$?\d[\d,.]*\d|\d|(?<=[a-z,] )[A-Z][A-Za-z]+")
BASE, AGAIN, PROMPT, FOUND = "base alone", "base alone, another seed", "base, BM25's answer in the prompt", "BM25's answer as it is"
LORA, MEMORY = "LoRA, the same seconds", "memory, automatic alpha"


def repeats(answer):
    """Whether some run of RUN words comes twice."""
    words = answer.split()
    runs = [tuple(words[i:i + RUN]) for i in range(len(words) - RUN + 1)]
    return len(set(runs)) < len(runs)


class Stored:
    """The stored answers: found by a question, or as the nearest to an answer."""

    def __init__(self, rows):
        titles = {row["Answer"]: row["Title"] for row in ROWS}
        self.rows, self.answers = rows, list(dict.fromkeys(row["Answer"] for row in rows))
        self.titles = [titles[answer] for answer in self.answers]
        self.by_row, self.by_answer = BM25([f"{row['Question']} {row['Answer']}" for row in rows]), BM25(self.answers)

    def found(self, question):
        """The stored answer that BM25 finds for a question, among questions and answers together."""
        return self.rows[self.by_row(question)]["Answer"]

    def topic(self, answer):
        """The title of the stored answer that BM25 finds nearest to an answer."""
        return self.titles[self.by_answer(answer)]


class NoRepeat(NoRepeatNGramLogitsProcessor):
    """As on the page: only the answer's own runs of tokens count, so that an answer may quote its prompt."""

    def __init__(self, size, prompt):
        super().__init__(size)
        self.prompt = prompt

    def __call__(self, ids, scores):
        return super().__call__(ids[:, self.prompt:], scores)


@torch.no_grad()
def answers_of(base, prompts, temperature, no_repeat, most, seed=SEED, batch_size=15):
    """A model's answers to prompts (lists of token ids), by transformers' generate."""
    answers = []
    torch.manual_seed(seed)
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i:i + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[base.eos] * (longest - len(p)) + p for p in batch], device=base.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=base.device)
        processors = LogitsProcessorList([NoRepeat(no_repeat, longest)] if no_repeat else [])
        out = base.model.generate(ids, attention_mask=mask, logits_processor=processors, do_sample=True, temperature=temperature,
                                  top_k=SETTINGS["top_k"], max_new_tokens=most, pad_token_id=base.eos)
        answers += base.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return answers


def facts(text):
    return set(FACT.findall(text))


def counts(answers, asked, stored):
    """One row of the table about answers to unseen questions.

    Every stored answer names its area and topic first. For any other answer, the stored answer that is nearest by BM25 gives its
    topic. Facts are numbers and names. An answer keeps those that some stored answer of the right topic has.
    """
    areas, found = [row["Title"].partition(":")[0] for row in asked], [stored.topic(answer) for answer in answers]
    right = [facts(" ".join(r["Answer"] for r in ROWS if r["Title"] == row["Title"])) for row in asked]
    own = [facts(answer) for answer in answers]
    kept = sum(len(a & b) for a, b in zip(own, right, strict=True))
    return (sum(a.strip().startswith(row["Title"] + ".") for a, row in zip(answers, asked, strict=True)),
            sum(title == row["Title"] for title, row in zip(found, asked, strict=True)),
            sum(title.partition(":")[0] != area for title, area in zip(found, areas, strict=True)),
            f"{kept} of {sum(map(len, own))}", sum(map(repeats, answers)))


def knows(answer, row):
    """Whether one of the accepted words stands among the first 60 of an answer."""
    text = " ".join(answer.split()[:60])
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in row["Accepted"])


def cell(answer):
    return " ".join(answer.split()).replace("|", "\\|")


def ask(chat, question, settings, alpha, rule):
    """The page's answer."""
    answer = chat.begin(question, alpha=alpha, rule=rule, **settings)
    for _ in chat.write(answer):
        pass
    return answer.text or NO_ANSWER


def unseen_table(ways, stored):
    print("\n| questions that no row asks | topic named | nearest is the topic | off topic | facts kept | repeats |\n"
          "|---|---:|---:|---:|---:|---:|")
    for part in ("choice", "test"):
        picks = [number for number, row in enumerate(UNSEEN) if row["Set"] == part]
        for name, answers in ways.items():
            cells = counts([answers[number] for number in picks], [UNSEEN[number] for number in picks], stored)
            print(f"| {len(picks)} {part}: {name} | " + " | ".join(map(str, cells)) + " |")


def general_table(ways, rows, asked):
    """rows: the questions that the base answers well, of so many asked."""
    titles = tuple({row["Title"].partition(":")[0] + ":" for row in ROWS})
    print(f"\n| {len(rows)} of {asked} general questions, which the base answers well | still right | begins as a stored answer |\n"
          "|---|---:|---:|")
    for name, answers in ways.items():
        right = sum(knows(answer, row) for answer, row in zip(answers, rows, strict=True))
        print(f"| {name} | {right} | {sum(answer.strip().startswith(titles) for answer in answers)} |")


def stored_table(ways, rows):
    print(f"\n| {len(rows)} stored questions | begins with the 24 stored words | is the stored answer, whole | repeats |\n"
          "|---|---:|---:|---:|")
    for name, answers in ways.items():
        pairs = [(answer.split(), row["Answer"].split()) for answer, row in zip(answers, rows, strict=True)]
        begun, whole = sum(a[:24] == b[:24] for a, b in pairs), sum(a == b for a, b in pairs)
        print(f"| {name} | {begun} | {whole} | {sum(map(repeats, answers))} |")


class Ways:
    """Every way to answer, with one setting. tuned: the LoRA model or None."""

    def __init__(self, chat, stored, tuned, how):
        self.chat, self.stored, self.tuned, self.how, self.base = chat, stored, tuned, how, chat.model.base

    def model(self, model, questions, most, seed=SEED):
        prompts = [self.base.encode(self.chat.template.prompt(question)) for question in questions]
        return answers_of(model, prompts, most=most, seed=seed, **self.how)

    def answers(self, questions, wanted, most=SETTINGS["max_new_tokens"]):
        """{way: answers} of the wanted ways."""
        found = [self.stored.found(question) for question in questions]
        told = [f"{text}\n\n{question}" for text, question in zip(found, questions, strict=True)]
        settings = SETTINGS | self.how | {"max_new_tokens": most}
        say = {BASE: lambda: self.model(self.base, questions, most),
               AGAIN: lambda: self.model(self.base, questions, most, SEED + 1),
               PROMPT: lambda: self.model(self.base, told, most), FOUND: lambda: found,
               LORA: lambda: self.model(self.tuned, questions, most),
               MEMORY: lambda: [ask(self.chat, question, settings, 0, AUTO) for question in questions]}
        return {way: say[way]() for way in wanted if way != LORA or self.tuned}


def tell_unseen(ways):
    asked = [row["Question"] for row in UNSEEN]
    said = ways.answers(asked, (BASE, PROMPT, FOUND, LORA, MEMORY))
    for number, question in enumerate(asked[-READ:], len(asked) - READ):
        print(f"**{question}**\n\n" + "".join(f"- {way}: {cell(answers[number])}\n" for way, answers in said.items()))
    unseen_table(said, ways.stored)


def tell_general(ways):
    first = ways.model(ways.base, [row["Question"] for row in GENERAL], SHORT)
    known = [row for answer, row in zip(first, GENERAL, strict=True) if knows(answer, row)]
    general_table(ways.answers([row["Question"] for row in known], (AGAIN, PROMPT, LORA, MEMORY), SHORT), known, len(GENERAL))


def tell_stored(ways):
    rows = ways.stored.rows[::len(ways.stored.rows) // STORED][:STORED]
    stored_table(ways.answers([row["Question"] for row in rows], (FOUND, LORA, MEMORY)), rows)


TABLES = {"unseen": tell_unseen, "general": tell_general, "stored": tell_stored}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other options are those of app.py.")
    parser.add_argument("--lora", help="folder of the tuned model; without it that row is left out")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    given, more = parser.parse_known_args()
    options = app.parse_options(["--demo", *more])
    manifest = read_manifest(options.model_dir)
    if manifest is None:
        sys.exit("Nothing is trained yet; run python train_memory_decoder.py --demo first.")
    chat = Chat.open(options, manifest)
    how = {"temperature": options.temperature, "no_repeat": options.no_repeat}
    print(f"Temperature {options.temperature:g}, top-k {SETTINGS['top_k']}, seed {SEED}, "
          f"no run of {options.no_repeat} tokens twice.\n", flush=True)
    stored = Stored([example.row for example in chat.store.examples])
    ways = Ways(chat, stored, BaseLM.load(given.lora, manifest["dtype"]) if given.lora else None, how)
    for name in given.tables:
        TABLES[name](ways)


if __name__ == "__main__":
    main()
