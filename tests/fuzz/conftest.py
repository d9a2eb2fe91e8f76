"""Data and models of other folders' tests."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("tasks", "priming", "study")]
