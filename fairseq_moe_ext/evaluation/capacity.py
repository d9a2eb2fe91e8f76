"""`fairseq-moe evaluate --sweep-capacity`: perplexity and speed against the experts' capacity."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence, TypedDict, Union

from ..errors import UserError
from ..wording import small
from . import figures, report
from .loading import set_gates
from .perplexity import Evaluation, MeanResult, SetResult

if TYPE_CHECKING:
    from fairseq.models import FairseqLanguageModel

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
    found = []
    for word in words:
        try:
            found.append(float(word))
        except ValueError:
            found.append(math.nan)
        if not 0 < found[-1] <= 1:
            raise UserError(f"{flag} {word}: use shares of a batch above 0 up to 1, as 0.05,0.25,1")
    return found


def set_capacity(model: "FairseqLanguageModel", fraction: float) -> None:
    """From now on an expert takes ceil(fraction * tokens) of a batch; 1.0: all."""
    set_gates(model, dropless=False, eval_token_fraction=fraction)


def summary(found: AtCapacity) -> Summary:
    sets = found["sets"].values()
    tokens = sum(one["tokens"] for one in sets)
    dropped = None
    shares = [(one["tokens"], one["dropped"]) for one in sets if one["dropped"] is not None]
    if len(shares) == len(sets):
        dropped = sum(count * sum(share) / len(share) for count, share in shares) / tokens
    return {
        "capacity": found["capacity"],
        "perplexity": found["mean"]["all"]["perplexity"],
        "dropped": dropped,
        "tokens_per_second": tokens / sum(one["tokens"] / one["tokens_per_second"] for one in sets),
    }


def table(results: Sequence[AtCapacity]) -> List[List[str]]:
    """A row a capacity, below a row of headings."""
    rows = [list(COLUMNS)]
    for one in map(summary, results):
        lost = "" if one["dropped"] is None else small(100 * one["dropped"])
        speed = f"{one['tokens_per_second']:,.0f}"
        rows.append([f"{one['capacity']:g}", f"{one['perplexity']:.2f}", lost, speed])
    return rows


def write_page(path: Path, model: Path, results: Sequence[AtCapacity]) -> None:
    """One HTML page: the mean's charts of perplexity and of speed, each set's perplexity, the
    table. Error bars: 95 % of the bootstrap."""
    at = [found["capacity"] for found in results]
    means = [found["mean"]["all"] for found in results]
    speeds = [summary(found)["tokens_per_second"] for found in results]
    page = report.render(
        "capacity.html",
        title="Perplexity and speed against capacity",
        model=str(model),
        whole=[
            _perplexities("Mean perplexity", at, means),
            _chart("Speed", "tokens a second", figures.Series("", list(zip(at, speeds)), 1)),
        ],
        table=report.table(COLUMNS, table(results)[1:]),
        sets=[
            _perplexities(name, at, [found["sets"][name] for found in results])
            for name in results[0]["sets"]
        ],
    )
    report.write(path, page)


def _perplexities(
    title: str, at: Sequence[float], found: Sequence[Union[MeanResult, SetResult]]
) -> figures.Chart:
    points = [(share, one["perplexity"]) for share, one in zip(at, found)]
    line = figures.Series("", points, 0, [one["interval"] for one in found])
    return _chart(title, "perplexity", line)


def _chart(title: str, label: str, line: figures.Series) -> figures.Chart:
    return figures.line_chart(title, [line], "capacity, share of a batch", label, log_x=True)
