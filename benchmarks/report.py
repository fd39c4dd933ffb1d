"""The tables and figures of benchmarks/README.md, from what the other benchmarks left in results/.

    python benchmarks/report.py      # prints the tables, writes the figures
"""

import matplotlib
from common import RESULTS, recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"base": "base alone", "knn_lm": "kNN-LM, K 32", "LoRA": "LoRA", "fully tuned": "fully tuned", "memory": "memory alone",
         "blend_logits": "blend of logits", "blend_probabilities": "blend of probabilities", "blend_auto": "automatic alpha"}


def comparison_runs():
    """The seeds of the comparison, with the perplexities that memory, blends and kNN-LM have since (quality.py --part again)."""
    return [run | recorded("again").get(seed, {}) for seed, run in recorded("quality").items()]


def of(run, key, where):
    if key in ("LoRA", "fully tuned"):
        return run[key]["legal" if where == "held_out" else "off_domain"]
    return run[where][key]


def plot_comparison():
    """Legal gain against off-domain cost: the mean of the seeds, the range as bars."""
    runs = comparison_runs()
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for key, name in NAMES.items():
        points = [[of(run, key, where) for run in runs] for where in ("held_out", "off_domain")]
        x, y = (sum(values) / len(values) for values in points)
        errors = [[[mean - min(values)], [max(values) - mean]] for mean, values in zip((x, y), points, strict=True)]
        axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], marker="o", capsize=3)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, -13 if key == "blend_probabilities" else 5))
    axes.set(xlabel="perplexity on held-out legal text (lower is better)", ylabel="perplexity on WikiText-2 (lower is better)",
             title="What each way of adapting gains, and what it costs elsewhere", yscale="log")
    axes.margins(x=0.2)
    axes.set_yticks([90, 120, 150, 200], ["90", "120", "150", "200"])
    axes.minorticks_off()
    figure.savefig(RESULTS / "comparison.png", dpi=120)


def curve_runs():
    """Runs of the learning curve by their number of rows; the factors' default has the same held-out rows and settings."""
    return {int(rows): run for rows, run in recorded("curve").items()} | {150: recorded("factors")["default"] | {"epochs": 3}}


def plot_curve():
    runs = curve_runs()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = sorted(runs)
    for key in ("base", "knn_lm", "memory", "blend_probabilities", "blend_auto"):
        axes.plot(rows, [runs[n]["held_out"][key] for n in rows], marker="o", label=NAMES[key])
    tuned = [n for n in rows if "LoRA" in runs[n]]
    axes.plot(tuned, [runs[n]["LoRA"] for n in tuned], marker="s", linestyle="--", label="LoRA, same seconds")
    axes.set(xlabel="training rows", ylabel="held-out legal perplexity", xscale="log", title="Learning curve")
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(RESULTS / "curve.png", dpi=120)


def plot_factors():
    results = recorded("factors")
    names = sorted(results, key=lambda name: results[name]["held_out"]["blend_probabilities"], reverse=True)
    figure, axes = plt.subplots(figsize=(7.5, 6.5), layout="constrained")
    default = results["default"]["held_out"]
    for key, marker in (("memory", "o"), ("blend_probabilities", "s")):
        axes.plot([results[name]["held_out"][key] for name in names], names, marker, label=NAMES[key])
        axes.axvline(default[key], color="gray", linewidth=0.8, linestyle=":" if key == "memory" else "--")
    axes.axvline(default["knn_lm"], color="tab:red", linewidth=0.8, label="kNN-LM")
    axes.set(xlabel="held-out legal perplexity; what is further right is not shown", title="One factor at a time",
             xlim=(0.95 * default["blend_probabilities"], 1.7 * default["memory"]))
    axes.legend()
    figure.savefig(RESULTS / "factors.png", dpi=120)


def spread(values, digits=2):
    """Mean and range, as Markdown shows them."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (one seed)"
    low, high, mean = min(values), max(values), sum(values) / len(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def comparison():
    """Mean and range over the seeds, legal and off-domain, and what each way costs."""
    runs = comparison_runs()
    lines = ["| | held-out legal | WikiText-2 | s to fit | ms a token | MB beside the base |", "|---|---:|---:|---:|---:|---:|"]

    def line(name, legal, off=None, seconds=None, pace=None, size=None):
        def mean(value, factor):
            return f"{factor * sum(value(run) for run in runs) / len(runs):.1f}" if value else ""

        cells = [spread([legal(run) for run in runs]), spread([off(run) for run in runs]) if off else "",
                 mean(seconds, 1), mean(pace, 1e3), mean(size, 1e-6)]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    def search(run):
        return run["seconds"]["datastore"] + run["seconds"]["index"]

    line("base alone", lambda r: r["held_out"]["base"], lambda r: r["off_domain"]["base"], None,
         lambda r: r["seconds_a_token"]["base"])
    rivals = list(recorded("rivals").values())
    for name, value in (("BM25 passages in the prompt", lambda r: r["retrieval"]),
                        ("original's recipe, best alpha", lambda r: r["original"]["blend_logits"]),
                        ("original's recipe, its alpha 0.5", lambda r: r["original"]["at_half"])):
        lines.append(f"| {name} | {spread([value(run) for run in rivals])} | | | | |")
    larger = [run["legal"] for run in recorded("knn").values()]
    lines.append(f"| kNN-LM, K 1024 | {spread(larger)} | | | | |")
    line("kNN-LM, K 32", lambda r: r["held_out"]["knn_lm"], lambda r: r["off_domain"]["knn_lm"], search,
         lambda r: r["seconds_a_token"]["knn_lm"], lambda r: r["bytes"]["knn_lm"])
    for name in ("LoRA", "fully tuned"):
        line(name, lambda r, n=name: r[n]["legal"], lambda r, n=name: r[n]["off_domain"], lambda r, n=name: r[n]["seconds"],
             lambda r: r["seconds_a_token"]["base"], lambda r, n=name: r[n]["bytes"])
    for key in ("memory", "blend_logits", "blend_probabilities", "blend_auto"):
        line(NAMES[key], lambda r, k=key: r["held_out"][k], lambda r, k=key: r["off_domain"][k], lambda r: r["budget"],
             lambda r: r["seconds_a_token"]["memory"], lambda r: r["bytes"]["memory"])
    return "\n".join(lines)


def headline():
    """The main README's table: the comparison without costs."""
    rows = [line.split("|")[1:4] for line in comparison().splitlines()]
    kept = [row for row in rows if "BM25" not in row[0] and "original" not in row[0]]
    return "\n".join("|" + "|".join(row) + "|" for row in kept)


def factors():
    """Held-out perplexities of each variant."""
    def cell(value):
        return "" if value is None else f"{value:.2f}"

    lines = ["| variant | memory alone | blend of logits | of probabilities | automatic alpha | seconds to fit |",
             "|---|---:|---:|---:|---:|---:|"]
    for name, result in recorded("factors").items():
        held = result["held_out"]
        columns = [cell(held[key]) for key in ("memory", "blend_logits", "blend_probabilities", "blend_auto")]
        lines.append(f"| {name} | {' | '.join(columns)} | {result['seconds']['decoder']:.0f} |")
    return "\n".join(lines)


def curve():
    names = ("base", "knn_lm", "memory", "blend_probabilities", "blend_auto")
    lines = ["| rows | entries | passes | seconds | " + " | ".join(NAMES[name] for name in names) + " | LoRA |",
             "|---:" * (5 + len(names)) + "|"]
    for rows, run in sorted(curve_runs().items()):
        seconds = sum(run["seconds"][stage] for stage in ("datastore", "index", "neighbours", "decoder"))
        cells = " | ".join(f"{run['held_out'][name]:.1f}" for name in names)
        lora = f"{run['LoRA']:.1f}" if "LoRA" in run else ""
        lines.append(f"| {rows} | {run['entries']:,} | {run['epochs']} | {seconds:.0f} | {cells} | {lora} |")
    return "\n".join(lines)


def text():
    names = ("chrf", "distinct_1", "distinct_2", "repetition", "copied", "words")
    lines = ["| | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for name, figures in recorded("text").items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[key]:.2f}" for key in names) + " |")
    return "\n".join(lines)


def main():
    for table in (headline, comparison, factors, curve, text):
        print(f"\n{table.__name__}\n\n{table()}")
    plot_comparison(), plot_curve(), plot_factors()


if __name__ == "__main__":
    main()
