"""What the embedded default answers at alpha 0, at the page's own setting and at 1: same questions, same seed, side by side.

    python benchmarks/demo_answers.py > answers.md    # after train_memory_decoder.py --demo

Asks through the page's own code with the page's own defaults, and writes Markdown.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
from generation import AUTO, RULES
from memory_decoder import read_manifest

SEED = 0
SETTINGS = {"top_k": 50, "max_new_tokens": 256, "k": 8, "seed": SEED}
AREAS = ("Landlord and tenant", "Employment", "Consumer and refunds", "Small claims and civil procedure", "Family",
         "Wills and probate", "Police encounters", "Debt and bankruptcy", "Intellectual property")
UNSEEN = [json.loads(line) for line in (Path(__file__).parent / "unseen_questions.jsonl").read_text(encoding="utf-8").splitlines()]
SHOWN = 3  # of the unseen questions, beside the stored ones


def stored_questions(store):
    """The shortest question of a remembered text in each of the areas, as (area, question)."""
    rows = [json.loads(line) for line in (ROOT / "demo/legal_qa.jsonl").read_text(encoding="utf-8").splitlines()]
    remembered = "\n".join(store.texts)
    for area in AREAS:
        questions = [row["Question"] for row in rows if row["Title"].startswith(area) and row["Answer"] in remembered]
        yield area, min(questions, key=len)


def recalled(chat, settings, alpha, most=40):
    """Of how many remembered questions the answer begins with the 24 words stored with them, is theirs to the end, all asked."""
    texts = chat.store.texts[::len(chat.store.texts) // most][:most]
    pairs = [text.removeprefix(chat.template.header).split("\nAnswer:") for text in texts]
    answers = [list(chat.answer(question, [], alpha, **settings))[-1][0].split() for question, _ in pairs]
    words = [stored.split() for _, stored in pairs]
    begun = sum(a[:24] == b[:24] for a, b in zip(answers, words, strict=True))
    return begun, sum(a == b for a, b in zip(answers, words, strict=True)), len(words)


def shared(answer, stored):
    """The largest share of an answer's sequences of six words that stand in one of the stored answers, 0 to 1."""
    words = answer.split()
    parts = [" ".join(words[i:i + 6]) for i in range(len(words) - 5)]
    return max(sum(part in text for part in parts) for text in stored) / max(1, len(parts))


def unseen(chat, settings, alpha):
    """Ask what no row asks, and print each answer's beginning; {set: (right topic, right area, stored whole, questions)}.

    Every stored answer names its area and topic first, so an answer's own first words say where it comes from.
    """
    counts, stored = {}, [cell(text) for text in chat.store.texts]
    for row in UNSEEN:
        answer = cell(list(chat.answer(row["Question"], [], alpha, **{**settings, "max_new_tokens": 90}))[-1][0])
        found = [answer.startswith(row["Title"] + "."), answer.startswith(row["Title"].partition(":")[0] + ":"),
                 shared(answer, stored) > 0.95, True]
        counts[row["Set"]] = [n + hit for n, hit in zip(counts.get(row["Set"], [0] * 4), found, strict=True)]
        print(f"- **{row['Question']}** ({row['Title']}) {answer}", flush=True)
    return counts


def cell(answer):
    return " ".join(answer.split()).replace("|", "\\|")


def main():
    options = app.parse_options(["--demo", *sys.argv[1:]])
    manifest = read_manifest(options.model_dir)
    if manifest is None:
        sys.exit("Nothing is trained yet; run python train_memory_decoder.py --demo first.")
    chat = app.Chat.open(options, manifest)
    print(f"Temperature {options.temperature:g}, top-k {SETTINGS['top_k']}, seed {SEED}, blend of {options.rule}.\n")
    settings = {**SETTINGS, "temperature": options.temperature}
    middle = ("automatic alpha", 0, AUTO)
    if options.rule != AUTO:
        alpha = chat.chosen[f"alpha_{options.rule}"]
        middle = (f"alpha {alpha:g}", alpha, options.rule)
    columns = [("alpha 0", 0, RULES[1]), middle, ("alpha 1", 1, RULES[1])]
    asked = [*stored_questions(chat.store), *(("not in the file", row["Question"]) for row in UNSEEN[:SHOWN])]
    for number, (origin, question) in enumerate(asked, 1):
        print(f"**{number}. {question}** ({origin})\n")
        print("| " + " | ".join(name for name, *_ in columns) + " |\n|" + "---|" * len(columns))
        answers = [list(chat.answer(question, [], alpha, rule=rule, **settings))[-1][0] for _, alpha, rule in columns]
        print("| " + " | ".join(map(cell, answers)) + " |\n", flush=True)
    name, alpha, rule = middle
    settings |= {"rule": rule}
    print(f"Asked by no row, {name}:\n")
    for which, (topic, area, whole, asked) in unseen(chat, settings, alpha).items():
        print(f"\n{which}: of {asked}, {topic} from the right topic, {area} from the right area, "
              f"{whole} in the words of one stored answer.")
    begun, whole, asked = recalled(chat, settings, alpha)
    print(f"\nRecalled, {name}: {begun} of {asked} questions from the file by their first 24 words, {whole} to the last word.")


if __name__ == "__main__":
    main()
