"""`fairseq-moe evaluate --sweep-capacity`: perplexity and speed against the experts' capacity."""

import math
from pathlib import Path
from typing import Any, Collection, List, Mapping, Optional, Sequence, TypedDict, Union

from fairseq.models import FairseqLanguageModel

from .. import outputs
from ..errors import UserError
from ..wording import small
from . import figures, report
from .loading import moe_layers, set_gates
from .perplexity import Evaluation, MeanResult, SetResult

COLUMNS = ("capacity", "mean perplexity", "dropped %", "tokens/s")


class AtCapacity(Evaluation):
    """An evaluation at one capacity."""

    capacity: float


class Summary(TypedDict):
    """One capacity over all sets."""

    capacity: float
    perplexity: float  # mean
    dropped: Optional[float]  # share of the choices; None without experts
    tokens_per_second: float


def parse(flag: str, words: Sequence[str]) -> List[float]:
    """Capacities as a user gave them. Raises UserError for one that is not in (0, 1]."""
    capacities = []
    for word in words:
        try:
            capacities.append(float(word))
        except ValueError:
            capacities.append(math.nan)
        if not 0 < capacities[-1] <= 1:
            raise UserError(f"{flag} {word}: use shares of a batch above 0 up to 1, as 0.05,0.25,1")
    return capacities


def check_model(model: FairseqLanguageModel, flag: str) -> None:
    """Raise UserError for a model in which a capacity has no effect; flag: that asks for one, with
    its value."""
    gates = [moe.gate for moe in moe_layers(model).values()]
    if all(gate.capacity_free for gate in gates):
        what = "its router" if gates else "a dense model"
        raise UserError(f"{flag}: has no effect, because {what} has no capacity; remove it")


def set_capacity(model: FairseqLanguageModel, fraction: float) -> None:
    """From now on an expert takes ceil(fraction * tokens) of a batch; 1.0: all."""
    set_gates(model, dropless=False, eval_token_fraction=fraction)


def summary(evaluation: AtCapacity) -> Summary:
    sets = evaluation["sets"].values()
    tokens = sum(values["tokens"] for values in sets)
    return {
        "capacity": evaluation["capacity"],
        "perplexity": evaluation["mean"]["all"]["perplexity"],
        "dropped": dropped(sets),
        "tokens_per_second": tokens
        / sum(values["tokens"] / values["tokens_per_second"] for values in sets),
    }


def dropped(sets: Collection[Mapping[str, Any]]) -> Optional[float]:
    """Share of the choices that was dropped, over all tokens of some sets; None without experts."""
    if any(values["dropped"] is None for values in sets):
        return None
    lost = sum(v["tokens"] * sum(v["dropped"]) / len(v["dropped"]) for v in sets)
    return lost / sum(values["tokens"] for values in sets)


def table(results: Sequence[AtCapacity]) -> List[List[str]]:
    """A row a capacity, below a row of headings."""
    rows = [list(COLUMNS)]
    for row in map(summary, results):
        lost = "" if row["dropped"] is None else small(100 * row["dropped"])
        speed = f"{row['tokens_per_second']:,.0f}"
        rows.append([f"{row['capacity']:g}", f"{row['perplexity']:.2f}", lost, speed])
    return rows


def write_page(path: Path, model: Path, results: Sequence[AtCapacity]) -> None:
    """One HTML page: the mean's charts of perplexity and of speed, each set's perplexity, the
    table. Error bars: 95 % of the bootstrap."""
    at = [result["capacity"] for result in results]
    means = [result["mean"]["all"] for result in results]
    speeds = [summary(result)["tokens_per_second"] for result in results]
    page = report.render(
        "capacity.html",
        title="Perplexity and speed against capacity",
        model=str(model),
        whole=[
            _perplexities("Mean perplexity", at, means),
            _chart("Speed", "tokens per second", figures.Series("", list(zip(at, speeds)), 1)),
        ],
        table=report.table(COLUMNS, table(results)[1:]),
        sets=[
            _perplexities(name, at, [result["sets"][name] for result in results])
            for name in results[0]["sets"]
        ],
    )
    outputs.write_text(path, page)


def _perplexities(
    title: str, at: Sequence[float], results: Sequence[Union[MeanResult, SetResult]]
) -> figures.Chart:
    points = [(share, values["perplexity"]) for share, values in zip(at, results)]
    line = figures.Series("", points, 0, [values["interval"] for values in results])
    return _chart(title, "perplexity", line)


def _chart(title: str, label: str, line: figures.Series) -> figures.Chart:
    return figures.line_chart(title, [line], "capacity, share of a batch", label, log_x=True)
