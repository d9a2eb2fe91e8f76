"""Training losses."""

from . import moe_cross_entropy, multiple_choice  # noqa: F401
