"""Draw the README's picture from what `make quickstart` measured.

    python docs/learning_curves.py runs/quickstart/result.json    keep its numbers, draw them
    python docs/learning_curves.py      draw the kept numbers again

The picture is 400 pixels wide. Its greys and colours are readable on white and on black; the
background is transparent.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).resolve().parent
GREY = "#7d8590"
COLOURS = {"dense": ("Dense", "#d97706"), "moe": ("MoE, 256 experts", "#3b82f6")}


def points_of(result: dict) -> dict:
    """Model -> [update, perplexity on the validation text of the four domains] of each validation,
    from a quickstart's result."""
    return {
        model: [[v["update"], v["in_domain"]] for v in result["models"][model]["validation"]]
        for model in COLOURS
    }


def draw(points: dict, path: Path) -> None:
    settings = {"svg.hashsalt": "0", "svg.fonttype": "path", "font.size": 12.5, "figure.dpi": 72}
    settings |= {key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor")}
    settings |= {"xtick.color": GREY, "ytick.color": GREY}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(400 / 72, 270 / 72), layout="constrained")
        for (model, (label, colour)), above in zip(COLOURS.items(), (13, -16)):
            updates, perplexities = zip(*points[model])
            axes.plot(updates, perplexities, color=colour, marker="o", markersize=4.5, linewidth=2)
            axes.annotate(f"{label} {perplexities[-1]:.0f}", (updates[-1], perplexities[-1]),
                          xytext=(6, above), textcoords="offset points", ha="right",
                          color=colour)  # fmt: skip
        axes.set_yscale("log")
        ticks = [50, 100, 200, 400, 800]
        axes.set_yticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        axes.set_xticks(range(0, updates[-1] + 1, 100))
        axes.set_ylim(bottom=0.8 * perplexities[-1])
        axes.set(xlabel="updates", ylabel="validation perplexity")
        axes.grid(color=GREY, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    kept = HERE / "learning_curves.json"
    if len(sys.argv) > 1:
        result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        kept.write_text(json.dumps(points_of(result)) + "\n", encoding="utf-8")
    draw(json.loads(kept.read_text(encoding="utf-8")), HERE / "learning_curves.svg")
