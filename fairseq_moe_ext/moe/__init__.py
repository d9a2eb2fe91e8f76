"""The mathematics of a Mixture-of-Experts layer: torch only, no fairseq, no configuration objects.

Shapes in all comments and docstrings of the package: T tokens, B batch (sequences), S positions of
a sequence, D model width, F hidden width of an expert, E experts, K choices a token, V vocabulary,
N rows (kept choices) in expert order; H attention heads and C candidates or chunk where they occur.

    router.py    tokens -> router logits -> Routing, by the layer's settings: top-k
    routers/     the other routers, by name
    routing.py   router logits -> Routing: which experts, with what weight, in which slot
    balance.py   the losses on a routing
    dispatch.py  tokens -> rows in expert order, and back
    experts.py   the feed-forward networks as stacked weights, and the plain loop through them
    activations.py  gated linear units
    exchange.py  rows to the processes that hold their experts, and back
    scope.py     the processes whose tokens are routed together
    stats.py     a Routing -> named metrics
    layer.py     MoELayer: the order of the above
"""
