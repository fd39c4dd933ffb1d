"""How often the nearest stored text is on a new question's topic: by the demo's Topic, by mean embeddings, by BM25.

    python benchmarks/topics.py      # half a minute on two cores; needs benchmarks/requirements.txt, no training

New are the 45 questions of unseen_questions.jsonl, and every stored question once, with all rows of its answer taken out: then
only the topic's three other answers can be right.
"""

import json
import sys
from pathlib import Path

import bm25s
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datastore import BaseLM, Template, entries_of, windows_of
from memory_decoder import Topic
from train_memory_decoder import DEMO

FOLDS = 8


def by_topic(base, texts, prompts, template):
    """For each prompt the text with the nearest centre, of a Topic fitted to the texts."""
    windows = windows_of(base, texts, template, DEMO["max_length"])
    entries = entries_of(windows)
    topic = Topic(base.vocabulary, len(windows), 1)
    topic.fit(base.head.weight, entries.read, Topic.windows(entries.offsets))
    sums = torch.stack([topic.table[read_of(base, prompt, template)].sum(0) for prompt in prompts])
    return entries.example[entries.offsets[(sums @ topic.centres.T).argmax(1).numpy()]]


def by_embeddings(base, texts, prompts, template):
    """The same by the cosine of plain mean embeddings."""
    def means(texts):
        return torch.stack([base.head.weight[read_of(base, text, template)].mean(0) for text in texts])

    return F.cosine_similarity(means(prompts)[:, None], means(texts)[None], dim=-1).argmax(1).numpy()


def by_bm25(base, texts, prompts, template):
    """The same by BM25 over whole texts, in the base model's tokens."""
    index = bm25s.BM25()
    index.index([[str(i) for i in base.encode(text)] for text in texts], show_progress=False)
    queries = [[str(i) for i in set(read_of(base, prompt, template).tolist())] for prompt in prompts]
    found, _ = index.retrieve(queries, k=1, show_progress=False)
    return found[:, 0]


def read_of(base, text, template):
    """The tokens that a memory reads of a text: all behind the header."""
    return torch.tensor(base.encode(text)[len(base.encode(template.header)):])


def main():
    base, template = BaseLM.load(DEMO["base_model"], device="cpu"), Template(DEMO["template"])
    rows = [json.loads(line) for line in Path(DEMO["dataset"]).read_text(encoding="utf-8").splitlines()]
    unseen = [json.loads(line) for line in (ROOT / "benchmarks/unseen_questions.jsonl").read_text(encoding="utf-8").splitlines()]
    texts, titles = [template.render(row) for row in rows], np.array([row["Title"] for row in rows])
    answers = np.unique([row["Answer"] for row in rows], return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(answers.max() + 1)[answers] % FOLDS
    print("| by | of 45 unseen questions, right topic, area | stored questions without their answer: topic, area |\n|---|---|---|")
    for name, find in (("Topic", by_topic), ("mean embedding", by_embeddings), ("BM25", by_bm25)):
        scores = []
        groups = [(np.ones(len(rows), bool), [row["Question"] for row in unseen], [row["Title"] for row in unseen])]
        groups += [(fold != n, [row["Question"] for row, f in zip(rows, fold, strict=True) if f == n], titles[fold == n])
                   for n in range(FOLDS)]
        for known, questions, wanted in groups:
            prompts = [template.prompt(question) for question in questions]
            found = titles[known][find(base, [t for t, k in zip(texts, known, strict=True) if k], prompts, template)]
            scores.append([(a == b, a.split(":")[0] == b.split(":")[0]) for a, b in zip(found, wanted, strict=True)])
        (topic, area), rest = np.sum(scores[0], 0), np.concatenate(scores[1:]).mean(0)
        print(f"| {name} | {topic}, {area} | {rest[0]:.3f}, {rest[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
