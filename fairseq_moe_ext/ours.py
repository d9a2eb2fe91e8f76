"""Which runs use something of this plugin. All others stay as stock fairseq has them."""

from typing import Any, Mapping, Optional

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks import TASK_REGISTRY

_REGISTRIES = {"arch": ARCH_MODEL_REGISTRY, "task": TASK_REGISTRY, "criterion": CRITERION_REGISTRY}


def are_named(names: Mapping[str, Any], optimizer: bool = False) -> bool:
    """Whether a model, task or criterion of ours is among the names, by kind.

    Args:
        optimizer: one of ours counts, too. It trains any model.
    """
    registries = {**_REGISTRIES, "optimizer": OPTIMIZER_REGISTRY} if optimizer else _REGISTRIES
    classes = [registry.get(names.get(kind)) for kind, registry in registries.items()]
    return any(cls is not None and is_ours(cls) for cls in classes)


def is_run(cfg: Any) -> bool:
    """Whether a training has a model, a task or a criterion of ours; cfg: its settings by group."""
    groups = {"arch": "model", "task": "task", "criterion": "criterion"}
    return are_named({kind: name_of(cfg.get(group)) for kind, group in groups.items()})


def in_step(task: Any, model: Any, criterion: Any) -> bool:
    """As is_run, of what a step is taken with. The model may be wrapped for several processes."""
    return hasattr(model, "has_experts") or is_ours(type(task)) or is_ours(type(criterion))


def is_ours(cls: type) -> bool:
    """Whether a class is of this package, or derived from one."""
    return any(base.__module__.startswith(f"{__package__}.") for base in cls.__mro__)


def is_stocks(cls: Optional[type]) -> bool:
    """Whether a class is fairseq's own; None: of a name that nothing is registered under."""
    return cls is not None and cls.__module__.partition(".")[0] in ("fairseq", "fairseq_cli")


def name_of(group: Any) -> Any:
    """The name of what a group of settings is for: a criterion, an architecture, ..."""
    return group.get("_name") if isinstance(group, Mapping) else None
