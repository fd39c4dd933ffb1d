"""Answers of the demo's memory beside those of the base alone, of BM25 and of LoRA, and counts over 235 questions.

    python benchmarks/answers.py --lora build/compare/demo/lora > answers.md    # after benchmarks/compare.py --demo
    python benchmarks/answers.py --twelve > twelve.md                           # twelve questions at alpha 0, auto and 1

Asks the memory through the page's own code, with the page's own defaults and one seed, and writes Markdown. Every other way has
the same temperature, top-k and ban on repeated runs. Nothing is chosen or mended.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import bm25s
import torch
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
from base_model import BaseLM
from chat import Chat
from generation import AUTO, RULES
from memory_decoder import read_manifest
from web.panels import NO_ANSWER

SEED = 0
SETTINGS = {"top_k": 50, "max_new_tokens": 256, "k": 8, "seed": SEED}
SHORT = 48  # new tokens of an answer to a general question
AREAS = ("Landlord and tenant", "Employment", "Consumer and refunds", "Small claims and civil procedure", "Family",
         "Wills and probate", "Police encounters", "Debt and bankruptcy", "Intellectual property")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = read(ROOT / "demo/legal_qa.jsonl")
UNSEEN, GENERAL = (read(Path(__file__).parent / f"{name}_questions.jsonl") for name in ("unseen", "general"))
SHOWN, READ = 3, 20  # of the unseen questions: those with every alpha, and those with every way
STORED = 40  # stored questions that are asked
RUN = 8  # words; an answer in which so many come twice in the same order repeats itself
# Numbers, and words with a capital behind a word without one: what an answer must get right to be of use.
FACT = re.compile(r"\$?\d[\d,.]*\d|\d|(?<=[a-z,] )[A-Z][A-Za-z]+")
BASE, BM25, LORA, MEMORY = "base alone", "base, BM25's best answer in the prompt", "LoRA, the same seconds", "automatic alpha"


def stored_questions(rows):
    """The shortest stored question in each of the areas, as (area, question)."""
    stored = {row["Question"] for row in rows}
    for area in AREAS:
        yield area, min((row["Question"] for row in ROWS if row["Title"].startswith(area) and row["Question"] in stored), key=len)


def repeats(answer):
    """Whether some run of RUN words comes twice."""
    words = answer.split()
    runs = [tuple(words[i:i + RUN]) for i in range(len(words) - RUN + 1)]
    return len(set(runs)) < len(runs)


class Nearest:
    """BM25 over the stored answers."""

    def __init__(self, rows):
        titles = {row["Answer"]: row["Title"] for row in ROWS}
        self.answers = list(dict.fromkeys(row["Answer"] for row in rows))
        self.titles = [titles[answer] for answer in self.answers]
        self.index = bm25s.BM25()
        self.index.index(self.words(self.answers), show_progress=False)

    @staticmethod
    def words(texts):
        return bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def __call__(self, text):
        """(title, answer) of the stored answer nearest to a text."""
        found, _ = self.index.retrieve(self.words([text or "-"]), k=1, show_progress=False)
        return self.titles[found[0, 0]], self.answers[found[0, 0]]


class NoRepeat(NoRepeatNGramLogitsProcessor):
    """As on the page: only the answer's own runs of tokens count, so that an answer may quote its prompt."""

    def __init__(self, size, prompt):
        super().__init__(size)
        self.prompt = prompt

    def __call__(self, ids, scores):
        return super().__call__(ids[:, self.prompt:], scores)


@torch.no_grad()
def answers_of(base, prompts, temperature, no_repeat, most, batch_size=15):
    """A model's answers to prompts (lists of token ids), by transformers' generate."""
    answers = []
    torch.manual_seed(SEED)
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


def counts(answers, nearest):
    """One row of the table about answers to UNSEEN.

    Every stored answer names its area and topic first. For answers that name none, the stored answer counts that BM25 finds
    nearest to them. Facts are numbers and names. An answer keeps those that stand in a stored answer of the right topic.
    """
    areas, found = [row["Title"].partition(":")[0] for row in UNSEEN], [nearest(answer)[0] for answer in answers]
    right = [facts(" ".join(r["Answer"] for r in ROWS if r["Title"] == row["Title"])) for row in UNSEEN]
    own = [facts(answer) for answer in answers]
    kept = sum(len(a & b) for a, b in zip(own, right, strict=True))
    return (sum(a.strip().startswith(row["Title"] + ".") for a, row in zip(answers, UNSEEN, strict=True)),
            sum(a.strip().startswith(area + ":") for a, area in zip(answers, areas, strict=True)),
            sum(title == row["Title"] for title, row in zip(found, UNSEEN, strict=True)),
            sum(title.partition(":")[0] != area for title, area in zip(found, areas, strict=True)),
            f"{kept} of {sum(map(len, own))}", sum(map(repeats, answers)))


def knows(answer, row):
    """Whether one of the accepted words stands among the first 60 of an answer."""
    text = " ".join(answer.split()[:60])
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in row["Accepted"])


def cell(answer):
    return " ".join(answer.split()).replace("|", "\\|")


def show(chat, settings, middle):
    """Print twelve questions with their three answers."""
    columns, rows = [("alpha 0", 0, RULES[1]), middle, ("alpha 1", 1, RULES[1])], [e.row for e in chat.store.examples]
    asked = [*stored_questions(rows), *(("not in the file", row["Question"]) for row in UNSEEN[:SHOWN])]
    for number, (origin, question) in enumerate(asked, 1):
        print(f"**{number}. {question}** ({origin})\n")
        for name, alpha, rule in columns:
            print(f"- {name}: {cell(ask(chat, question, settings, alpha, rule))}", flush=True)
        print()


def ask(chat, question, settings, alpha, rule):
    """The page's answer."""
    answer = chat.begin(question, alpha=alpha, rule=rule, **settings)
    for _ in chat.write(answer):
        pass
    return answer.text or NO_ANSWER


def unseen_table(ways, nearest):
    print(f"\n| {len(UNSEEN)} questions that no row asks | topic named | area named | nearest: topic | off topic "
          "| facts kept | repeats |\n|---|---:|---:|---:|---:|---:|---:|")
    for name, answers in ways.items():
        print(f"| {name} | " + " | ".join(map(str, counts(answers, nearest))) + " |")


def general_table(ways, rows, asked):
    """rows: the questions that the base answers well, of so many asked."""
    titles = tuple({row["Title"].partition(":")[0] + ":" for row in ROWS})
    print(f"\n| {len(rows)} of {asked} general questions, which the base answers well | still right | begins as a stored answer |\n"
          "|---|---:|---:|")
    for name, answers in ways.items():
        right = sum(knows(answer, row) for answer, row in zip(answers, rows, strict=True))
        print(f"| {name} | {right} | {sum(answer.strip().startswith(titles) for answer in answers)} |")


def stored_line(answers, rows):
    begun = sum(a.split()[:24] == row["Answer"].split()[:24] for a, row in zip(answers, rows, strict=True))
    whole = sum(a.split() == row["Answer"].split() for a, row in zip(answers, rows, strict=True))
    print(f"\n{len(rows)} stored questions, {MEMORY}: {begun} answers begin with the 24 stored words, {whole} are the "
          f"stored answer to its last word, {sum(map(repeats, answers))} repeat themselves.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other options are those of app.py.")
    parser.add_argument("--lora", help="folder of the tuned model; without it that row is left out")
    parser.add_argument("--twelve", action="store_true", help="answer twelve questions at three alphas, and count nothing")
    given, more = parser.parse_known_args()
    options = app.parse_options(["--demo", *more])
    manifest = read_manifest(options.model_dir)
    if manifest is None:
        sys.exit("Nothing is trained yet; run python train_memory_decoder.py --demo first.")
    chat = Chat.open(options, manifest)
    how = {"temperature": options.temperature, "no_repeat": options.no_repeat}
    print(f"Temperature {options.temperature:g}, top-k {SETTINGS['top_k']}, seed {SEED}, "
          f"no run of {options.no_repeat} tokens twice.\n", flush=True)
    if given.twelve:
        show(chat, SETTINGS | how, (MEMORY, 0, AUTO))
    else:
        compare(chat, BaseLM.load(given.lora, manifest["dtype"]) if given.lora else None, how)


def compare(chat, tuned, how):
    """Print the answers to read and the three counts, under every way; tuned: the LoRA model or None."""
    rows = [example.row for example in chat.store.examples]
    nearest, base = Nearest(rows), chat.model.base

    def model_says(model, questions, most=SETTINGS["max_new_tokens"]):
        return answers_of(model, [base.encode(chat.template.prompt(question)) for question in questions], most=most, **how)

    def memory_says(questions, most=SETTINGS["max_new_tokens"]):
        return [ask(chat, question, SETTINGS | how | {"max_new_tokens": most}, 0, AUTO) for question in questions]

    def all_say(questions, *most):
        told = [f"{nearest(question)[1]}\n\n{question}" for question in questions]
        said = {BASE: model_says(base, questions, *most), BM25: model_says(base, told, *most)}
        said |= {LORA: model_says(tuned, questions, *most)} if tuned else {}
        return said | {MEMORY: memory_says(questions, *most)}

    asked = [row["Question"] for row in UNSEEN]
    unseen = all_say(asked)
    for number, question in enumerate(asked[:READ], 1):
        print(f"**{number}. {question}**\n\n" + "".join(f"- {name}: {cell(said[number - 1])}\n" for name, said in unseen.items()))
    unseen_table(unseen, nearest)
    first = model_says(base, [row["Question"] for row in GENERAL], SHORT)
    known = [row for answer, row in zip(first, GENERAL, strict=True) if knows(answer, row)]
    general_table(all_say([row["Question"] for row in known], SHORT), known, len(GENERAL))
    rows = rows[::len(rows) // STORED][:STORED]
    stored_line(memory_says([row["Question"] for row in rows]), rows)


if __name__ == "__main__":
    main()
