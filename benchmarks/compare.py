"""A memory against what one would take in its place: same base model, rows, held-out text and seconds.

    python benchmarks/compare.py --dataset train.jsonl --validation_dataset validation.jsonl --elsewhere wikitext2_valid.txt
    python benchmarks/compare.py --work build/compare/demo --elsewhere wikitext2_valid.txt --demo    # the demo's memory

For each seed: trains a memory with script 1, then measures every rival. What is measured stays in <work>/seed_N.json, and the same
command goes on from there. Even held-out rows choose every setting, odd ones report. Each seed draws its own training rows.
Prints the tables. `python benchmarks/plots.py` draws them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rivals import RIVALS

import evaluation
import train_memory_decoder as script
from base_model import DEMO_MODEL, BaseLM
from corpus import Corpus
from datastore import Datastore, write_atomically
from generation import Gate, token_bytes
from memory_decoder import MemoryDecoder, read_manifest
from texts import encode_row, entries_of, make_windows, windows_of_sources

SETTINGS = {"max_examples": 250, "max_length": 512, "batch_size": 4, "context": 16}
HELD_ROWS = 40  # of the validation rows: half choose, half report
CHARACTERS = 30_000  # of the text from elsewhere


class Part:
    """Windows to score, with the log probabilities that base, memory and their blends give."""

    def __init__(self, bench, windows):
        self.windows, self.entries = windows, entries_of(windows)
        self.scores = evaluation.score_positions(bench.base, bench.decoder, windows, bench.options.batch_size, sweep=True)
        self.base, self.memory = self.scores["base"], self.scores["memory"]
        self.evidence = evaluation.evidence_before(self.scores)


class Bench:
    """One trained memory and the texts on which it and its rivals are measured."""

    def __init__(self, given, elsewhere, work):
        """given: the options of script 1, as words; elsewhere: the file of the other text; work: where tuned models are kept."""
        self.given, self.work, options = given, work, script.parse_options(given)
        script.run(options)
        self.options, self.folder = options, Path(options.output_dir)
        self.manifest, self.metrics = read_manifest(self.folder), json.loads((self.folder / "metrics.json").read_text())
        if self.metrics["resumed"]:
            sys.exit(f"{self.folder} was made in several runs, so its seconds are not known; delete it and start again.")
        self.seconds = {stage: value for stage, value in self.metrics["seconds"].items() if stage != "report"}
        self.base = BaseLM.load(options.base_model, options.dtype, options.device)
        self.decoder = MemoryDecoder.load(self.folder / "memory_decoder.pt").to(self.base.device)
        self.store, self.gate = Datastore.open(self.folder), Gate(**self.manifest["chosen"]["gate"])
        self.corpus = Corpus.open(self.folder, self.manifest)
        self.templates = self.corpus.templates(self.base)
        self.learned = self.windows(self.corpus.examples)
        self.rows, self.held_rows = self.ids(self.corpus.examples), self.ids(self.corpus.held)
        self.other_ids = self.base.encode(Path(elsewhere).read_text(encoding="utf-8")[:CHARACTERS])
        self.held, self.other = (self.part(windows) for windows in (
            self.windows(self.corpus.held), make_windows(0, self.other_ids, options.max_length, 0)))
        self.report = self.held.entries.example % 2 == 1
        self.own = evaluation.sample_windows(self.base, options.max_length, options.seed)
        sizes = {token: len(token_bytes(self.base.tokenizer, token)) for token in set(self.held.entries.values.tolist())}
        self.bytes = sum(sizes[token] for token in self.held.entries.values[self.report].tolist())

    def part(self, windows):
        return Part(self, windows)

    def setting(self):
        return {"base_model": self.options.base_model, "rows": len(self.rows), "entries": len(self.store), "seconds": self.seconds,
                "positions": int(self.report.sum()), "bytes": self.bytes, "threads": torch.get_num_threads(),
                "alpha_sweep": self.metrics["alpha_sweep"]}

    def stage(self, name):
        """The folder of a stage of the training."""
        return self.folder / "stages" / self.manifest["stages"][name]

    def windows(self, examples):
        return windows_of_sources(self.base, examples, self.templates, self.options.max_length)

    def ids(self, examples):
        """Each example's token ids, whole."""
        return [encode_row(self.base, self.templates[example.source], example.row) for example in examples]

    def row(self, held, other, seconds=0.0, size=0, note=""):
        """A row of the table, from log probabilities of the held-out positions and of the text from elsewhere."""
        held = held[self.report]
        return {"perplexity": evaluation.perplexity(held), "bits_a_byte": float(-held.sum(dtype=float) / np.log(2) / self.bytes),
                "elsewhere": evaluation.perplexity(other), "seconds": round(seconds, 1), "bytes": int(size), "note": note}

    def chosen(self, table, other, choices, note, **more):
        """The row of the column that gives the choosing half the most probability."""
        best = int(np.argmax(table[~self.report].mean(0, dtype=float)))
        return self.row(table[:, best], other[:, best], note=note.format(choices[best]), **more)


def measure(given, work, seed, elsewhere, wanted):
    """Everything of one seed, as {rival: {row: figures}}; goes on from <work>/seed_N.json."""
    file = work / f"seed_{seed}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    missing = [name for name in wanted if name not in results]
    if missing:
        bench = Bench(given, elsewhere, work)
        results["setting"] = bench.setting()
    for name in missing:
        began = time.monotonic()
        results[name] = RIVALS[name](bench)
        write_atomically(file, json.dumps(results, indent=1) + "\n")
        print(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(results[name])}", flush=True)
    return results


def rows_of(results):
    """{row: its figures under every seed}, with the shares of the base's perplexity."""
    rows = {}
    for result in results:
        base = result["memory"]["base"]
        for name, row in ((name, row) for part in RIVALS for name, row in result.get(part, {}).items()):
            shares = {"share": row["perplexity"] / base["perplexity"], "cost": row["elsewhere"] / base["elsewhere"],
                      "megabytes": row["bytes"] / 1e6} if "perplexity" in row else {}
            rows.setdefault(name, []).append(row | shares)
    return rows


def table(results):
    """The Markdown table: means over seeds, and the range of the shares of the base's perplexity."""
    columns = {"perplexity": ".2f", "share": ".3f", "range": "", "bits_a_byte": ".3f", "cost": ".3f", "seconds": ".0f",
               "megabytes": ".1f", "milliseconds_a_token": ".0f"}
    lines = ["| | perplexity | of the base's | range | bits a byte | elsewhere | seconds | MB | ms a token | chosen |",
             "|---|---:|---:|---|---:|---:|---:|---:|---:|---|"]
    for name, found in rows_of(results).items():
        cells = {key: format(np.mean([row[key] for row in found if key in row]), form) for key, form in columns.items()
                 if any(key in row for row in found)}
        shares = [row["share"] for row in found if "share" in row]
        cells["range"] = f"{min(shares):.3f} to {max(shares):.3f}" if len(shares) > 1 else ""
        note = next((row["note"] for row in found if row.get("note")), "")
        lines.append(f"| {name} | {' | '.join(cells.get(key, '') for key in columns)} | {note} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other options go to train_memory_decoder.py.")
    parser.add_argument("--base_model", default=DEMO_MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/compare/rows", help="where memories and figures are kept")
    parser.add_argument("--validation_dataset", type=Path, help=f"JSONL; its first {HELD_ROWS} rows are held out")
    parser.add_argument("--elsewhere", required=True, help="a text of another kind, on which nothing shall get worse")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    given, more = parser.parse_known_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.validation_dataset:
        lines = given.validation_dataset.read_text(encoding="utf-8").split("\n")[:HELD_ROWS]
        (given.work / "held.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        more += ["--validation_dataset", str(given.work / "held.jsonl")]
    results = []
    for seed in given.seeds:
        words = ["--demo"] if "--demo" in more else [
            "--base_model", given.base_model, "--output_dir", str(given.work / f"seed_{seed}"),
            *(word for name, value in SETTINGS.items() for word in (f"--{name}", str(value)))]
        results.append(measure([*words, "--seed", str(seed), *more], given.work, seed, given.elsewhere, given.rivals))
    print("\n" + table(results))


if __name__ == "__main__":
    main()
