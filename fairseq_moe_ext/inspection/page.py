"""The numbers as one HTML page: a template with its style and script inside."""

import math
from pathlib import Path
from typing import Any, Dict

from ..evaluation import report

TEMPLATES = Path(__file__).resolve().parent / "templates"


def html(inspection: Dict[str, Any]) -> str:
    """One page that needs nothing beside itself, from what Inspection.to_dict gives."""
    return report.render(
        "inspect.html",
        TEMPLATES,
        title="What the experts do",
        inspection=inspection,
        total=sum(inspection["tokens"].values()),
        data=_finite(inspection),
    )


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity; and no reader wants eight digits."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
