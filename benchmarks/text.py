"""Twenty held-out questions answered by base, LoRA and memory under the same settings, and what can be counted in the answers.

    python benchmarks/text.py --data DATA      # after quality.py; results/answers.md and results/text.json

The questions and the stored answers stay where the data is; answers.md names the case and shows what the models wrote.
"""

from collections import Counter

import common
import sacrebleu
from baselines import tune
from common import TEMPLATE, record, recorded, script
from quality import SETTINGS, options_of

from datastore import BaseLM, windows_of
from generation import Gate, MemoryAugmentedLM
from memory_decoder import MemoryDecoder

ASKED, COPIED = 20, 30  # questions; tokens in a row that count as copied
SAMPLING = {"temperature": 0.7, "top_k": 50, "max_new_tokens": 120, "seed": 0, "stops": TEMPLATE.stops}


def runs_of(ids, n):
    return [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]


def distinct(answers, n):
    """Different n-grams of words among all, over all answers."""
    grams = [gram for answer in answers for gram in runs_of(answer.split(), n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(answers, n=4):
    """Share of an answer's n-grams of words that stood in it before, averaged over the answers."""
    shares = []
    for answer in answers:
        counts = Counter(runs_of(answer.split(), n))
        shares.append(1 - len(counts) / max(1, sum(counts.values())))
    return sum(shares) / len(shares)


def copies(base, answer, known):
    return any(run in known for run in runs_of(base.encode(" " + answer)[1:], COPIED))


def count(base, answers, references, known):
    """The figures of one model's answers."""
    return {"distinct_1": distinct(answers, 1), "distinct_2": distinct(answers, 2), "repetition": repetition(answers),
            "chrf": sacrebleu.corpus_chrf(answers, [references]).score,
            "words": sum(len(a.split()) for a in answers) / len(answers),
            "copied": sum(copies(base, answer, known) for answer in answers) / len(answers)}


def main():
    given = common.arguments(__doc__.split("\n")[0])
    base, folder, headline = BaseLM.load(given.base_model), given.work / "memory_0", recorded("quality")["0"]
    rows, held = script.split_rows(options_of(given, 0), TEMPLATE)
    asked = held[1:2 * ASKED:2]  # odd ones: nothing was chosen on them
    texts = [TEMPLATE.render(row) for row in rows]
    known = {run for text in texts for run in runs_of(base.encode(text), COPIED)}
    decoder = MemoryDecoder.load(folder / "memory_decoder.pt")
    windows = windows_of(base, texts, TEMPLATE, SETTINGS["max_length"])
    lora, *_ = tune(base, windows, None, headline["LoRA"]["lr"], lora=True, most=headline["LoRA"]["steps"])
    chosen = headline["chosen"]
    memory = MemoryAugmentedLM(base, decoder, TEMPLATE.header, Gate(**chosen["gate"]))
    models = {"base": (memory, 0, "probabilities"), "LoRA": (MemoryAugmentedLM(lora, decoder, TEMPLATE.header), 0, "probabilities"),
              "blend": (memory, chosen["alpha_probabilities"], "probabilities"), "automatic alpha": (memory, 0, "auto")}
    written = {name: [answer(model, row["Question"], alpha, rule) for row in asked]
               for name, (model, alpha, rule) in models.items()}
    references = [row["Answer"] for row in asked]
    for name, answers in written.items():
        record("text", name, count(base, answers, references, known))
    record("text", "stored answers", count(base, references, references, known))
    save(asked, written, base, known)


def answer(model, question, alpha, rule):
    return "".join(step.text for step in model.stream(TEMPLATE.prompt(question), alpha, rule=rule, **SAMPLING))


def save(asked, written, base, known):
    """answers.md: an answer that copies a training passage is not shown, since the passage is not ours."""
    lines = ["# What base, LoRA and memory answer to twenty held-out questions\n",
             "Made by `benchmarks/text.py`: temperature 0.7, top-k 50, at most 120 tokens, seed 0; the prompt holds the question, "
             "which stays in the data, as row number below. Nothing was edited.\n"]
    for number, row in enumerate(asked):
        lines.append(f"\n## Row {2 * number + 1}: {row['Title']}\n")
        for name, answers in written.items():
            text = "*(copies a training passage)*" if copies(base, answers[number], known) else " ".join(answers[number].split())
            lines.append(f"**{name}:** {text}\n")
    (common.RESULTS / "answers.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
