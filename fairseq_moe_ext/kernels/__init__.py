"""Fast ways to compute what has a plain definition elsewhere; torch only.

    matmul.py                 matrix products; plain twin: torch.mm, torch.addmm
    expert_ffn.py             feed-forward networks of many experts; plain twin: the loop
                              `plain_expert_ffn` of moe/experts.py
    threads.py                one expert a core, where each has few rows; plain twin: a for loop
    linear_cross_entropy.py   the loss without all logits; plain twin: F.cross_entropy

Each is held to its twin in tests/kernels, in outputs and gradients. Which one computes is decided
in one place each: `matmul._by_onednn`, `expert_ffn.kernel_for`, `threads.side_by_side`.
"""
