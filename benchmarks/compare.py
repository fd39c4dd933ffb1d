"""A memory against what one would take in its place, on the same base model, rows and held-out text.

    python benchmarks/compare.py --dataset train.jsonl --validation_dataset validation.jsonl --elsewhere wikitext2_valid.txt
    python benchmarks/compare.py --work build/compare/demo --elsewhere wikitext2_valid.txt --demo    # the demo's memory

For each seed: trains a memory with script 1, then measures every rival. LoRA and full tuning get as many seconds as the memory
took. The figures stay in <work>/seed_N.json, and the same command goes on from there. Even held-out rows choose every setting, odd
ones report. Each seed draws its own training rows. Prints a table. `python benchmarks/plots.py` draws them.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluation
import train_memory_decoder as script
from base_model import DEMO_MODEL, BaseLM
from corpus import Corpus
from datastore import Datastore
from generation import Gate, token_bytes
from memory_decoder import MemoryDecoder, read_manifest
from rivals import RIVALS
from support.shards import write_atomically
from texts import encode_row, entries_of, make_windows, windows_of_sources

SETTINGS = {"max_examples": 250, "max_length": 512, "batch_size": 4, "context": 16}
HELD_ROWS = slice(40, 80)  # of the validation rows; the first 40 were looked at while settings were chosen
CHARACTERS = 30_000  # of the text from elsewhere, whose paragraphs are examples of their own
DRAWS = 2000  # of the bootstrap over held-out rows


class Part:
    """Windows to score, with the log probabilities of base, memory and blends."""

    def __init__(self, bench, windows):
        self.windows, self.entries = windows, entries_of(windows)
        self.scores = evaluation.score_positions(bench.base, bench.decoder, windows, bench.options.batch_size, sweep=True)
        self.base, self.memory = self.scores["base"], self.scores["memory"]
        self.evidence = evaluation.evidence_before(self.scores)


def paragraphs(text):
    """The paragraphs of a text, without headings and empty lines."""
    return [line.strip() for line in text.split("\n") if len(line.strip()) >= 100]


class Bench:
    """One trained memory and the texts on which it and its rivals are measured."""

    def __init__(self, given, elsewhere, work, results):
        """given: options of script 1, as words. elsewhere: file of the other text. results: what is measured already."""
        self.given, self.elsewhere, self.work, self.results = given, elsewhere, work, results
        self.options = options = script.parse_options(given)
        script.run(options)
        self.folder = Path(options.output_dir)
        self.manifest, self.metrics = read_manifest(self.folder), json.loads((self.folder / "metrics.json").read_text())
        if self.metrics["resumed"]:
            sys.exit(f"{self.folder} was made in several runs, so its seconds are not known; delete it and start again.")
        self.seconds = {stage: value for stage, value in self.metrics["seconds"].items() if stage != "report"}
        self.made = {"seconds": sum(self.seconds.values()), "size": (self.folder / "memory_decoder.pt").stat().st_size}
        self.base = BaseLM.load(options.base_model, options.dtype, options.device)
        self.decoder = MemoryDecoder.load(self.folder / "memory_decoder.pt").to(self.base.device)
        self.store, self.gate = Datastore.open(self.folder), Gate(**self.manifest["chosen"]["gate"])
        self.read_texts()

    def read_texts(self):
        corpus, base = Corpus.open(self.folder, self.manifest), self.base
        self.templates = corpus.templates(base)
        self.learned, held = self.windows(corpus.examples), self.windows(corpus.held)
        self.rows, self.held_rows = self.ids(corpus.examples), self.ids(corpus.held)
        self.other_rows = [base.encode(text) for text in paragraphs(Path(self.elsewhere).read_text(encoding="utf-8")[:CHARACTERS])]
        other = [w for number, ids in enumerate(self.other_rows) for w in make_windows(number, ids, self.options.max_length, 0)]
        self.held, self.other = self.part(held), self.part(other)
        self.own = evaluation.sample_windows(base, self.options.max_length, self.options.seed)
        self.report = self.held.entries.example % 2 == 1
        sizes = {token: len(token_bytes(base.tokenizer, token)) for token in set(self.held.entries.values.tolist())}
        self.bytes = sum(sizes[token] for token in self.held.entries.values[self.report].tolist())

    def part(self, windows):
        return Part(self, windows)

    def setting(self):
        return {"base_model": self.options.base_model, "rows": len(self.rows), "entries": len(self.store), "seconds": self.seconds,
                "positions": int(self.report.sum()), "examples": len(set(self.held.entries.example[self.report].tolist())),
                "bytes": self.bytes, "threads": torch.get_num_threads(), "elsewhere": len(self.other.base),
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
        """A row of the table, from log probabilities of the held-out positions and of the text from elsewhere.

        nats: of each reported example, and its positions. size: bytes to keep beside the base, as they are stored.
        """
        held, example = held[self.report].astype(float), self.held.entries.example[self.report]
        nats = [[round(-held[example == number].sum(), 4), int((example == number).sum())] for number in np.unique(example)]
        return {"nats": nats, "perplexity": evaluation.perplexity(held), "bits_a_byte": float(-held.sum() / np.log(2) / self.bytes),
                "elsewhere": evaluation.perplexity(other), "seconds": round(seconds, 1), "bytes": int(size), "note": note}

    def chosen(self, table, other, choices, note, **more):
        """The row of the setting, a column of both tables, with the highest likelihood on the choosing half."""
        best = int(np.argmax(table[~self.report].mean(0, dtype=float)))
        return self.row(table[:, best], other[:, best], note=note.format(choices[best]), **more)


def measure(given, work, seed, elsewhere, wanted):
    """Everything of one seed, as {rival: {row: figures}}; goes on from <work>/seed_N.json."""
    file, key = work / f"seed_{seed}.json", [*given, hashlib.sha256(Path(elsewhere).read_bytes()).hexdigest()]
    results = json.loads(file.read_text()) if file.exists() else {"given": key}
    if results["given"] != key:
        sys.exit(f"{file} was measured with other options or another text; name another --work.")
    missing = [name for name in wanted if name not in results]
    if missing:
        bench = Bench(given, elsewhere, work, results)
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


def against(found, auto):
    """Perplexity over that of the automatic alpha, with a 95% interval by a bootstrap over held-out rows, as text."""
    nats, counts = (np.array([[a[0] - b[0], a[1]] for row, other in zip(found, auto, strict=False)
                              for a, b in zip(row["nats"], other["nats"], strict=True)]).T)
    picks = np.random.default_rng(0).integers(0, len(nats), (DRAWS, len(nats)))
    low, high = np.quantile(np.exp(nats[picks].sum(1) / counts[picks].sum(1)), (0.025, 0.975))
    return f"{np.exp(nats.sum() / counts.sum()):.3f} ({low:.3f} to {high:.3f})"


def table(results):
    """A Markdown table of what each way predicts and what it costs: means over seeds."""
    rows, lines = rows_of(results), []
    for name, found in rows.items():
        def mean(key, form, found=found):
            values = [row[key] for row in found if key in row]
            return format(np.mean(values), form) if values else ""
        scored = [row for row in found if "share" in row]
        shares = [row["share"] for row in scored]
        spread = f"{min(shares):.3f} to {max(shares):.3f}" if len(shares) > 1 else ""
        ratio = against(scored, [row for row in rows["automatic alpha"] if "share" in row])
        notes = ", or ".join(dict.fromkeys(row["note"] for row in found if row.get("note")))
        lines.append([name, mean("perplexity", ".2f"), mean("share", ".3f"), spread, ratio, mean("bits_a_byte", ".3f"),
                      mean("cost", ".3f"), mean("seconds", ".0f"), mean("megabytes", ".1f"), mean("milliseconds_a_token", ".0f"),
                      mean("prompt_milliseconds", ".0f"), notes])
    return markdown(["", "perplexity", "of the base's", "range", "over automatic alpha's (95%)", "bits a byte", "elsewhere",
                     "seconds", "MB", "ms a token", "ms to read the prompt", "chosen"], lines)


def markdown(names, rows):
    """A Markdown table of the columns that are not empty."""
    keep = [i for i in range(len(names)) if i == 0 or any(row[i] for row in rows)]
    lines = [[names[i] for i in keep], ["---"] + ["---:"] * (len(keep) - 1), *([row[i] for i in keep] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other options go to train_memory_decoder.py.")
    parser.add_argument("--base_model", default=DEMO_MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/compare/rows", help="where memories and figures are kept")
    parser.add_argument("--validation_dataset", type=Path, help=f"JSONL; rows {HELD_ROWS.start} to {HELD_ROWS.stop} are held out")
    parser.add_argument("--elsewhere", required=True, help="a text of another domain, to measure what each way costs there")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    given, more = parser.parse_known_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.validation_dataset:
        lines = given.validation_dataset.read_text(encoding="utf-8").split("\n")[HELD_ROWS]
        (given.work / "held.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        more += ["--validation_dataset", str(given.work / "held.jsonl")]
    results = []
    for seed in given.seeds:
        words = ["--output_dir", str(given.work / f"seed_{seed}"), "--seed", str(seed)]
        if "--demo" not in more:
            words += ["--base_model", given.base_model, *(w for name, value in SETTINGS.items() for w in (f"--{name}", str(value)))]
        results.append(measure([*words, *more], given.work, seed, given.elsewhere, given.rivals))
    print("\n" + table(results))


if __name__ == "__main__":
    main()
