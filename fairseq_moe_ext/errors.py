"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake in a flag, a file or the data that the user can put right.

    The message is one line that names the flag or file, its value and the remedy. The command line
    prints it as ``error: <message>`` and exits with status 1, without a traceback.
    """


def not_finite(layer: int, training: bool = True) -> UserError:
    """What to raise when the router of a layer, counted from 0, yields NaN or infinity."""
    remedy = "training diverged; lower --lr, lengthen --warmup-updates, or use "
    remedy += "--moe-gating-use-fp32 or --moe-z-loss-wt 0.001, from the last good checkpoint"
    if not training:
        remedy = "the checkpoint is damaged or its training diverged; use an earlier one"
    return UserError(f"the router of layer {layer} (from 0) yields NaN or infinity: {remedy}")
