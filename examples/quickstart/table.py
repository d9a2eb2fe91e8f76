"""The table of the quickstart's result: perplexity and cost of both models, side by side."""

from typing import Dict, List, Sequence, Tuple

from fairseq_moe_ext import wording
from fairseq_moe_ext.wording import clock

DENSE, MOE = "dense", "moe"
MODELS = (DENSE, MOE)
LABELS = {DENSE: "Dense", MOE: "MoE"}


def mean_perplexity(values: Sequence[float]) -> float:
    """The plain mean over domains, as the paper's and as the training log's in_domain_ppl."""
    return sum(values) / len(values)


def domains(result: Dict, held_out: bool) -> List[Dict]:
    return [domain for domain in result["domains"] if domain["held_out"] == held_out]


def mean(result: Dict, model: str, held_out: bool) -> float:
    perplexity = result["models"][model]["perplexity"]
    return mean_perplexity([perplexity[d["name"]] for d in domains(result, held_out)])


def change(dense: float, moe: float) -> float:
    """How far the MoE model's value is above (+) or below (-) the dense model's, in per cent."""
    return 100 * (moe / dense - 1)


def signed(percent: float) -> str:
    return f"{wording.signed(percent)} %"


def big(value: float) -> str:
    """1234567 -> "1.23 M", 80 -> "80 ", so that a unit can follow."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return (
                f"{value / size:,.3g}{letter}"
                if value < 1000 * size
                else f"{value / size:,.0f}{letter}"
            )
    return f"{value:g} "


def rows(result: Dict) -> List[Tuple[str, ...]]:
    """The one table: (what, dense, MoE, MoE against dense); a single cell heads a group."""
    dense, moe = (result["models"][name] for name in MODELS)

    def perplexities(held_out: bool) -> List[Tuple[str, ...]]:
        found = []
        for domain in domains(result, held_out):
            a, b = dense["perplexity"][domain["name"]], moe["perplexity"][domain["name"]]
            found.append((domain["title"], f"{a:.2f}", f"{b:.2f}", signed(change(a, b))))
        a, b = mean(result, DENSE, held_out), mean(result, MOE, held_out)
        return found + [("Mean", f"{a:.2f}", f"{b:.2f}", signed(change(a, b)))]

    def ratio(key: str) -> str:
        return f"× {moe[key] / dense[key]:.2f}"

    table: List[Tuple[str, ...]] = [("Test perplexity in domain (lower is better)",)]
    table += perplexities(False)
    table += [("Test perplexity out of domain (never trained on)",)]
    table += perplexities(True)
    table += [
        ("Cost",),
        *(
            (what, big(dense[key]), big(moe[key]), ratio(key))
            for what, key in (
                ("Parameters", "parameters"),
                ("Parameters used by a token", "active_parameters"),
                ("FLOPs per token, training", "flops_per_token"),
                ("FLOPs, whole training", "training_flops"),
                ("Tokens trained on", "training_tokens"),
            )
        ),
        (
            "Training time (min:s)",
            clock(dense["training_seconds"]),
            clock(moe["training_seconds"]),
            ratio("training_seconds"),
        ),
    ]
    return table


def terminal_table(result: Dict) -> str:
    """`rows` in fixed width, for the terminal."""
    cells = rows(result)
    widths = [max(len(row[i]) for row in cells if len(row) > 1) for i in range(4)]
    widths = [
        max(width, len(head)) for width, head in zip(widths, ("", "Dense", "MoE", "MoE : dense"))
    ]

    def line(row: Sequence[str]) -> str:
        return row[0].ljust(widths[0]) + "".join(
            c.rjust(w + 2) for c, w in zip(row[1:], widths[1:])
        )

    out = [line(("", "Dense", "MoE", "MoE : dense"))]
    for row in cells:
        out.append("─" * (sum(widths) + 6) + "\n" + row[0] if len(row) == 1 else line(row))
    return "\n".join(out)
