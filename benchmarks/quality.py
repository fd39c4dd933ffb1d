"""Held-out perplexity of memory, kNN-LM, LoRA and full tuning on the same base, rows and seconds.

    python benchmarks/quality.py --dataset train.jsonl --validation_dataset validation.jsonl --seeds 0 1 2

Runs script 1 with the options below, then tunes the base for as many seconds as the memory's stages took (reading, index,
search and fitting). Even held-out rows choose, odd ones report. Each seed draws its own training rows. Prints a Markdown table,
and as its last line all figures as JSON.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import baselines

import evaluation
import train_memory_decoder as script
from base_model import DEMO_MODEL, BaseLM
from corpus import Corpus
from texts import windows_of_sources

SETTINGS = {"max_examples": 250, "max_length": 512, "batch_size": 4, "context": 16}
RATES = {"LoRA": 1e-3, "full tuning": 1e-4}
COLUMNS = ("base", "knn_lm", "memory", "blend_logits", "blend_probabilities", "blend_auto")


def tuned(base, options, seconds):
    """{name: perplexity} of LoRA and full tuning, alone and mixed with the base by a gate as the memory is."""
    corpus = Corpus.read(options)
    windows, held = (windows_of_sources(base, part, corpus.templates(base), options.max_length)
                     for part in (corpus.examples, corpus.held))
    found, samples = {}, evaluation.sample_windows(base, options.max_length, options.seed)
    for name, rate in RATES.items():
        model, steps, passes = baselines.tune(base, windows, seconds, rate, name == "LoRA", options.seed)
        scores, own = (baselines.score_pair(base, model, part) for part in (held, samples))
        odd, evidence = scores["example"] % 2 == 1, evaluation.evidence_before(scores)
        gate = evaluation.fit_gate([(evaluation.half(scores, 0), evidence[~odd], 1),
                                    (own, evaluation.evidence_before(own), evaluation.SAMPLES_WEIGHT)])
        mixed, _ = evaluation.gated(gate, evaluation.half(scores, 1), evidence[odd])
        found |= {name: evaluation.perplexity(scores["memory"][odd]), f"{name}, automatic alpha": evaluation.perplexity(mixed)}
        print(f"{name}: {steps} steps, {passes} whole passes, {found[name]:.2f}", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", default=DEMO_MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=ROOT / "build/quality", help="where runs leave their artefacts")
    given, more = parser.parse_known_args()
    results = []
    for seed in given.seeds:
        folder = given.work / f"seed_{seed}"
        options = script.parse_options(["--base_model", given.base_model, "--seed", str(seed), "--output_dir", str(folder),
                                        *(word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))), *more])
        script.run(options)
        metrics = json.loads((folder / "metrics.json").read_text())
        if metrics["resumed"]:
            sys.exit(f"{folder} was made in several runs, so its seconds are not known; delete it and start again.")
        seconds = sum(value for stage, value in metrics["seconds"].items() if stage != "report")
        base = BaseLM.load(given.base_model, options.dtype, options.device)
        results.append({name: metrics["held_out"][name] for name in COLUMNS} | tuned(base, options, seconds)
                       | {"seconds": seconds})
    print(f"\n| {len(results)} seeds, {given.base_model} | mean | least | most | of the base's |\n|---|---:|---:|---:|---:|")
    for name in results[0]:
        values = np.array([result[name] for result in results])
        share = np.mean(values / [result["base"] for result in results])
        print(f"| {name} | {values.mean():.2f} | {values.min():.2f} | {values.max():.2f} | {share:.3f} |")
    print(json.dumps({"options": {k: str(v) for k, v in dataclasses.asdict(options).items()}, "results": results}))


if __name__ == "__main__":
    main()
