"""The rivals of benchmarks/compare.py, one function each: a Bench -> {name of a table's row: its figures}."""

import itertools
import json
import time

import numpy as np
import retrieval
import rules
import torch
import tuned

import evaluation
import train_memory_decoder as script
from datastore import open_keys
from generation import AUTO, KNN, MemoryAugmentedLM, Settings
from memory_decoder import MemoryDecoder
from texts import entries_of

LEARNING_RATES = {"LoRA": 1e-3, "full tuning": 1e-4}
PROMPT = "BM25's row in the prompt"
TOKENS, PROMPTS = 48, 4  # of the answers whose time is measured


def memory_rows(bench):
    held, other, alphas = bench.held, bench.other, [f"{a:.2g}" for a in evaluation.ALPHAS]
    made = {"seconds": sum(bench.seconds.values()), "size": (bench.folder / "memory_decoder.pt").stat().st_size}
    auto = [evaluation.gated(bench.gate, part.scores, part.evidence) for part in (held, other)]
    return {"base": bench.row(held.base, other.base), "memory alone": bench.row(held.memory, other.memory, **made),
            "blend of logits": bench.chosen(held.scores["blend_logits"], other.scores["blend_logits"], alphas, "alpha {}", **made),
            "blend of probabilities": bench.chosen(*(evaluation.mix_probabilities(p.base, p.memory) for p in (held, other)),
                                                   alphas, "alpha {}", **made),
            "automatic alpha": bench.row(auto[0][0], auto[1][0], **made, note=f"alpha {auto[0][1][bench.report].mean():.2f} "
                                         f"on average, elsewhere {auto[1][1].mean():.2f}")}


def knn_rows(bench):
    temperature = bench.metrics["training_knn_temperature"]
    held, other = (retrieval.knn_table(bench.base, bench.store, part.windows, temperature, bench.options.batch_size)
                   for part in (bench.held, bench.other))
    number, share = retrieval.best_knn(bench.held.base[~bench.report], held[~bench.report])
    k, factor = list(itertools.product(retrieval.NEIGHBOURS, retrieval.FACTORS))[number]
    size = sum((bench.folder / name).stat().st_size for name in ("faiss_index.bin", "datastore_values.npy"))
    return {"kNN-LM": bench.row(retrieval.mixed(bench.held.base, held[:, number], share),
                                retrieval.mixed(bench.other.base, other[:, number], share),
                                bench.seconds["datastore"] + bench.seconds["index"], size,
                                f"K {k}, temperature {factor * temperature:.4g}, lambda {share:.2f}")}


def ngram_rows(bench):
    began = time.monotonic()
    ngram = retrieval.NGram(bench.rows)
    seconds, size = time.monotonic() - began, 8 * len(ngram.ids)
    held, sparse = retrieval.ngram_scores(ngram, bench.held_rows, bench.held.windows)
    other, other_sparse = retrieval.ngram_scores(ngram, [bench.other_ids], bench.other.windows)
    shares = [retrieval.best_share(bench.held.base[mask], held[mask]) for mask in (~bench.report & sparse, ~bench.report & ~sparse)]
    mixed = [retrieval.mixed(base, scores, np.where(mask, *shares)) for base, scores, mask in (
        (bench.held.base, held, sparse), (bench.other.base, other, other_sparse))]
    note = "lambda {:.2f} where one token alone ever followed, else {:.2f}".format(*shares)
    return {"n-gram": bench.row(*mixed, seconds, size, note)}


def prompt_rows(bench):
    began = time.monotonic()
    finder = retrieval.InPrompt(bench.base, bench.rows, bench.options.max_length)
    seconds, found = time.monotonic() - began, []
    for part in (bench.held, bench.other):
        told = rules.base_scores(bench.base, finder.windows(part.windows), 1)
        found.append(np.where(finder.asked_with(part.windows), part.base, told))
    return {PROMPT: bench.row(*found, seconds, sum(map(len, map(str.encode, finder.texts))))}


def correction_rows(bench):
    keys = open_keys(bench.stage("datastore") / "keys.f16", bench.base.width)
    fresh = script.make_decoder(bench.options, bench.base, keys, entries_of(bench.learned))
    assert torch.equal(fresh.seen.cpu(), bench.decoder.seen.cpu())
    tables = [rules.correction_table(bench.base, bench.decoder, fresh, part.windows, bench.options.batch_size)
              for part in (bench.held, bench.other)]
    return {"base + weight (memory - untrained)": bench.chosen(*tables, [f"{w:.1f}" for w in rules.WEIGHTS], "weight {}",
                                                               seconds=sum(bench.seconds.values()))}


def router_rows(bench):
    size, own = bench.options.batch_size, bench.part(bench.own)
    held, other, of_base = (rules.router_part(rules.states(bench.base, bench.decoder, part.windows, size), part.scores)
                            for part in (bench.held, bench.other, own))
    choose = torch.from_numpy(~bench.report)
    router = rules.fit_router(tuple(x[choose] for x in held), bench.held.entries.example[~bench.report], of_base,
                              evaluation.SAMPLES_WEIGHT, bench.options.seed)
    return {"router on hidden states": bench.row(router.mixed(held), router.mixed(other), sum(bench.seconds.values()))}


def tuned_rows(bench, name):
    seconds = sum(bench.seconds.values())
    model, trained, steps, passes = tuned.tune(bench.base, bench.learned, seconds, LEARNING_RATES[name], name == "LoRA",
                                               bench.options.seed)
    if name == "LoRA":  # benchmarks/answers.py asks it
        model.model.save_pretrained(bench.work / "lora"), bench.base.tokenizer.save_pretrained(bench.work / "lora")
    scores = [tuned.score_pair(bench.base, model, windows, bench.options.batch_size)
              for windows in (bench.held.windows, bench.other.windows, bench.own)]
    evidence = [evaluation.evidence_before(part) for part in scores]
    gate = evaluation.fit_gate([(evaluation.half(scores[0], 0), evidence[0][~bench.report], 1),
                                (scores[2], evidence[2], evaluation.SAMPLES_WEIGHT)])
    mixed = [evaluation.gated(gate, *pair)[0] for pair in zip(scores[:2], evidence[:2], strict=True)]
    made = {"seconds": seconds, "size": 4 * trained, "note": f"{steps} steps, {passes} whole passes"}
    return {name: bench.row(scores[0]["memory"], scores[1]["memory"], **made),
            f"{name}, automatic alpha": bench.row(*mixed, **made)}


def original_rows(bench):
    """The original demo's recipe: one entry a row, cut at 128 tokens, and a decoder that sees one state."""
    folder = bench.folder.with_name(bench.folder.name + "_original")
    words = ["--original", "--max_length", "128", "--batch_size", "16", "--output_dir", str(folder)]
    script.run(script.parse_options([*bench.given, *words]))
    metrics, decoder = json.loads((folder / "metrics.json").read_text()), MemoryDecoder.load(folder / "memory_decoder.pt")
    scores = (evaluation.score_positions(bench.base, decoder, part.windows, bench.options.batch_size, sweep=True)
              for part in (bench.held, bench.other))
    held, other = (part["blend_logits"] for part in scores)
    made = {"seconds": sum(value for stage, value in metrics["seconds"].items() if stage != "report"),
            "size": (folder / "memory_decoder.pt").stat().st_size}
    half = len(evaluation.ALPHAS) // 2
    return {"original recipe": bench.row(held[:, half], other[:, half], note="alpha 0.5, its default", **made),
            "original recipe, best alpha": bench.chosen(held, other, [f"{a:.2g}" for a in evaluation.ALPHAS], "alpha {}", **made)}


def pace_rows(bench):
    """Milliseconds a token of an answer, with the reading of its prompt. The ways take turns, and medians count."""
    finder, times = retrieval.InPrompt(bench.base, bench.rows, bench.options.max_length), {}
    model = MemoryAugmentedLM(bench.base, bench.decoder, bench.templates[0], bench.gate, bench.store)
    rules_of = {"blend of probabilities": "probabilities", "automatic alpha": AUTO, "kNN-LM": KNN}
    for number, window in itertools.product(range(2), bench.held.windows[:PROMPTS]):  # the first round warms up
        ids = window.ids[:2 * retrieval.QUERY]
        text = bench.base.tokenizer.decode(ids, skip_special_tokens=True)
        found = [ids[0], *finder.nearest(text)[1:bench.options.max_length], *ids[1:]]
        ways = {"base": lambda ids=ids: alone(bench.base, ids), PROMPT: lambda ids=found: alone(bench.base, ids)}
        for name, rule in rules_of.items():
            ways[name] = lambda text=text, rule=rule: sum(1 for _ in model.stream(text, Settings(rule=rule, temperature=0), TOKENS))
        for name, way in ways.items():
            began = time.perf_counter()
            count = way()
            times.setdefault((name, number), []).append(1000 * (time.perf_counter() - began) / count)
    return {name: {"milliseconds_a_token": float(np.median(found))} for (name, number), found in times.items() if number}


@torch.no_grad()
def alone(base, ids):
    """Write TOKENS tokens with the base alone; returns how many."""
    cache, new = base.new_cache(), torch.tensor([ids])
    for _ in range(TOKENS):
        new = base.logits(base.hidden(new, cache)[:, -1]).argmax(-1)[None].cpu()
    return TOKENS


RIVALS = {"memory": memory_rows, "kNN-LM": knn_rows, "pace": pace_rows, "n-gram": ngram_rows, "prompt": prompt_rows,
          "correction": correction_rows, "router": router_rows, "LoRA": lambda bench: tuned_rows(bench, "LoRA"),
          "full tuning": lambda bench: tuned_rows(bench, "full tuning"), "original": original_rows}
