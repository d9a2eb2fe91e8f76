"""What "equal within a relative tolerance" means in these tests."""

import torch


def assert_near(actual, expected, rtol, name="", scale=None):
    """max |actual - expected| <= rtol * scale, where scale is max |expected| unless given.

    The tolerance is relative to a tensor's largest entry, not to each entry: a gradient is a sum of
    terms that cancel, and where they cancel to almost nothing no order of summation is more right
    than another.
    """
    actual = torch.as_tensor(actual).detach().to(torch.float64)
    expected = torch.as_tensor(expected).detach().to(torch.float64)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if not expected.numel():
        return
    if scale is None:
        scale = float(expected.abs().max())
    error = float((actual - expected).abs().max())
    assert error <= rtol * scale, f"{name}: off by {error:.3g}, allowed {rtol} * {scale:.3g}"


def assert_stats_near(actual, expected, rtol):
    """Two dictionaries of figures, each within rtol of its own size, with two exceptions.

    Percentages are float32 whatever the precision of the gate, in the branch and here: 1e-6. The
    entropy is compared with 1 nat, as a probability near 1 is known to an absolute precision only.
    """
    assert set(actual) == set(expected)
    for key, value in expected.items():
        if key == "entropy_gating":
            assert_near(float(actual[key]), float(value), rtol, key, scale=max(1.0, float(value)))
        else:
            assert_near(float(actual[key]), float(value), max(rtol, 1e-6), key)
