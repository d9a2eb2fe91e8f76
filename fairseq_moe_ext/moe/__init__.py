"""The mathematics of a Mixture-of-Experts layer: torch only, no fairseq, no configuration objects.

Alphabet of shapes: T tokens, D model width, F hidden width of an expert, E experts, K choices a
token, N rows (kept choices) in expert order.

    router.py    tokens -> router logits -> Routing, by the layer's settings; routers by name
    routing.py   router logits -> Routing: which experts, with what weight, in which slot
    balance.py   the losses on a routing
    dispatch.py  tokens -> rows in expert order, and back
    experts.py   the feed-forward networks as stacked weights, and the plain loop through them
    exchange.py  rows to the processes that hold their experts, and back
    scope.py     the processes whose tokens are routed together
    stats.py     a Routing -> named figures
    layer.py     MoELayer: the order of the above
"""
