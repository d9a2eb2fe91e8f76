"""The numbers as one HTML page: a template with its style and script inside."""

import json
import math
from pathlib import Path
from typing import Any

from ..evaluation import report
from .result import Inspection

TEMPLATES = Path(__file__).resolve().parent / "templates"


def html(found: Inspection) -> str:
    """One page that needs nothing beside itself."""
    return report.render(
        "inspect.html",
        TEMPLATES,
        title="What the experts do",
        found=found,
        total=sum(found.tokens.values()),
        data=json.loads(json.dumps(_finite(found.to_dict()))),
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
