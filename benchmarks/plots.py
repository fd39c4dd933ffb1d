"""The figures of benchmarks/README.md, from what the other benchmarks left in results/.

    python benchmarks/plots.py
"""

import matplotlib
from common import RESULTS, recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"base": "base alone", "knn_lm": "kNN-LM", "LoRA": "LoRA", "fully tuned": "fully tuned", "memory": "memory alone",
         "blend_logits": "blend of logits", "blend_probabilities": "blend of probabilities", "blend_auto": "automatic alpha"}


def of(run, key, where):
    if key in ("LoRA", "fully tuned"):
        return run[key]["legal" if where == "held_out" else "off_domain"]
    return run[where][key]


def plot_comparison():
    """Legal gain against off-domain cost: the mean of the seeds, the range as bars."""
    runs = list(recorded("quality").values())
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for key, name in NAMES.items():
        points = [[of(run, key, where) for run in runs] for where in ("held_out", "off_domain")]
        x, y = (sum(values) / len(values) for values in points)
        errors = [[[mean - min(values)], [max(values) - mean]] for mean, values in zip((x, y), points, strict=True)]
        axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], marker="o", capsize=3)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5))
    axes.set(xlabel="perplexity on held-out legal text (lower is better)", ylabel="perplexity on WikiText-2 (lower is better)",
             title="What each way of adapting gains, and what it costs elsewhere", yscale="log")
    axes.margins(x=0.2)
    figure.savefig(RESULTS / "comparison.png", dpi=120)


def plot_curve():
    runs = {int(rows): run for rows, run in recorded("curve").items()}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = sorted(runs)
    for key in ("base", "knn_lm", "memory", "blend_probabilities", "blend_auto"):
        axes.plot(rows, [runs[n]["held_out"][key] for n in rows], marker="o", label=NAMES[key])
    axes.plot(rows, [runs[n]["LoRA"] for n in rows], marker="s", linestyle="--", label="LoRA, same seconds")
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
    axes.set(xlabel="held-out legal perplexity", title="One factor at a time", xscale="log")
    axes.legend()
    figure.savefig(RESULTS / "factors.png", dpi=120)


def main():
    plot_comparison(), plot_curve(), plot_factors()


if __name__ == "__main__":
    main()
