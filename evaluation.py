"""The held-out report: perplexity of base, kNN-LM, memory and their blends on rows that no entry comes from.

Also fits the Gate, which chooses alpha by itself.

Letters: P held-out positions, A alphas, S temperatures, V vocabulary, K neighbours.
"""

import json
import math
import sys

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from datastore import hidden_batches, knn_weights
from generation import Evidence, Gate, opinions
from memory_decoder import LOGITS_AT_ONCE
from texts import Window, entries_of

ALPHAS = np.linspace(0, 1, 21)
SCALES = np.linspace(0.3, 1.2, 19)  # of the memory's logits
SAMPLES, SAMPLE_LENGTH = 16, 256  # texts that the base writes for the gate's fit, and the most tokens of one
SAMPLES_WEIGHT = 1.0  # weight of these texts in the fit; held-out rows have weight 1
# The rows of the report, and where their perplexities stand among its figures.
HELD_OUT_ROWS = {"base alone": "base", "kNN-LM": "knn_lm", "memory alone": "memory", "blend of logits": "blend_logits",
                 "blend of probabilities": "blend_probabilities", "automatic alpha": "blend_auto"}
TEMPERATURES = np.array([0.25, 0.5, 1.0, 2.0, 4.0])  # multiples of the temperature used in training


@torch.no_grad()
def sample_windows(base, length, seed=0):
    """SAMPLES texts, as windows of min(length, SAMPLE_LENGTH) tokens, that the base writes by itself.

    On such text the base's own probabilities are right.
    """
    generator, cache = torch.Generator().manual_seed(seed), base.new_cache()
    ids = new = torch.full((SAMPLES, 1), base.bos)
    for _ in range(min(length, SAMPLE_LENGTH) - 1):
        chances = torch.softmax(base.logits(base.hidden(new, cache)[:, -1]), -1).cpu()
        new = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, new], 1)
    return [Window(number, row, 0, 0) for number, row in enumerate(ids.tolist())]


def own_windows(windows, batch_size, accelerator=None):
    """This process's share of the windows, in whole batches. Without an Accelerator all of them."""
    if accelerator is None:
        return windows
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    return [window for batch in batches[accelerator.process_index::accelerator.num_processes] for window in batch]


@torch.no_grad()
def calibrate(base, decoder, windows, batch_size=16, accelerator=None):
    """Set decoder.scale, a factor of the memory's logits, to the value that gives the windows' tokens the most probability.

    A memory that has memorised its text is overconfident on other text. One number corrects this and keeps the ranking of
    seen tokens: temperature scaling (Guo et al. 2017, arXiv 1706.04599). The processes of an Accelerator share the windows.
    """
    decoder, windows = decoder.to(base.device).eval(), own_windows(windows, batch_size, accelerator)
    values, _, _, offsets = entries_of(windows)
    places = torch.full((base.vocabulary,), -1)
    places[decoder.seen.cpu()] = torch.arange(len(decoder.seen))
    y = places[torch.from_numpy(values).long()].to(base.device)  # -1: an unseen token, which the scale does not affect
    rows, total = max(1, LOGITS_AT_ONCE // 8 // len(decoder.seen)), torch.zeros(len(SCALES), dtype=torch.float64)
    for first, hidden in hidden_batches(base, windows, batch_size):
        features = features_of(decoder, hidden, np.diff(offsets[first:first + batch_size + 1]))
        target = y[offsets[first]:offsets[first] + len(hidden)]
        for f, t in zip(features[target >= 0].split(rows), target[target >= 0].split(rows), strict=True):
            z = decoder.output_projection(f)
            for number, scale in enumerate(SCALES.tolist()):
                total[number] += torch.log_softmax(scale * z, -1).gather(1, t[:, None]).double().sum().cpu()
    if accelerator:
        total = sum(gather_object([total]))
    decoder.scale.fill_(float(SCALES[int(total.argmax())]))


def features_of(decoder, hidden, counts):
    """The decoder's features (n, C) of the entries' hidden states (n, H) in several windows. counts: entries of each window."""
    counts = counts.tolist()
    features = decoder.features(pad_sequence(list(hidden.float().split(counts)), batch_first=True))
    return torch.cat([f[:count] for f, count in zip(features, counts, strict=True)])


@torch.no_grad()
def score_positions(base, decoder, windows, batch_size=16, store=None, k=None, temperature=None, sweep=False, accelerator=None):
    """Log probability of the next token at every position of the windows, under everything that is compared.

    Returns a dict of float32 arrays base (P,), memory (P,), opinions (P, 5), and int32 arrays example (P,), position (P,).
    With a store also knn (P, S), with sweep also blend_logits (P, A), both float32. The processes of an Accelerator share the
    windows, and each gets all scores.
    """
    own = own_windows(windows, batch_size, accelerator)
    values, example, position, offsets = entries_of(own)
    decoder = decoder.to(base.device).eval()
    rows, shapes = max(1, LOGITS_AT_ONCE // 8 // base.vocabulary), {"base": (), "memory": (), "opinions": (5,)}
    shapes |= {"knn": TEMPERATURES.shape} if store else {}
    shapes |= {"blend_logits": ALPHAS.shape} if sweep else {}
    # One array each. Many small ones would lie between the large blocks of logits and keep their memory from being reused.
    scores = {name: np.empty((len(values), *shape), np.float32) for name, shape in shapes.items()}
    with tqdm(total=len(values), desc="held-out", unit="position",
              disable=not (accelerator and accelerator.is_main_process)) as bar:
        for first, hidden in hidden_batches(base, own, batch_size):
            features = features_of(decoder, hidden, np.diff(offsets[first:first + batch_size + 1]))
            here = slice(offsets[first], offsets[first] + len(hidden))
            if store:
                scores["knn"][here] = knn_log_probabilities(store, hidden, values[here], k, temperature)
            y = torch.from_numpy(values[here]).long().to(base.device)[:, None]
            for block in (slice(i, i + rows) for i in range(0, len(hidden), rows)):
                b = torch.log_softmax(base.logits(hidden[block]), -1)
                m = decoder.log_probabilities(features[block], b)
                found = {"base": b.gather(1, y[block])[:, 0], "memory": m.gather(1, y[block])[:, 0], "opinions": opinions(b, m)}
                if sweep:
                    found["blend_logits"] = sweep_logits(b, m, y[block], decoder.seen, float(decoder.backoff))
                for name, tensor in found.items():
                    scores[name][here][block] = tensor.cpu().numpy()
            bar.update(len(hidden))
    scores |= {"example": example, "position": position}
    return in_order(gather_object([scores]), windows, batch_size) if accelerator else scores


def in_order(parts, windows, batch_size):
    """The scores of every process's own_windows as one dict of arrays, in the order of all windows."""
    process = np.arange(len(windows)) // batch_size % len(parts)
    order = np.argsort(np.repeat(process, np.diff(entries_of(windows).offsets)), kind="stable")  # of positions, as gathered
    return {name: np.concatenate([part[name] for part in parts])[np.argsort(order)] for name in parts[0]}


def sweep_logits(base, memory, targets, seen, backoff):
    """Log probability (P, A) of the targets (P, 1) under the blend of logits at every alpha.

    base, memory (P, V): log probabilities. seen (V',). For all unseen tokens, the memory's log probability is the base's plus
    one constant. So each alpha needs only the seen tokens computed again.
    """
    b, m = base[:, seen], memory[:, seen]
    target_b, target_m = (x.gather(1, targets)[:, 0] for x in (base, memory))
    every = len(seen) == base.shape[1]
    unseen = None if every else base.index_fill(-1, seen, -math.inf).logsumexp(-1)
    columns = []
    for alpha in ALPHAS.tolist():
        total = torch.lerp(b, m, alpha).logsumexp(-1)
        if not every:
            total = torch.logaddexp(total, (1 - alpha) * unseen + alpha * math.log(backoff))
        columns.append((1 - alpha) * target_b + alpha * target_m - total)
    return torch.stack(columns, 1)


def evidence_before(scores):
    """The Evidence (P, 3) at every position of score_positions, from the tokens before it in its own example."""
    means, evidence, last = np.zeros((len(scores["base"]), 3)), Evidence(), None
    gains = (scores["memory"] - scores["base"]).tolist()
    for i in np.lexsort((scores["position"], scores["example"])):
        if scores["example"][i] != last:
            evidence, last = Evidence(), scores["example"][i]
        means[i] = evidence.means
        evidence.add(gains[i])
    return means


def fit_gate(parts):
    """The Gate that maximises the likelihood of all positions under the mixture of probabilities.

    parts: (scores, evidence (P, 3), weight) of several sets of positions. Each set counts by its weight, not its size.
    """
    features = np.concatenate([np.concatenate([scores["opinions"], evidence], 1) for scores, evidence, _ in parts])
    base, memory = (np.concatenate([scores[name] for scores, _, _ in parts]) for name in ("base", "memory"))
    weight = np.concatenate([np.full(len(evidence), share / len(evidence)) for _, evidence, share in parts])
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x, b, m, w = map(torch.from_numpy, ((features - mean) / deviation, base.astype(float), memory.astype(float), weight))
    theta = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        z = x @ theta[:-1] + theta[-1]
        value = -(w * torch.logaddexp(b + F.logsigmoid(-z), m + F.logsigmoid(z))).sum() + 1e-4 * theta.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    theta = theta.detach().numpy()
    weights = theta[:-1] / deviation
    return Gate(weights, theta[-1] - weights @ mean)


def gated(gate, scores, evidence):
    """(log probabilities (P,) of the mixture under the gate's alphas, the alphas (P,))."""
    alpha = gate.alpha(scores["opinions"], evidence)
    return np.logaddexp(scores["base"] + np.log1p(-alpha), scores["memory"] + np.log(alpha)), alpha


def knn_log_probabilities(store, hidden, targets, k, temperature):
    """Log probability (P, S) that the K nearest entries give the targets (P,), one column a temperature."""
    D, I = store.search(hidden.float().cpu().numpy(), k)
    hit = store.values[I] == targets[:, None]
    columns = [(knn_weights(D, factor * temperature) * hit).sum(1) for factor in TEMPERATURES]
    with np.errstate(divide="ignore"):
        return np.log(np.stack(columns, 1)).astype(np.float32)


def mix_probabilities(first, second):
    """log((1 - alpha) * exp(first) + alpha * exp(second)) for every alpha: (P,) and (P,) -> (P, A)."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(first[:, None] + np.log1p(-ALPHAS), second[:, None] + np.log(ALPHAS))


def perplexities(log_probabilities):
    """Perplexity of each column: (P, ...) -> (...)."""
    return np.exp(-np.mean(log_probabilities, axis=0, dtype=np.float64))


def perplexity(log_probabilities):
    return float(perplexities(log_probabilities))


def half(scores, rest):
    """The positions of the even (rest 0) or odd (rest 1) examples."""
    return {name: array[scores["example"] % 2 == rest] for name, array in scores.items()}


def summarise(scores, own, temperature):
    """Choose alpha, its gate, lambda and temperature on the even held-out examples. Report all of them on the odd ones.

    scores: of the held-out windows. own: of the sample_windows.
    """
    choose, report = scores["example"] % 2 == 0, scores["example"] % 2 == 1
    rules = {"logits": scores["blend_logits"], "probabilities": mix_probabilities(scores["base"], scores["memory"])}
    knn = np.stack([mix_probabilities(scores["base"], column) for column in scores["knn"].T], 1)  # (P, S, A)
    s, lam = np.unravel_index(np.argmin(perplexities(knn[choose])), knn.shape[1:])
    best = {rule: int(np.argmin(perplexities(table[choose]))) for rule, table in rules.items()}
    evidence = evidence_before(scores)
    gate = fit_gate([(half(scores, 0), evidence[choose], 1), (own, evidence_before(own), SAMPLES_WEIGHT)])
    auto, alpha = gated(gate, half(scores, 1), evidence[report])
    return {
        "held_out": {
            "positions": int(report.sum()),
            "base": perplexity(scores["base"][report]),
            "knn_lm": perplexity(knn[report, s, lam]),
            "memory": perplexity(scores["memory"][report]),
            **{f"blend_{rule}": perplexity(table[report, best[rule]]) for rule, table in rules.items()},
            "blend_auto": perplexity(auto),
            "mean_auto_alpha": float(alpha.mean()),
        },
        "chosen": {
            **{f"alpha_{rule}": round(float(ALPHAS[best[rule]]), 4) for rule in rules},
            "knn_lambda": round(float(ALPHAS[lam]), 4),
            "knn_temperature": float(temperature * TEMPERATURES[s]),
            "gate": {"weights": gate.weights.tolist(), "bias": gate.bias},
            "positions": int(choose.sum()),
        },
        "alpha_sweep": {"alpha": [round(float(a), 4) for a in ALPHAS],
                        **{rule: perplexities(table[report]).tolist() for rule, table in rules.items()}},
    }


def report_table(metrics):
    """The Markdown table of the held-out report."""
    held, chosen = metrics["held_out"], metrics["chosen"]
    notes = ["", f"lambda {chosen['knn_lambda']:g}, temperature {chosen['knn_temperature']:.4g}, K {metrics['k']}", "alpha 1",
             f"alpha {chosen['alpha_logits']:g}", f"alpha {chosen['alpha_probabilities']:g}",
             f"alpha {held['mean_auto_alpha']:.2f} on average"]
    lines = ["| held-out text | perplexity | of the base's | chosen on the other half |", "|---|---:|---:|---|"]
    lines += [f"| {name} | {held[key]:.2f} | {held[key] / held['base']:.2f} | {note} |"
              for (name, key), note in zip(HELD_OUT_ROWS.items(), notes, strict=True)]
    return "\n".join(lines)


def change_table(metrics):
    """The Markdown table of what adding and forgetting changed."""
    changed, held, lines = metrics["changed"], metrics["held_out"], []
    for what in ("added", "forgotten"):
        if what in changed:
            lines.append(f"{what}: {changed[what]['names']}")
    lines += ["", "| | before | after |", "|---|---:|---:|", "| entries | {:,} | {:,} |".format(*changed["entries"])]
    for what in ("added", "forgotten", "kept"):
        if what in changed:
            found = changed[what]
            lines.append(f"| {what} text, memory alone (base {found['base']:.2f}) | {found['before']:.2f} | {found['after']:.2f} |")
    lines += [f"| held-out text, {name} | {changed['held_out'][key]:.2f} | {held[key]:.2f} |"
              for name, key in (("base", "base"), ("memory alone", "memory"), ("automatic alpha", "blend_auto"))]
    return "\n".join(lines)


def write_report(metrics, folder):
    """Write metrics.json, report.md, loss_curve.png and alpha_sweep.png."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    seconds = ", ".join(f"{stage} {value:.0f}{' since it went on' if stage in metrics['resumed'] else ''}"
                        for stage, value in metrics["seconds"].items())
    (folder / "report.md").write_text(
        f"# Held-out report\n\n{report_table(metrics)}\n\n"
        + (f"## What changed\n\n{change_table(metrics)}\n\n" if "changed" in metrics else "") +
        f"{metrics['held_out']['positions']:,} positions reported, {metrics['chosen']['positions']:,} others to choose on; "
        f"{metrics['entries']:,} entries, K {metrics['k']}.\n\nSeconds: {seconds}. "
        f"Peak memory: {metrics['peak_memory_bytes'] / 2**30:.2f} GiB.\n\n![loss](loss_curve.png)\n\n![alpha](alpha_sweep.png)\n",
        encoding="utf-8")
    plot_losses(metrics["losses"], folder / "loss_curve.png")
    plot_sweep(metrics, folder / "alpha_sweep.png")


def peak_memory():
    """Peak memory of this process, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def plot_losses(losses, path):
    """Training loss, KL and cross-entropy over the steps; losses: rows of (step, loss, kl, ce)."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    columns = np.array(losses, dtype=float).reshape(-1, 4).T
    for label, column in zip(("loss", "KL to the kNN distribution", "cross-entropy"), columns[1:], strict=True):
        axes.plot(columns[0], column, label=label)
    axes.set(xlabel="step", ylabel="nats a position", title="MemoryDecoder training")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_sweep(metrics, path):
    """Held-out perplexity over alpha under both rules, beside the base and kNN-LM."""
    sweep, held = metrics["alpha_sweep"], metrics["held_out"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for rule in ("logits", "probabilities"):
        axes.plot(sweep["alpha"], sweep[rule], marker=".", label=f"blend of {rule}")
    axes.axhline(held["base"], color="gray", linestyle="--", label="base alone")
    axes.axhline(held["knn_lm"], color="gray", linestyle=":", label="kNN-LM")
    axes.set(xlabel="alpha", ylabel="held-out perplexity", title="How much memory?")
    if math.isfinite(held["base"]) and max(sweep["logits"]) > 20 * min(sweep["logits"]):
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)
