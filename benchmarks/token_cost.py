"""Where a token's time goes: base, memory, gate, candidates for the page, and the search of the rule kNN-LM.

    python benchmarks/token_cost.py    # after train_memory_decoder.py --demo, with nothing else running

Writes the same answer several times under the rules auto and kNN-LM, and prints medians in milliseconds a token.
"""

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
import generation
from chat import Chat
from generation import AUTO, KNN
from memory_decoder import read_manifest

QUESTION, TOKENS, ROUNDS = "Can my landlord keep my deposit?", 100, 5


def timed(owner, name, part, spent):
    """Let owner.name add its seconds to spent[part]."""
    real = getattr(owner, name)

    def wrapped(*arguments, **more):
        began = time.perf_counter()
        result = real(*arguments, **more)
        spent[part].append(time.perf_counter() - began)
        return result
    setattr(owner, name, wrapped)


def main():
    options = app.parse_options(["--demo", *sys.argv[1:]])
    manifest = read_manifest(options.model_dir)
    if manifest is None:
        sys.exit("Nothing is trained yet; run python train_memory_decoder.py --demo first.")
    chat, spent = Chat.open(options, manifest), defaultdict(list)
    model = chat.model
    for owner, name, part in ((model.base, "hidden", "base"), (model.base, "logits", "base's head"),
                              (model.decoder, "features", "memory"), (model.decoder, "log_probabilities", "memory's head"),
                              (generation, "opinions", "what the gate reads"), (generation, "compare", "candidates"),
                              (model, "search", "search")):
        timed(owner, name, part, spent)
    print("| ms a token | auto | kNN-LM |\n|---|---:|---:|")
    columns = {}
    for rule in (AUTO, KNN):
        spent.clear()
        for _ in range(ROUNDS):
            answer = chat.begin(QUESTION, rule=rule, alpha=0.5, temperature=0, seed=0, max_new_tokens=TOKENS, no_repeat=8)
            began = time.perf_counter()
            for _ in chat.write(answer):
                spent["whole"].append(time.perf_counter() - began)
                began = time.perf_counter()
        columns[rule] = {part: 1000 * statistics.median(times) for part, times in spent.items()}
    for part in sorted({*columns[AUTO], *columns[KNN]}, key=lambda part: -columns[AUTO].get(part, 0)):
        cells = [f"{column[part]:.2f}" if part in column else "-" for column in columns.values()]
        print(f"| {part} | {' | '.join(cells)} |")
    print(f"\nCandidates take {columns[AUTO]['candidates'] / columns[AUTO]['whole']:.1%} of a token's time.")


if __name__ == "__main__":
    main()
