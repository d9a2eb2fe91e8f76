"""Numbers that the paper printed (Artetxe et al. 2021, arXiv 2112.10684), to compare with.

Table 1 as printed; figures 1 and 2 as read off them (perplexities within 0.05, factors within 0.1).
"""

from typing import Dict, List, NamedTuple, Tuple

TOKENS = 300e9
CONTEXT = 2048
TYPES_OF_TABLE_1 = 50_000  # with which the printed FLOPs come out; the models have 51,200


class Row(NamedTuple):
    """A row of table 1; experts: 0 for a dense model."""

    name: str
    layers: int
    dim: int
    heads: int
    experts: int
    zflops: float  # as printed


TABLE_1: List[Row] = [
    Row("125M", 12, 768, 12, 0, 0.36),
    Row("355M", 24, 1024, 16, 0, 1.06),
    Row("GPT-3 760M", 24, 1536, 16, 0, 2.13),
    Row("1.3B", 24, 2048, 32, 0, 3.57),
    Row("2.7B", 32, 2560, 32, 0, 7.08),
    Row("6.7B", 32, 4096, 32, 0, 17.12),
    Row("13B", 40, 5120, 40, 0, 32.67),
    Row("GPT-3 175B", 96, 12288, 96, 0, 430.17),
    Row("MoE 15B", 12, 768, 12, 512, 0.43),
    Row("MoE 52B", 24, 1024, 16, 512, 1.30),
    Row("MoE 207B", 24, 2048, 32, 512, 4.53),
    Row("MoE 1.1T", 32, 4096, 32, 512, 22.27),
]

DENSE_ZFLOPS = [0.36, 1.06, 3.57, 7.08, 17.12, 32.67]
MOE_ZFLOPS = [0.43, 1.30, 4.53, 22.27]

# figure 2: perplexity of each family, in the order of the ZFLOPs above
FIGURE_2: Dict[str, Dict[str, List[float]]] = {
    "in_domain": {
        "dense": [20.63, 15.13, 12.46, 10.90, 9.81, 8.96],
        "moe": [12.56, 9.58, 8.74, 6.79],
    },
    "out_of_domain": {  # The Pile, plain mean over its 22 sets
        "dense": [21.21, 15.48, 12.36, 10.97, 10.04, 9.37],
        "moe": [13.96, 11.39, 10.27, 9.09],
    },
}

# figure 1: (ZFLOPs of the dense model, how many times less MoE needs)
FIGURE_1: Dict[str, List[Tuple[float, float]]] = {
    "in_domain": [(3.4, 7.9), (7.1, 8.9), (17.1, 14.4), (20.4, 15.8), (32.7, 10.0)],
    "out_of_domain": [(1.9, 4.4), (3.6, 4.2), (7.1, 3.4), (17.1, 2.75), (32.7, 2.2)],
}
