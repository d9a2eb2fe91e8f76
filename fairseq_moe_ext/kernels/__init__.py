"""Fast kernels for operations that have a plain definition elsewhere; torch only.

    matmul.py                 matrix products; plain twin: torch.mm, torch.addmm
    expert_ffn.py             feed-forward networks of many experts, one by one; plain twin: the
                              loop `plain_expert_ffn` of moe/experts.py
    batched_ffn.py            the same of narrow experts, several at a time; chunks.py: which ones
    two_layers.py             what both share: forward and backward pass, one part after the other
    grouped_ffn.py            the same by grouped products, on a GPU
    stacks.py                 the parameters of many experts
    threads.py                one expert per core, if experts have few rows; plain twin: a for loop
    causal_attention.py       attention in parts that fit the cache; plain twin:
                              F.scaled_dot_product_attention
    dropout.py                sixteen random bits an element; plain twin: F.dropout
    transfer.py               numbers to a GPU, without waiting for it; plain twin: torch.tensor
    linear_cross_entropy.py   the loss without holding all logits; plain twin: F.cross_entropy
    dtypes.py                 float32 where less is too coarse
    first_order.py            refuses second derivatives

tests/kernels compares each with its twin, in outputs and gradients. One place each decides which
computes: `matmul._by_onednn`, `causal_attention.serves`, `dropout._ours`, `expert_ffn.kernel_for`,
`threads.side_by_side`.
"""
