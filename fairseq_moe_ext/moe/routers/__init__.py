"""Routers by name, one per file; importing this package registers them (docs/routers.md).

    sinkhorn.py       Sinkhorn's plan chooses in training, scores at evaluation (S-BASE)
    base.py           balanced assignment in training, the best expert at evaluation (BASE)
    hash.py           a table of experts by token id
    threshold.py      every expert whose score exceeds its moving quantile
    relu.py           every expert whose logit is positive, under an adaptive L1 loss (ReMoE)
    random.py         gates that are never trained: the control

`topk` is TopKRouter itself (../router.py), which the others extend.
"""

from . import base, hash, random, relu, sinkhorn, threshold

__all__ = ["base", "hash", "random", "relu", "sinkhorn", "threshold"]
