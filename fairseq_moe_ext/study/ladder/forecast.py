"""What the published laws and DeepMind's curves say that each arm will save, before it is trained.

A law's N is taken as training FLOPs a token / 6, as `fairseq-moe forecast --fit` takes it, so that
its saving is one of FLOPs. Where a law counts all parameters of a sparse model (Krajewski, Abnar),
they are that and the parameters of the experts that a token leaves out. The trend continues the
factors of Clark et al.'s published curves (google-deepmind/scaling_laws_for_routing,
data/curves.csv.gz: 25M parameters, S-BASE in every layer), computed by this project's definition,
to fewer tokens: ln factor is linear in ln tokens.
"""

import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, TypedDict

from ... import cost, files, outputs
from ...errors import UserError
from ...evaluation.study_result import as_written
from ...forecast.laws import LAWS, Model, outside
from ...shape import Shape, shape_of
from ...text_table import markdown
from .stages import LR, Arm, Ladder

# number of experts -> factor at 5.2 and at 126 billion tokens
CURVES = {8: (1.91, 2.20), 64: (3.15, 4.83), 256: (3.80, 7.38)}
CURVES_UNLIKE = {64: (4.28, 7.03), 256: (6.01, 12.3)}  # on EuroParl, unlike most of the training
Curves = Mapping[int, Tuple[float, float]]
CURVE_TOKENS = (5.2e9, 126e9)
CURVE_TOKENS_PER_UPDATE = 5.2e5


class Forecast(TypedDict):
    """Of one arm on one number of tokens; None where there is no number."""

    arm: str
    tokens: int
    laws: Dict[str, Optional[float]]  # law -> saving in FLOPs
    trend_tokens: Optional[float]  # continued to as many tokens
    trend_updates: Optional[float]  # continued to as many updates


def training_flops(arm: Arm, ladder: Ladder) -> float:
    """Of a token, as `fairseq-moe cost` counts them."""
    return cost.training_flops_per_token(_shape(arm, ladder), ladder.context)


def router_flops(arm: Arm, ladder: Ladder) -> float:
    """Training FLOPs a token of the linear routers, which the count leaves out."""
    shape = _shape(arm, ladder)
    if not shape.gates:
        return 0.0
    logits = shape.experts + (shape.null_experts > 0)  # null experts share one
    return 6.0 * len(shape.sparse) * shape.dim * logits


def router(arm: Arm, ladder: Ladder) -> str:
    """Its name; "" of a dense arm."""
    return ladder.settings(arm).get("moe_router", "topk") if arm.family == "moe" else ""


def _shape(arm: Arm, ladder: Ladder) -> Shape:
    return shape_of(ladder.settings(arm), ladder.vocabulary)


def forecasts(ladder: Ladder) -> List[Forecast]:
    """One for each sparse arm and number of tokens. Skips arms that no law tells from an earlier
    one with the same router: they differ in precision or score, for example."""
    found = []
    budgets = {stage.tokens: stage for stage in ladder.stages if stage.name != LR}
    for tokens, stage in sorted(budgets.items()):
        seen = set()
        for arm in ladder.arms:
            model = model_of(arm, ladder, tokens)
            alike = (model, router(arm, ladder))
            if arm.family == "dense" or alike in seen:
                continue
            seen.add(alike)
            learned = _shape(arm, ladder).gates  # as in S-BASE, which the trend is of
            updates = stage.updates * CURVE_TOKENS_PER_UPDATE
            found.append(
                Forecast(
                    arm=arm.name,
                    tokens=tokens,
                    laws={name: _saving(name, model) for name in LAWS},
                    trend_tokens=trend(arm.experts, tokens) if learned else None,
                    trend_updates=trend(arm.experts, updates) if learned else None,
                )
            )
    return found


def model_of(arm: Arm, ladder: Ladder, tokens: float) -> Model:
    """An arm as the laws see it."""
    shape = _shape(arm, ladder)
    size = training_flops(arm, ladder) / 6
    sparse = len(shape.sparse) / shape.layers
    parameters = cost.parameters(shape)
    idle = float(parameters.total - parameters.active)
    return Model(size, arm.experts, tokens, 1, float(arm.granularity), sparse, idle)


def _saving(law: str, model: Model) -> Optional[float]:
    saving = LAWS[law].effective(model) / model.active
    return saving if math.isfinite(saving) else None


def trend(experts: int, tokens: float, curves: Curves = CURVES) -> Optional[float]:
    """The factor by DeepMind's curves; between their numbers of experts, ln factor is linear in ln
    experts. None outside those."""
    first, last = (math.log(x) for x in CURVE_TOKENS)
    along = (math.log(tokens) - first) / (last - first)
    logs = {e: math.log(a) + along * math.log(b / a) for e, (a, b) in curves.items()}
    counts = list(curves)
    for low, high in zip(counts, counts[1:]):
        if low <= experts <= high:
            r = math.log(experts / low) / math.log(high / low)
            return math.exp(logs[low] + r * (logs[high] - logs[low]))
    return None


def table(found: List[Forecast]) -> List[List[str]]:
    names = [law.name for law in LAWS.values()]
    rows = [["arm, tokens", *names, "trend by tokens", "trend by updates"]]
    for one in found:
        numbers = [*one["laws"].values(), one["trend_tokens"], one["trend_updates"]]
        cells = ["-" if value is None else f"{value:.2f}" for value in numbers]
        rows.append([f"{one['arm']}, {one['tokens'] / 1e6:g}M", *cells])
    return rows


def read(path: Path) -> List[Forecast]:
    """The forecasts of a file that `write` wrote; none if there is no file. Raises UserError for
    any other file."""
    if not path.is_file():
        return []
    with as_written(path):
        return [
            Forecast(**{key: one[key] for key in Forecast.__annotations__})  # type: ignore[typeddict-item]
            for one in files.read_json(path)["forecasts"]
        ]


def write(ladder: Ladder) -> Path:
    """The forecasts as JSON beside the ladder's file, and as a page of Markdown. Raises UserError
    where there is one: a forecast is not made anew when results are known."""
    path = ladder.forecast
    text = path.with_suffix(".md")
    for there in (path, text):
        if there.exists():
            raise UserError(f"{there}: exists; delete it to forecast anew")
    found = forecasts(ladder)
    outside_of = {
        law.name: sorted({w for f in found for w in outside(law, _model(f, ladder))})
        for law in LAWS.values()
    }
    content: Dict[str, Any] = {"forecasts": found, "outside": outside_of}
    words = [f"- {name}: {'; '.join(said)}" for name, said in outside_of.items() if said]
    parts = [
        "# What each arm should save, before it is trained",
        "How many times the training FLOPs a dense model needs for the same loss on the same "
        "tokens. " + " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        markdown(table(found)),
    ]
    if words:
        parts += [
            "These laws are used outside the range that they were fitted in:",
            "\n".join(words),
        ]
    outputs.write_text(text, "\n\n".join(parts) + "\n")
    outputs.write_json(path, content)
    return path


def _model(found: Forecast, ladder: Ladder) -> Model:
    arm = next(arm for arm in ladder.arms if arm.name == found["arm"])
    return model_of(arm, ladder, found["tokens"])
