"""Draws what benchmarks/compare.py measured, as four pictures in benchmarks/pictures/, and prints its shares as one table.

    python benchmarks/plots.py build/compare/rows build/compare/demo
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from compare import markdown, rows_of
from rivals import CORRECTION, KNN_LM, ROUTER

TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.5, 2, 3)
OURS, OTHERS = "#c2570c", "#47617d"  # what uses the memory, in its colour on the page, and what does not
OWN = ("memory alone", "blend of logits", "blend of probabilities", "automatic alpha", CORRECTION, ROUTER)


def read(folder):
    """The results of all seeds of a folder."""
    return [json.loads(file.read_text()) for file in sorted(Path(folder).glob("seed_*.json"))]


def title(results):
    setting = results[0]["setting"]
    return f"{setting['rows']:,} rows, {setting['entries']:,} entries, {len(results)} seed{'s' * (len(results) > 1)}"


def share_table(measured):
    """A Markdown table: every rival's perplexity as a share of the base's, means over seeds.

    Two columns for each list of results: held-out text, and text from elsewhere.
    """
    folders = [rows_of(results) for results in measured]
    lines = []
    for name in dict.fromkeys(name for rows in folders for name in rows):
        found = [[row[key] for row in rows.get(name, []) if key in row] for rows in folders for key in ("share", "cost")]
        lines.append([name, *(f"{np.mean(values):.3f}" if values else "" for values in found)])
    return markdown(["", *(head for results in measured for head in (title(results), "elsewhere"))], lines)


def panels(folders, wide, high):
    """A figure with one panel a folder, and pairs (panel, results)."""
    figure = Figure(figsize=(wide * len(folders), high), layout="constrained")
    axes = figure.subplots(1, len(folders), squeeze=False)[0]
    pairs = [(panel, read(folder)) for panel, folder in zip(axes, folders, strict=True)]
    for panel, results in pairs:
        panel.set_title(title(results), fontsize=10, loc="right")
    return figure, pairs


def draw_dots(panel, results, key, label):
    """A line of dots a rival, one dot a seed, the least at the top."""
    rows = {name: [row[key] for row in found if row.get(key)] for name, found in rows_of(results).items()}
    names = sorted((name for name in rows if rows[name]), key=lambda name: -np.mean(rows[name]))
    for height, name in enumerate(names):
        panel.plot(rows[name], [height] * len(rows[name]), "o", color=OURS if name in OWN else OTHERS)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel(label)
    panel.set_xscale("log")
    if key == "share":  # the others go over powers of ten
        low, high = panel.get_xlim()
        ticks = [tick for tick in TICKS if low <= tick <= high]
        panel.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    if key != "megabytes":
        panel.axvline(1, color="gray", linestyle="--")


def draw_alphas(panel, results):
    """Held-out perplexity over alpha of the first seed, under both rules and the gate."""
    sweep, base = results[0]["setting"]["alpha_sweep"], results[0]["memory"]["base"]["perplexity"]
    for rule, style in (("logits", "-"), ("probabilities", "--")):
        panel.plot(sweep["alpha"], np.array(sweep[rule]) / base, style, color=OURS, label=f"blend of {rule}")
    panel.axhline(results[0]["memory"]["automatic alpha"]["perplexity"] / base, color=OURS, linestyle=":", label="automatic alpha")
    panel.axhline(results[0]["kNN-LM"][KNN_LM]["perplexity"] / base, color=OTHERS, linestyle=":", label="kNN-LM")
    panel.set(xlabel="alpha", ylabel="held-out perplexity, of the base's")
    panel.legend()


def main():
    folders = sys.argv[1:]
    if not folders or not all(read(folder) for folder in folders):
        sys.exit("Name folders in which benchmarks/compare.py has left seed_N.json.")
    drawings = {"shares": (partial(draw_dots, key="share", label="held-out perplexity, of the base's"), 7, 4.2),
                "elsewhere": (partial(draw_dots, key="cost", label="perplexity of other text, of the base's"), 7, 4.2),
                "sizes": (partial(draw_dots, key="megabytes", label="megabytes to keep"), 7, 4.2), "alphas": (draw_alphas, 5, 3.6)}
    (HERE / "pictures").mkdir(exist_ok=True)
    for name, (draw, wide, high) in drawings.items():
        figure, pairs = panels(folders, wide, high)
        for panel, results in pairs:
            draw(panel, results)
        figure.savefig(HERE / f"pictures/{name}.png", dpi=110)
    print(share_table([read(folder) for folder in folders]))


if __name__ == "__main__":
    main()
