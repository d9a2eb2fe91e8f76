"""Numbers that the paper printed (Artetxe et al. 2021, arXiv 2112.10684), to compare with.

Table 1, fine-tuning and StereoSet as printed; figures 1 and 2 as read off them (perplexities within
0.05, factors within 0.1); zero-shot means as remembered by people who know the paper.
"""

from typing import Collection, Dict, List, NamedTuple, Tuple

from ..wording import count

TOKENS = 300e9
CONTEXT = 2048
VOCABULARY = 51_200  # of the models
VOCABULARY_OF_TABLE_1 = 50_000  # with which the printed FLOPs come out


class Row(NamedTuple):
    """A row of table 1; experts: 0 for a dense model."""

    name: str
    layers: int
    dim: int
    heads: int
    experts: int


TABLE_1: List[Row] = [
    Row("125M", 12, 768, 12, 0),
    Row("355M", 24, 1024, 16, 0),
    Row("GPT-3 760M", 24, 1536, 16, 0),
    Row("1.3B", 24, 2048, 32, 0),
    Row("2.7B", 32, 2560, 32, 0),
    Row("6.7B", 32, 4096, 32, 0),
    Row("13B", 40, 5120, 40, 0),
    Row("GPT-3 175B", 96, 12288, 96, 0),
    Row("MoE 15B", 12, 768, 12, 512),
    Row("MoE 52B", 24, 1024, 16, 512),
    Row("MoE 207B", 24, 2048, 32, 512),
    Row("MoE 1.1T", 32, 4096, 32, 512),
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
    "0-shot": [(1.55, 3.6), (5.05, 3.9), (7.1, 2.8), (17.1, 2.3), (32.7, 2.05)],
}

SIX_TASKS = ("record", "hellaswag", "piqa", "winogrande", "storycloze", "openbookqa")
# mean zero-shot accuracy of the six tasks, %, in the order of the ZFLOPs above
ZERO_SHOT: Dict[str, List[float]] = {
    "dense": [53.6, 60.4, 66.8, 69.6, 72.2, 74.2],
    "moe": [62.4, 68.2, 70.8, 75.0],
}

# fine-tuning: accuracy zero-shot, fine-tuned, in %
FINE_TUNED_MODELS = ["125M", "355M", "1.3B", "2.7B", "MoE 15B", "MoE 52B", "MoE 207B"]
FINE_TUNED: Dict[str, List[Tuple[float, float]]] = {
    "StoryCloze": [
        (66.0, 87.8),
        (71.0, 89.5),
        (76.8, 93.8),
        (78.2, 97.0),
        (73.6, 80.3),
        (75.9, 84.9),
        (78.1, 80.9),
    ],
    "OpenBookQA": [
        (35.4, 50.6),
        (42.0, 59.0),
        (49.4, 67.4),
        (49.6, 70.8),
        (42.0, 51.2),
        (51.0, 51.4),
        (50.8, 51.0),
    ],
    "BoolQ": [
        (56.1, 73.2),
        (58.6, 75.2),
        (58.7, 79.6),
        (60.3, 84.6),
        (60.9, 71.6),
        (56.0, 75.3),
        (54.2, 77.5),
    ],
    "MNLI": [
        (46.2, 80.9),
        (52.1, 84.3),
        (55.3, 84.1),
        (56.0, 88.9),
        (49.3, 77.7),
        (52.1, 81.2),
        (52.6, 78.7),
    ],
    "SST-2": [
        (50.9, 92.9),
        (50.9, 92.9),
        (51.6, 94.8),
        (51.9, 93.4),
        (51.6, 89.3),
        (50.9, 90.1),
        (50.9, 90.3),
    ],
    "HellaSwag": [
        (33.7, 50.7),
        (46.2, 64.8),
        (58.4, 74.1),
        (65.9, 90.0),
        (53.2, 37.3),
        (64.9, 45.4),
        (70.5, 42.2),
    ],
    "PIQA": [
        (65.3, 68.2),
        (70.6, 71.7),
        (74.6, 71.2),
        (76.6, 80.3),
        (74.3, 66.3),
        (76.8, 66.1),
        (78.2, 68.3),
    ],
    "WinoGrande": [
        (52.1, 65.7),
        (54.2, 63.3),
        (58.1, 67.4),
        (61.4, 69.5),
        (53.4, 50.2),
        (57.4, 56.0),
        (60.9, 50.4),
    ],
}

# StereoSet, overall: LMS, SS, ICAT
STEREOSET: Dict[str, Tuple[float, float, float]] = {
    "125M": (82.0, 47.2, 77.4),
    "355M": (82.4, 48.8, 80.5),
    "1.3B": (83.2, 50.7, 82.0),
    "2.7B": (82.3, 52.7, 77.9),
    "6.7B": (81.6, 53.0, 76.6),
    "MoE 15B": (82.1, 50.5, 81.2),
    "MoE 52B": (82.3, 51.6, 79.7),
    "MoE 207B": (81.7, 52.8, 77.2),
    "MoE 1.1T": (80.2, 51.9, 77.2),
}


def tasks_in_words(names: Collection[str]) -> str:
    """What a mean accuracy is over: the paper's six tasks, or how many others."""
    return "the paper's six tasks" if set(names) == set(SIX_TASKS) else count(len(names), "task")
