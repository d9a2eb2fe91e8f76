"""Draw the README's picture from what `make quickstart` measured.

python docs/learning_curves.py runs/quickstart/result.json docs/learning_curves.svg

The greys and colours are readable on white and on black; the background is transparent.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

GREY = "#7d8590"
COLOURS = {"dense": ("Dense", "#d97706"), "moe": ("MoE, 8 experts", "#3b82f6")}


def draw(result: dict, path: Path) -> None:
    """Perplexity on the validation text of the four domains against updates, both models."""
    settings = {"svg.hashsalt": "0", "svg.fonttype": "path", "font.size": 11}
    settings |= {key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor")}
    settings |= {"xtick.color": GREY, "ytick.color": GREY}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(7, 3.4))
        for model, (label, colour) in COLOURS.items():
            points = result["models"][model]["validation"]
            updates = [point["update"] for point in points]
            perplexities = [point["in_domain"] for point in points]
            axes.plot(updates, perplexities, color=colour, marker="o", markersize=4, linewidth=2)
            axes.annotate(f"{label} {perplexities[-1]:.0f}", (updates[-1], perplexities[-1]),
                          xytext=(8, -4), textcoords="offset points",
                          color=colour)  # fmt: skip
        axes.set_yscale("log")
        ticks = [100, 200, 400, 800]
        axes.set_yticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        axes.set_xticks(range(0, updates[-1], 100))
        axes.set_xlim(right=1.35 * updates[-1])
        axes.set_ylim(bottom=0.85 * perplexities[-1])
        axes.set(xlabel="updates", ylabel="validation perplexity")
        axes.grid(color=GREY, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
