"""Small experts, computed as those of real sizes are."""

import contextlib
from unittest import mock

from fairseq_moe_ext.kernels import chunks, matmul


@contextlib.contextmanager
def as_wide():
    """Each expert by itself, and in float32 with the spare rows that oneDNN's programs want."""
    with mock.patch.object(chunks, "_NARROW", 0), mock.patch.object(matmul, "_faster", True):
        yield
