"""A scaling law fitted to the points of one's own study, with intervals.

The form is Clark et al.'s (arXiv 2202.01169): log L = a log N + b log Ê + c log N log Ê + d,
logarithms to base 10, with Ê saturated as theirs for S-BASE. Here N is the compute of a model: its
training FLOPs per token, divided by six. So effective size over size is the saving in FLOPs.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from ..errors import UserError
from ..student_t import t_quantile
from .laws import S_BASE, Clark, saturate

COEFFICIENTS = ("a", "b", "c", "d")
_ROUNDING = 1e-9  # of a slope; that of equal losses is not exactly 0


class Point(NamedTuple):
    """A trained model."""

    size: float  # training FLOPs per token, divided by six
    experts: int  # 1: dense
    loss: float  # nats per token


class Estimate(NamedTuple):
    value: float
    low: float  # ends of the 95 % interval
    high: float


class Fit(NamedTuple):
    law: Clark
    intervals: Tuple[Estimate, ...]  # of a, b, c, d
    covariance: np.ndarray  # (4, 4)
    quantile: float  # of Student's t
    residual: float  # root mean square of log10 L, by degrees of freedom

    @property
    def dense_slope(self) -> Estimate:
        """d log L / d log N of dense models."""
        of = np.array([1.0, 0.0, math.log10(self.law.start), 0.0])  # by a, b, c, d
        value = self.law.slope(self.law.start)
        wide = self.quantile * math.sqrt(of @ self.covariance @ of)
        return Estimate(value, value - wide, value + wide)

    def saving(self, size: float, experts: int) -> Estimate:
        """How many times more FLOPs a dense model needs for the same loss, with its interval from
        the linear approximation of the law's logarithm."""

        def log_saving(coefficients: np.ndarray) -> float:
            a, b, c, d = coefficients
            law = self.law._replace(a=a, b=b, c=c, d=d)
            return law.log_effective(size, experts) - math.log10(size)

        best = np.array([getattr(self.law, name) for name in COEFFICIENTS])
        value = log_saving(best)
        steps = np.diag(np.maximum(1e-6, 1e-6 * np.abs(best)))
        slopes = np.array(
            [(log_saving(best + s) - log_saving(best - s)) / (2 * s.sum()) for s in steps]
        )
        wide = self.quantile * math.sqrt(max(0.0, slopes @ self.covariance @ slopes))
        with np.errstate(over="ignore"):  # infinity
            return Estimate(*(float(np.power(10, x)) for x in (value, value - wide, value + wide)))


def fit(points: Sequence[Point]) -> Fit:
    """Least squares in log L. Raises UserError for points that do not determine the law: it takes
    three numbers of experts with the dense model among them, two sizes each, six points, and dense
    models whose loss falls with size, because a saving is measured along them."""
    _check(points)
    log_n = np.log10([point.size for point in points])
    log_e = np.log10([saturate(p.experts, S_BASE.start, S_BASE.most) for p in points])
    inputs = np.stack([log_n, log_e, log_n * log_e, np.ones_like(log_n)], axis=1)  # (P, 4)
    log_loss = np.log10([point.loss for point in points])
    best = np.linalg.lstsq(inputs, log_loss, rcond=None)[0]
    freedom = len(points) - len(best)
    variance = float(((log_loss - inputs @ best) ** 2).sum()) / freedom
    covariance = variance * np.linalg.inv(inputs.T @ inputs)
    quantile = t_quantile(0.975, freedom)
    wide = quantile * np.sqrt(np.diag(covariance))
    a, b, c, d = map(float, best)
    law = Clark(a, b, c, d, S_BASE.start, S_BASE.most)
    intervals = tuple(Estimate(float(x), float(x - w), float(x + w)) for x, w in zip(best, wide))
    found = Fit(law, intervals, covariance, quantile, math.sqrt(variance))
    if found.dense_slope.value > -_ROUNDING:
        raise UserError(
            "its larger dense models are not better, and a saving is measured along them: add "
            "larger models or seeds, or train for longer"
        )
    return found


def _check(points: Sequence[Point]) -> None:
    sizes = {
        experts: {point.size for point in points if point.experts == experts}
        for experts in sorted({point.experts for point in points})
    }
    seen = ", ".join(map(str, sizes)) or "none"
    if len(sizes) < 3 or 1 not in sizes:
        raise UserError(
            f"the points have the expert counts {seen}; a law needs three, with dense "
            "models (1) among them: train other numbers of experts"
        )
    for experts, of_it in sizes.items():
        if len(of_it) < 2:
            raise UserError(f"only one size with {experts} experts; a law needs two: train another")
    if len(points) < 6:
        raise UserError(f"{len(points)} points; four coefficients need six: train more")
