"""The rivals of benchmarks/compare.py, one function each: a Bench -> {name of a table's row: its figures}."""

import itertools
import json
import os
import shutil
import time

import numpy as np
import torch

import evaluation
import retrieval
import rules
import train_memory_decoder as script
import training
import tuned
from datastore import Datastore, open_keys
from generation import KNN, MemoryAugmentedLM, Reading, Settings, blend, opinions
from index import build_index
from memory_decoder import MemoryDecoder
from texts import entries_of

LEARNING_RATES = {"LoRA": 1e-3, "full tuning": 1e-4}
KNN_LM, NGRAM, PROMPT = "base + kNN (kNN-LM)", "base + n-gram (infini-gram)", "base, one BM25 row in the prompt"
CORRECTION, ROUTER = "memory as a correction (proxy tuning)", "memory, learned router"
UNTAUGHT, ORIGINAL = "trained without neighbours", "original's settings"
TOKENS, PROMPTS = 48, 4  # of the answers whose time is measured


def alphas():
    return [f"{alpha:.2g}" for alpha in evaluation.ALPHAS]


def blend_rows(bench, prefix=""):
    """The rows of a memory: alone, under both rules at their best alpha, and under its gate."""
    held, other, made = bench.held, bench.other, bench.made
    auto = [evaluation.gated(bench.gate, part.scores, part.evidence) for part in (held, other)]
    note = f"alpha {auto[0][1][bench.report].mean():.2f} on average, elsewhere {auto[1][1].mean():.2f}"
    tables = {"logits": [part.scores["blend_logits"] for part in (held, other)],
              "probabilities": [evaluation.mix_probabilities(part.base, part.memory) for part in (held, other)]}
    return {prefix + "memory alone": bench.row(held.memory, other.memory, **made),
            **{f"{prefix}blend of {rule}": bench.chosen(*pair, alphas(), "alpha {}", **made) for rule, pair in tables.items()},
            prefix + "automatic alpha": bench.row(auto[0][0], auto[1][0], note=note, **made)}


def memory_rows(bench):
    return {"base": bench.row(bench.held.base, bench.other.base)} | blend_rows(bench)


def knn_rows(bench):
    """Exact search, so that no index stands between kNN-LM and its best setting."""
    keys = open_keys(bench.stage("datastore") / "keys.f16", bench.base.width)
    store = bench.store
    exact = Datastore(*build_index(keys, "Flat"), store.values, store.example, store.position, store.examples)
    temperature = bench.metrics["training_knn_temperature"]
    held, other = (retrieval.knn_table(bench.base, exact, part.windows, temperature, bench.options.batch_size)
                   for part in (bench.held, bench.other))
    number, share = retrieval.best_knn(bench.held.base[~bench.report], held[~bench.report])
    k, factor = list(itertools.product(retrieval.NEIGHBOURS, retrieval.FACTORS))[number]
    size = sum((bench.folder / name).stat().st_size for name in ("faiss_index.bin", "datastore_values.npy"))
    return {KNN_LM: bench.row(retrieval.mixed(bench.held.base, held[:, number], share),
                              retrieval.mixed(bench.other.base, other[:, number], share),
                              bench.seconds["datastore"] + bench.seconds["index"], size,
                              f"K {k}, temperature {factor * temperature:.4g}, lambda {share:.2f}")
            | {"chosen": [k, factor * temperature, share]}}


def ngram_rows(bench):
    began = time.monotonic()
    ngram = retrieval.NGram(bench.rows)
    seconds, size = time.monotonic() - began, 8 * len(ngram.ids)
    held, sparse = retrieval.ngram_scores(ngram, bench.held_rows, bench.held.windows)
    other, other_sparse = retrieval.ngram_scores(ngram, bench.other_rows, bench.other.windows)
    shares = [retrieval.best_share(bench.held.base[mask], held[mask]) for mask in (~bench.report & sparse, ~bench.report & ~sparse)]
    mixed = [retrieval.mixed(base, scores, np.where(mask, *shares)) for base, scores, mask in (
        (bench.held.base, held, sparse), (bench.other.base, other, other_sparse))]
    note = "lambda {:.2f} where only one token ever followed, else {:.2f}".format(*shares)
    return {NGRAM: bench.row(*mixed, seconds, size, note)}


def prompt_rows(bench):
    began = time.monotonic()
    finder = retrieval.InPrompt(bench.base, bench.rows, bench.options.max_length)
    made = {"seconds": time.monotonic() - began, "size": sum(map(len, map(str.encode, finder.texts)))}
    told, query = [], finder.in_query(bench.held.windows)
    for part in (bench.held, bench.other):
        found = rules.base_scores(bench.base, finder.windows(part.windows), 1)
        told.append(np.where(finder.in_query(part.windows), part.base, found))
    mixed = [evaluation.mix_probabilities(bench.held.base, told[0]), evaluation.mix_probabilities(bench.other.base, told[1])]
    note = f"{query[bench.report].mean():.0%} of the positions come before the row: base alone"
    return {PROMPT: bench.row(*told, note=note, **made),
            f"{PROMPT}, best alpha": bench.chosen(*mixed, alphas(), "alpha {}", **made)}


def correction_rows(bench):
    keys = open_keys(bench.stage("datastore") / "keys.f16", bench.base.width)
    fresh = training.make_decoder(bench.options, bench.base, keys, entries_of(bench.learned))
    assert torch.equal(fresh.seen.cpu(), bench.decoder.seen.cpu())
    tables = [rules.correction_table(bench.base, bench.decoder, fresh, part.windows, bench.options.batch_size)
              for part in (bench.held, bench.other)]
    made = bench.made | {"size": 2 * bench.made["size"]}
    return {CORRECTION: bench.chosen(*tables, [f"{weight:.1f}" for weight in rules.WEIGHTS], "weight {}", **made)}


def router_rows(bench):
    began, own = time.monotonic(), bench.part(bench.own)
    held, other, of_base = (rules.router_part(rules.states(bench.base, bench.decoder, part.windows, bench.options.batch_size),
                                              part.scores, part.evidence) for part in (bench.held, bench.other, own))
    choose = torch.from_numpy(~bench.report)
    router = rules.fit_router(tuple(x[choose] for x in held), bench.held.entries.example[~bench.report], of_base,
                              evaluation.SAMPLES_WEIGHT, bench.options.seed)
    numbers = sum(p.numel() for p in router.parameters())
    made = {"seconds": bench.made["seconds"] + time.monotonic() - began, "size": bench.made["size"] + 4 * numbers}
    return {ROUTER: bench.row(router.mixed(held), router.mixed(other), note=f"{numbers:,} numbers", **made)}


def tuned_rows(bench, name):
    seconds = sum(bench.seconds.values())
    model, trained, steps, passes = tuned.tune(bench.base, bench.learned, seconds, LEARNING_RATES[name], name == "LoRA",
                                               bench.options.seed)
    if name == "LoRA":  # benchmarks/answers.py asks it
        folder = bench.work / f"lora_{bench.options.seed}"
        model.model.save_pretrained(folder), bench.base.tokenizer.save_pretrained(folder)
    scores = [tuned.score_pair(bench.base, model, windows, bench.options.batch_size)
              for windows in (bench.held.windows, bench.other.windows, bench.own)]
    evidence = [evaluation.evidence_before(part) for part in scores]
    gate = evaluation.fit_gate([(evaluation.half(scores[0], 0), evidence[0][~bench.report], 1),
                                (scores[2], evidence[2], evaluation.SAMPLES_WEIGHT)])
    mixed = [evaluation.gated(gate, *pair)[0] for pair in zip(scores[:2], evidence[:2], strict=True)]
    note = f"{steps} steps, {passes} whole passes, learning rate {LEARNING_RATES[name]:g}"
    made = {"seconds": seconds, "size": 4 * trained, "note": note}
    return {name: bench.row(scores[0]["memory"], scores[1]["memory"], **made),
            f"{name}, automatic alpha": bench.row(*mixed, **made)}


def original_rows(bench):
    """The original demo's settings in today's code: one entry a row, cut at 128 tokens, and a decoder that sees one state."""
    folder = bench.folder.with_name(bench.folder.name + "_original")
    words = [word for name, value in (script.ORIGINAL | {"max_length": 128, "batch_size": 16}).items()
             for word in (f"--{name}", str(value))]
    script.run(script.parse_options([*bench.given, *words, "--output_dir", str(folder)]))
    metrics, decoder = json.loads((folder / "metrics.json").read_text()), MemoryDecoder.load(folder / "memory_decoder.pt")
    scores = (evaluation.score_positions(bench.base, decoder, part.windows, bench.options.batch_size, sweep=True)
              for part in (bench.held, bench.other))
    held, other = (part["blend_logits"] for part in scores)
    made = {"seconds": sum(value for stage, value in metrics["seconds"].items() if stage != "report"),
            "size": (folder / "memory_decoder.pt").stat().st_size}
    half = len(evaluation.ALPHAS) // 2
    return {ORIGINAL: bench.row(held[:, half], other[:, half], note="alpha 0.5, its default", **made),
            f"{ORIGINAL}, best alpha": bench.chosen(held, other, alphas(), "alpha {}", **made)}


def untaught_rows(bench):
    """The same decoder, keys and passes with the next tokens alone to learn from: kl_weight 0."""
    folder = bench.folder.with_name(bench.folder.name + "_untaught")
    if not folder.exists():
        shutil.copytree(bench.folder, folder, copy_function=os.link)
    given = [*bench.given, "--kl_weight", "0", "--output_dir", str(folder)]
    return blend_rows(type(bench)(given, bench.elsewhere, bench.work, bench.results), f"{UNTAUGHT}: ")


def pace_rows(bench):
    """Milliseconds a generated token, and those of reading the prompt. All ways write TOKENS tokens, the likeliest, in turn."""
    finder, times = retrieval.InPrompt(bench.base, bench.rows, bench.options.max_length), {}
    model = MemoryAugmentedLM(bench.base, bench.decoder, bench.templates[0], bench.gate, bench.store)
    k, temperature, share = bench.results["kNN-LM"][KNN_LM]["chosen"]
    knn = Settings(rule=KNN, knn_k=k, knn_temperature=temperature)

    def automatic(base, memory, reading):
        return float(bench.gate.alpha(opinions(base, memory).cpu().numpy(), reading.evidence.means))

    for number, window in itertools.product(range(2), bench.held.windows[:PROMPTS]):  # the first round warms up
        ids = window.ids[:2 * retrieval.QUERY]
        ways = {"base": lambda ids=ids: alone(bench.base, ids),
                PROMPT: lambda ids=ids: alone(bench.base, [*finder.front(ids), *ids]),
                "blend of probabilities": lambda ids=ids: together(model, ids, lambda *_: 0.5),
                "automatic alpha": lambda ids=ids: together(model, ids, automatic, weigh=True),
                KNN_LM: lambda ids=ids: together(model, ids, lambda *_: share, search=lambda hidden: model.search(hidden, knn))}
        for name, way in ways.items():
            marks = [time.perf_counter(), *(time.perf_counter() for _ in way())]
            times.setdefault((name, number), []).append(1000 * np.diff(marks))
    return {name: {"milliseconds_a_token": float(np.median([gaps[1:] for gaps in found])),
                   "prompt_milliseconds": float(np.median([gaps[0] for gaps in found]))}
            for (name, number), found in times.items() if number}


def together(model, ids, choose, **how):
    """Yield TOKENS times, after each token that base and memory write together.

    choose: (log probabilities of base and of memory, Reading) -> alpha.
    """
    reading = Reading(model.base)
    steps = model.steps(ids, reading, **how)
    _, base, memory = next(steps)
    for _ in range(TOKENS):
        token = int(blend(base, memory, choose(base, memory, reading), "probabilities").argmax())
        yield token
        _, base, memory = steps.send(token)


@torch.no_grad()
def alone(base, ids):
    """Yield TOKENS times, after each token that the base writes alone."""
    cache, new = base.new_cache(), torch.tensor([ids])
    for _ in range(TOKENS):
        token = int(base.logits(base.hidden(new, cache)[:, -1]).argmax())
        yield token
        new = torch.tensor([[token]])


RIVALS = {"memory": memory_rows, "kNN-LM": knn_rows, "pace": pace_rows, "n-gram": ngram_rows, "prompt": prompt_rows,
          "correction": correction_rows, "router": router_rows, "LoRA": lambda bench: tuned_rows(bench, "LoRA"),
          "full tuning": lambda bench: tuned_rows(bench, "full tuning"), "original": original_rows, "untaught": untaught_rows}
