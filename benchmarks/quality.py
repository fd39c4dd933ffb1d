"""The whole comparison: base, retrieval, kNN-LM, LoRA, full tuning, the original's recipe, the memory and its blends.

    python benchmarks/quality.py --data DATA                  # three seeds; results/quality.json
    python benchmarks/quality.py --data DATA --part rivals    # retrieval and the original's recipe; results/rivals.json
    python benchmarks/quality.py --data DATA --part untouched # WikiText that no choice was made on; results/untouched.json
    python benchmarks/quality.py --data DATA --part knn       # kNN-LM at K 1024; results/knn.json
    python benchmarks/quality.py --data DATA --part again     # the seeds' memories anew, not their rivals; results/again.json
    python benchmarks/quality.py --data DATA --part rates     # two more rates for LoRA and full tuning; results/rates.json
    python benchmarks/quality.py --data DATA --part gated     # LoRA and full tuning under automatic alpha; results/gated.json
    python benchmarks/quality.py --data DATA --part curve     # perplexity over the number of rows; results/curve.json
    python benchmarks/quality.py --data DATA --part pace      # time a token after --part all; results/pace.json
    python benchmarks/quality.py --data DATA --part all_tuned # LoRA and full tuning over every row; results/all_tuned.json
    python benchmarks/quality.py --data DATA --part all       # every row, with what the factors favour; results/all.json

Same base, same training rows, same held-out rows (even ones choose, odd ones report); LoRA and full tuning get the seconds
that the memory took, search included.
"""

import time
from types import SimpleNamespace

import baselines
import common
import faiss
import numpy as np
import torch
from baselines import in_context, log_probabilities, texts_of, tune
from common import TEMPLATE, record, recorded, script

import evaluation
from datastore import BaseLM, Datastore, Template, Window, find_neighbours, windows_of
from generation import Evidence, Gate, MemoryAugmentedLM, opinions
from memory_decoder import MemoryDecoder

SETTINGS = {"max_examples": 250, "max_length": 256, "batch_size": 4, "num_epochs": 3}
MORE_RATES = (("fully tuned", 1e-4), ("LoRA", 1e-2))  # beyond the edges, where the better of two rates lay
RATES = {"LoRA": (1e-3, 3e-3), "fully tuned": (3e-4, 1e-3)}
ROWS, HELD_CURVE = (100, 700), 60
EPOCHS_TUNED = 2  # of LoRA and full tuning over every row
LARGER_K = (32, 1024)
EVERY_ROW = {"2": {"num_epochs": 2}, "6": {"num_epochs": 6}, "4, weight decay 0.5": {"num_epochs": 4, "weight_decay": 0.5},
             "4, dropout 0.2": {"num_epochs": 4, "dropout": 0.2}}
FAVOURED = {"context": 16, "kl_weight": 0.25, "k": 8}  # what benchmarks/factors.py finds best or cheapest
OFF_DOMAIN_TEXTS, PROMPT = 120, "Title: A v. B\nQuestion: May a state tax the income of a foreign company?\nAnswer:"


def options_of(given, seed, held_rows=200, **changed):
    held = str(common.held_out_file(given, held_rows))
    return script.Options(base_model=given.base_model, dataset=str(given.data / "legal_qa/train.jsonl"), validation_dataset=held,
                          seed=seed, **SETTINGS | changed)


def windows_of_seed(given, base, seed, **changed):
    """(windows of the training rows that a seed draws, windows of the held-out rows)."""
    parts = script.split_rows(options_of(given, seed, **changed), TEMPLATE)
    return [windows_of(base, [TEMPLATE.render(row) for row in part], TEMPLATE, SETTINGS["max_length"]) for part in parts]


def off_domain_windows(given, base, start=0):
    """WikiText-2 in pieces of as many tokens as a window, each a text of its own; <unk> is the unknown token.

    start: characters passed over.
    """
    text = (given.data / "off_domain/wikitext2_valid.txt").read_text(encoding="utf-8")
    ids = base.tokenizer(text[start:start + 400_000], add_special_tokens=False).input_ids
    width = SETTINGS["max_length"] - 1
    pieces = [ids[i:i + width] for i in range(0, len(ids) - width, width)][:OFF_DOMAIN_TEXTS]
    return [Window(number, [base.bos, *piece], 0, 0) for number, piece in enumerate(pieces)]


def perplexity_of_odd(scores, example):
    return evaluation.perplexity(scores[example % 2 == 1])


def memory_off_domain(given, folder, base, windows):
    """Off-domain perplexities of base, kNN-LM, memory, its blends at the chosen alphas and under the gate."""
    path = given.work / folder
    metrics = common.json.loads((path / "metrics.json").read_text())
    chosen, decoder = metrics["chosen"], MemoryDecoder.load(path / "memory_decoder.pt")
    scores = evaluation.score_positions(base, decoder, windows, 16, Datastore.open(path), metrics["k"], chosen["knn_temperature"])
    auto, alpha = evaluation.gated(Gate(**chosen["gate"]), scores, evaluation.evidence_before(scores))

    def at(table, value):
        return evaluation.perplexity(table[:, int(np.argmin(abs(evaluation.ALPHAS - value)))])

    knn = scores["knn"][:, evaluation.TEMPERATURES.index(1.0)]
    return {"base": evaluation.perplexity(scores["base"]), "memory": evaluation.perplexity(scores["memory"]),
            "knn_lm": at(evaluation.mix_probabilities(scores["base"], knn), chosen["knn_lambda"]),
            "blend_logits": at(scores["blend_logits"], chosen["alpha_logits"]),
            "blend_probabilities": at(evaluation.mix_probabilities(scores["base"], scores["memory"]),
                                      chosen["alpha_probabilities"]),
            "blend_auto": evaluation.perplexity(auto), "mean_auto_alpha": float(alpha.mean())}


def score_tuned(tuned, held, off):
    """Perplexities on the choosing and the reporting half of the held-out rows, and off-domain."""
    legal, example = log_probabilities(tuned, held), baselines.entries_of(held).example
    return {"choose": evaluation.perplexity(legal[example % 2 == 0]), "legal": perplexity_of_odd(legal, example),
            "off_domain": evaluation.perplexity(log_probabilities(tuned, off))}


def tuned_results(base, windows, held, off, seconds, seed, rates):
    """For LoRA and full tuning, the result at the rate that does best on the choosing half."""
    results = {}
    for name, tried in rates.items():
        runs = {}
        for lr in tried:
            tuned, steps, epochs = tune(base, windows, seconds, lr, name == "LoRA", seed)
            runs[lr] = score_tuned(tuned, held, off) | {"lr": lr, "steps": steps, "epochs": epochs, "bytes": tuned.kept}
        best = min(runs.values(), key=lambda run: run["choose"])
        results[name] = best | {"tried": {str(lr): run["choose"] for lr, run in runs.items()}, "seconds": seconds}
    return results


def seconds_a_token(given, folder, base):
    """Median seconds of a greedy token behind a short prompt: base alone, with the memory, and with a search as kNN-LM needs.

    auto: with the memory, the gate's features and alpha.
    """
    path = given.work / folder
    store = Datastore.open(path)
    gate = Gate(**common.json.loads((path / "metrics.json").read_text())["chosen"]["gate"])
    model = MemoryAugmentedLM(base, MemoryDecoder.load(path / "memory_decoder.pt"), Template(TEMPLATE.pattern).header)

    def pace(one):
        taken = []
        for _ in range(40):
            began = time.perf_counter()
            one()
            taken.append(time.perf_counter() - began)
        return float(np.median(taken[10:]))

    steps = model.steps(base.encode(PROMPT))
    hidden = next(steps)[0]
    cache = prompt_cache(base)
    alone = pace(lambda: base.logits(base.hidden(torch.tensor([[base.bos]]), cache)[0, -1]))
    evidence = Evidence()
    weighed = model.steps(base.encode(PROMPT), evidence)
    next(weighed)
    return {"base": alone, "memory": pace(lambda: steps.send(5)),
            "auto": pace(lambda: gate.alpha(opinions(*weighed.send(5)[1:]).numpy(), evidence.means)),
            "knn_lm": alone + pace(lambda: store.search(hidden[None].numpy(), 32))}


def pace_of(given, folder):
    """seconds_a_token of a finished run."""
    return seconds_a_token(given, folder, BaseLM.load(given.base_model)) | {"commit": common.COMMIT}


def prompt_cache(base):
    cache = evaluation.DynamicCache(config=base.model.config)
    base.hidden(torch.tensor([base.encode(PROMPT)]), cache)
    return cache


def bytes_of(given, folder):
    path = given.work / folder
    size = {name: (path / name).stat().st_size for name in
            ("memory_decoder.pt", "faiss_index.bin", "datastore_values.npy")}
    return {"memory": size["memory_decoder.pt"], "knn_lm": size["faiss_index.bin"] + size["datastore_values.npy"]}


def compare(given, seed):
    """Everything of one seed, in a dict."""
    folder = f"memory_{seed}"
    metrics = common.train(given, folder, seed=seed, **SETTINGS)
    seconds = sum(metrics["seconds"][stage] for stage in ("datastore", "index", "neighbours", "decoder"))
    base = BaseLM.load(given.base_model)
    windows, held = windows_of_seed(given, base, seed)
    off = off_domain_windows(given, base)
    result = {"commit": common.COMMIT, "held_out": metrics["held_out"], "chosen": metrics["chosen"],
              "entries": metrics["entries"], "seconds": metrics["seconds"], "budget": seconds,
              "off_domain": memory_off_domain(given, folder, base, off), "bytes": bytes_of(given, folder),
              "seconds_a_token": seconds_a_token(given, folder, base)}
    first = recorded("quality").get("0", {})
    rates = {name: (first[name]["lr"],) if name in first else tried for name, tried in RATES.items()}
    return result | tuned_results(base, windows, held, off, seconds, seed, rates)


def untouched(given, seed):
    """Off-domain figures of a finished seed on WikiText that lies behind what the gate's design was tried on."""
    base = BaseLM.load(given.base_model)
    return memory_off_domain(given, f"memory_{seed}", base, off_domain_windows(given, base, 400_000))


def knn_at(given, folder, ks):
    """{K: kNN-LM of a finished run at that K}, all from one search; temperature and lambda chosen as script 1 chooses them."""
    base, path = BaseLM.load(given.base_model), given.work / folder
    temperature = float(common.json.loads((path / "metrics.json").read_text())["training_knn_temperature"])
    held = windows_of(base, texts_of(given, "validation", 200), TEMPLATE, SETTINGS["max_length"])
    entries, store, found = baselines.entries_of(held), Datastore.open(path), {k: [] for k in ks}
    for first, hidden in baselines.hidden_batches(base, held, 16):
        targets = entries.values[entries.offsets[first]:entries.offsets[first] + len(hidden)]
        D, I = store.search(hidden.float().numpy(), max(ks))
        for k in ks:
            nearest = SimpleNamespace(search=lambda *_, cut=(D[:, :k], I[:, :k]): cut, values=store.values)
            found[k].append(evaluation.knn_log_probabilities(nearest, hidden, targets, k, temperature))
    own = log_probabilities(base, held)
    return {k: best_knn(own, np.concatenate(found[k]), entries.example, temperature) | {"k": k} for k in ks}


def best_knn(own, knn, example, temperature):
    """kNN-LM on the odd rows, with the temperature (a column of knn) and lambda that do best on the even ones."""
    tables, even = [evaluation.mix_probabilities(own, column) for column in knn.T], example % 2 == 0
    s, lam = min(((s, lam) for s in range(len(tables)) for lam in range(len(evaluation.ALPHAS))),
                 key=lambda at: evaluation.perplexity(tables[at[0]][even, at[1]]))
    return {"legal": perplexity_of_odd(tables[s][:, lam], example), "lambda": float(evaluation.ALPHAS[lam]),
            "temperature": temperature * evaluation.TEMPERATURES[s], "commit": common.COMMIT}


def again(given, seed):
    """Memory, kNN-LM and blends of a seed once more, without the rivals, when the memory's code has changed."""
    folder, base = f"again_{seed}", BaseLM.load(given.base_model)
    held_out = common.train(given, folder, seed=seed, **SETTINGS)["held_out"]
    return {"held_out": held_out, "off_domain": memory_off_domain(given, folder, base, off_domain_windows(given, base)),
            "commit": common.COMMIT}


def largest_knn(given, seed):
    """kNN-LM of a finished seed at the largest K."""
    return knn_at(given, f"memory_{seed}", LARGER_K[-1:])[LARGER_K[-1]]


def rivals(given, seed):
    """Retrieval into the prompt, and the original's recipe, on the rows of a seed."""
    base = BaseLM.load(given.base_model)
    texts, held_texts = ([TEMPLATE.render(row) for row in part] for part in script.split_rows(options_of(given, seed), TEMPLATE))
    found, example = in_context(base, baselines.Retriever(base, texts), held_texts, TEMPLATE,
                                SETTINGS["max_length"] + baselines.CHUNK)
    original = common.train(given, f"original_{seed}", seed=seed, **{**SETTINGS, **script.ORIGINAL})
    half = original["alpha_sweep"]["alpha"].index(0.5)
    return {"retrieval": perplexity_of_odd(found, example), "commit": common.COMMIT,
            "original": original["held_out"] | {"at_half": original["alpha_sweep"]["logits"][half],
                                                "seconds": original["seconds"]["decoder"]}}


def more_rates(given, name, lr):
    """Seed 0 at a rate beyond the two tried, and as a control for what mixing alone gives, mixed with the base."""
    base, first = BaseLM.load(given.base_model), recorded("quality")["0"]
    windows, held = windows_of_seed(given, base, 0)
    off, example = off_domain_windows(given, base), baselines.entries_of(held).example
    tuned, steps, _ = tune(base, windows, None, lr, name == "LoRA", most=first[name]["steps"])
    legal, elsewhere = (evaluation.mix_probabilities(log_probabilities(base, part), log_probabilities(tuned, part))
                        for part in (held, off))
    best = int(np.argmin(evaluation.perplexities(legal[example % 2 == 0])))
    return {"choose": evaluation.perplexity(legal[example % 2 == 0, -1]), "legal": perplexity_of_odd(legal[:, -1], example),
            "off_domain": evaluation.perplexity(elsewhere[:, -1]), "steps": steps, "mixed_alpha": float(evaluation.ALPHAS[best]),
            "mixed_legal": perplexity_of_odd(legal[:, best], example),
            "mixed_off_domain": evaluation.perplexity(elsewhere[:, best]), "commit": common.COMMIT}


def gated(given, name):
    """Seed 0 of LoRA or full tuning once more, at its best rate and number of steps, under the gate that the memory has."""
    base, first = BaseLM.load(given.base_model), recorded("quality")["0"][name]
    windows, held = windows_of_seed(given, base, 0)
    tuned, *_ = tune(base, windows, None, first["lr"], name == "LoRA", most=first["steps"])
    return under_gate(base, tuned, held, off_domain_windows(given, base)) | {"commit": common.COMMIT}


def every_row_tuned(given, name):
    """LoRA or full tuning, EPOCHS_TUNED passes over every row at the rate that is best with fewer, alone and under a gate."""
    base, lr = BaseLM.load(given.base_model), recorded("quality")["0"][name]["lr"]
    windows, held = windows_of_seed(given, base, 0, max_examples=None)
    steps = EPOCHS_TUNED * len(script.epoch_batches(np.array([len(w.ids) for w in windows]), 8, 0, 0))
    began = time.monotonic()
    tuned, *_ = tune(base, windows, None, lr, name == "LoRA", most=steps)
    seconds = time.monotonic() - began
    return under_gate(base, tuned, held, off_domain_windows(given, base)) | {
        "lr": lr, "steps": steps, "epochs": EPOCHS_TUNED, "seconds": seconds, "commit": common.COMMIT}


def under_gate(base, tuned, held, off):
    """Perplexities of a tuned model alone, mixed with the base at the best fixed alpha, and under a gate of its own."""
    legal, off, samples = (baselines.score_pair(base, tuned, part) for part in
                           (held, off, evaluation.sample_windows(base, SETTINGS["max_length"])))
    choose, report = evaluation.half(legal, 0), evaluation.half(legal, 1)
    gate = evaluation.fit_gate([(choose, evaluation.evidence_before(choose), 1),
                                (samples, evaluation.evidence_before(samples), evaluation.SAMPLES_WEIGHT)])
    best = int(np.argmin(evaluation.perplexities(evaluation.mix_probabilities(choose["base"], choose["memory"]))))
    result = {"alpha": float(evaluation.ALPHAS[best])}
    for where, part in (("legal", report), ("off_domain", off)):
        fixed = evaluation.mix_probabilities(part["base"], part["memory"])[:, best]
        auto, alpha = evaluation.gated(gate, part, evaluation.evidence_before(part))
        result[where] = {"alone": evaluation.perplexity(part["memory"]), "mixed": evaluation.perplexity(fixed),
                         "auto": evaluation.perplexity(auto), "mean_auto_alpha": float(alpha.mean())}
    return result


def curve(given, rows):
    """Memory, kNN-LM and LoRA after so many rows; everyone gets the seconds that the memory took."""
    folder = f"curve_{rows}"
    epochs = max(1, min(5, 600 // rows))
    changed = {"max_examples": rows, "num_epochs": epochs}
    metrics = common.train(given, folder, HELD_CURVE, **SETTINGS | changed)
    seconds = sum(metrics["seconds"][stage] for stage in ("datastore", "index", "neighbours", "decoder"))
    base = BaseLM.load(given.base_model)
    rows, _ = script.split_rows(options_of(given, 0, HELD_CURVE, **changed), TEMPLATE)
    windows = windows_of(base, [TEMPLATE.render(row) for row in rows], TEMPLATE, SETTINGS["max_length"])
    held = windows_of(base, texts_of(given, "validation", HELD_CURVE), TEMPLATE, SETTINGS["max_length"])
    tuned, steps, _ = tune(base, windows, seconds, recorded("quality")["0"]["LoRA"]["lr"], lora=True)
    lora = perplexity_of_odd(log_probabilities(tuned, held), baselines.entries_of(held).example)
    return {"held_out": metrics["held_out"], "entries": metrics["entries"], "seconds": metrics["seconds"], "epochs": epochs,
            "LoRA": lora, "lora_steps": steps, "commit": common.COMMIT}


def find_quickly(store, keys, k, folder):
    """find_neighbours looking into half of the usual lists: what the memory learns from, not what kNN-LM is measured with.

    The recall that script 1 then prints is that of the usual number of lists; this one prints its own.
    """
    ivf = faiss.extract_index_ivf(store.index)
    usual, ivf.nprobe = ivf.nprobe, max(8, ivf.nprobe // 2)
    find_neighbours(store, keys, k, folder)
    print(f"neighbours in half of the usual lists: recall@{k} {store.recall(keys, k):.3f}", flush=True)
    ivf.nprobe = usual


def all_rows(given, changed):
    """Memory, blends and kNN-LM after training on every row, with the settings that the factors favour, some changed."""
    with common.replaced(script, "find_neighbours", find_quickly):
        metrics = common.train(given, "all_rows", **SETTINGS | FAVOURED | {"max_examples": None} | changed)
    base = BaseLM.load(given.base_model)
    return {"held_out": metrics["held_out"], "entries": metrics["entries"], "seconds": metrics["seconds"],
            "chosen": metrics["chosen"], "knn": knn_at(given, "all_rows", LARGER_K),
            "off_domain": memory_off_domain(given, "all_rows", base, off_domain_windows(given, base)), "commit": common.COMMIT}


PARTS = {"compare": ("quality", {str(seed): (compare, seed) for seed in range(3)}),
         "rivals": ("rivals", {str(seed): (rivals, seed) for seed in range(3)}),
         "all": ("all", {name: (all_rows, changed) for name, changed in EVERY_ROW.items()}),
         "pace": ("pace", {"all_rows": (pace_of, "all_rows")}),
         "again": ("again", {str(seed): (again, seed) for seed in range(3)}),
         "knn": ("knn", {str(seed): (largest_knn, seed) for seed in range(3)}),
         "untouched": ("untouched", {str(seed): (untouched, seed) for seed in range(3)}),
         "rates": ("rates", {f"{name} {lr:g}": (more_rates, name, lr) for name, lr in MORE_RATES}),
         "all_tuned": ("all_tuned", {name: (every_row_tuned, name) for name in RATES}),
         "gated": ("gated", {name: (gated, name) for name in RATES}),
         "curve": ("curve", {str(rows): (curve, rows) for rows in ROWS})}


def main():
    given = common.arguments(__doc__.split("\n")[0], part="compare")
    name, jobs = PARTS[given.part]
    for key, (job, *values) in jobs.items():
        if key not in recorded(name):
            record(name, key, job(given, *values))


if __name__ == "__main__":
    main()
