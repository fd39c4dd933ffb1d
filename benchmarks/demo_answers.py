"""What the demo answers: twelve questions at alpha 0, automatic alpha and 1, and counts over 85 questions.

    python benchmarks/demo_answers.py > answers.md    # after train_memory_decoder.py --demo

Asks through the page's own code with the page's own defaults and one seed, and writes Markdown. The counts stand beside
those of the base alone and of the base with the stored answer that BM25 ranks first in its prompt.
"""

import json
import sys
from pathlib import Path

import bm25s
import torch
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
from chat import Chat
from generation import AUTO, RULES
from memory_decoder import read_manifest
from web.panels import NO_ANSWER

SEED = 0
SETTINGS = {"top_k": 50, "max_new_tokens": 256, "k": 8, "seed": SEED}
AREAS = ("Landlord and tenant", "Employment", "Consumer and refunds", "Small claims and civil procedure", "Family",
         "Wills and probate", "Police encounters", "Debt and bankruptcy", "Intellectual property")
ROWS = [json.loads(line) for line in (ROOT / "demo/legal_qa.jsonl").read_text(encoding="utf-8").splitlines()]
UNSEEN = [json.loads(line) for line in (Path(__file__).parent / "unseen_questions.jsonl").read_text(encoding="utf-8").splitlines()]
SHOWN = 3  # of the unseen questions, beside the stored ones
STORED = 40  # stored questions that are asked
RUN = 8  # words; an answer in which so many come twice in the same order repeats itself


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
def base_answers(chat, questions, temperature, no_repeat, batch_size=15):
    """The base's own answers to questions in its chat form, by transformers' generate."""
    base, answers = chat.model.base, []
    torch.manual_seed(SEED)
    for i in range(0, len(questions), batch_size):
        prompts = [base.encode(chat.template.prompt(question)) for question in questions[i:i + batch_size]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[base.eos] * (longest - len(p)) + p for p in prompts], device=base.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=base.device)
        processors = LogitsProcessorList([NoRepeat(no_repeat, longest)] if no_repeat else [])
        out = base.model.generate(ids, attention_mask=mask, logits_processor=processors, do_sample=True, temperature=temperature,
                                  top_k=SETTINGS["top_k"], max_new_tokens=SETTINGS["max_new_tokens"], pad_token_id=base.eos)
        answers += base.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return answers


def counts(answers, nearest):
    """Of answers to UNSEEN: (title named first, area named first, nearest stored answer of the right topic, of the right area,
    repetitions).

    Every stored answer names its area and topic first; what is nearest to an answer counts for models that do not.
    """
    areas = [row["Title"].partition(":")[0] for row in UNSEEN]
    found = [nearest(answer)[0] for answer in answers]
    return (sum(a.strip().startswith(row["Title"] + ".") for a, row in zip(answers, UNSEEN, strict=True)),
            sum(a.strip().startswith(area + ":") for a, area in zip(answers, areas, strict=True)),
            sum(title == row["Title"] for title, row in zip(found, UNSEEN, strict=True)),
            sum(title.partition(":")[0] == area for title, area in zip(found, areas, strict=True)),
            sum(map(repeats, answers)))


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


def main():
    options = app.parse_options(["--demo", *sys.argv[1:]])
    manifest = read_manifest(options.model_dir)
    if manifest is None:
        sys.exit("Nothing is trained yet; run python train_memory_decoder.py --demo first.")
    chat = Chat.open(options, manifest)
    print(f"Temperature {options.temperature:g}, top-k {SETTINGS['top_k']}, seed {SEED}, "
          f"no run of {options.no_repeat} tokens twice.\n")
    settings = {**SETTINGS, "temperature": options.temperature, "no_repeat": options.no_repeat}
    middle = ("automatic alpha", 0, AUTO)
    show(chat, settings, middle)

    rows = [example.row for example in chat.store.examples]
    nearest, questions = Nearest(rows), [row["Question"] for row in UNSEEN]
    answers = [ask(chat, question, settings, 0, AUTO) for question in questions]
    for question, answer in zip(questions, answers, strict=True):
        print(f"- **{question}** {cell(answer)}")
    told = [f"{nearest(question)[1]}\n\n{question}" for question in questions]
    print(f"\n| {len(UNSEEN)} questions that no row asks | topic named | area named | nearest: topic | nearest: area | repeats |\n"
          "|---|---:|---:|---:|---:|---:|")
    for name, said in (("base alone", base_answers(chat, questions, options.temperature, options.no_repeat)),
                       ("base, BM25's best answer in the prompt", base_answers(chat, told, options.temperature, options.no_repeat)),
                       ("automatic alpha", answers)):
        print(f"| {name} | " + " | ".join(map(str, counts(said, nearest))) + " |", flush=True)

    rows = rows[::len(rows) // STORED][:STORED]
    answers = [ask(chat, row["Question"], settings, 0, AUTO).split() for row in rows]
    begun = sum(a[:24] == row["Answer"].split()[:24] for a, row in zip(answers, rows, strict=True))
    whole = sum(a == row["Answer"].split() for a, row in zip(answers, rows, strict=True))
    print(f"\n{len(rows)} stored questions, automatic alpha: {begun} answers begin with the 24 stored words, {whole} are the "
          f"stored answer to its last word, {sum(repeats(' '.join(a)) for a in answers)} repeat themselves.")


if __name__ == "__main__":
    main()
