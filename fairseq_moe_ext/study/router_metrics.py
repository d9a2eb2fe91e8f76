"""What a training's log says of its routers: load, drops, and the FLOPs that were computed."""

from pathlib import Path

from .. import cost
from ..evaluation.study_result import RouterMetrics
from ..shape import Shape
from . import logs

LAST = 0.2  # the share of a training, at its end, over which load and drops are averaged


def router_metrics(log: Path, shape: Shape, context: int) -> RouterMetrics:
    """From fairseq-train's log. Dropped choices are not computed, and some routers settle the
    number of experts per token by themselves, so the FLOPs are by what was logged."""
    lines = [v for v in logs.without_repeats(log, "train_inner") if "load_max" in v]
    if not lines:
        return {}
    late = lines[-max(1, round(LAST * len(lines))) :]
    wanted = [float(v["experts_per_token"]) for v in lines]
    computed = [n * (1 - float(v["overflow"]) / 100) for n, v in zip(wanted, lines)]
    top_1_flops, top_2_flops = (  # linear in the number of experts that compute
        cost.training_flops_per_token(shape._replace(top_k=k, null_experts=0), context)
        for k in (1, 2)
    )
    return {
        "load_max": sum(float(v["load_max"]) for v in late) / len(late),
        "overflow": sum(float(v["overflow"]) for v in late) / len(late),
        "experts_per_token": sum(wanted) / len(wanted),
        "flops_per_token": top_1_flops
        + (top_2_flops - top_1_flops) * (sum(computed) / len(computed) - 1),
    }
