"""What tests of `fairseq-moe convert` share."""

from pathlib import Path

import torch
from branch_checkpoints import perplexities

from fairseq_moe_ext.cli import main

ALL = "{'moe_eval_capacity_token_fraction': 1.0}"


MOE = "--moe-expert-count 4"
DENSE = "--moe-freq 0 --moe-expert-count 0"


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def mistake(capsys, *arguments):
    """The one line that a mistake ends in."""
    assert main(["convert", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def same(a, b):
    """Whether two states are equal, tensors to the bit and in their precision."""
    if isinstance(a, torch.Tensor):
        # By bytes: stock saves a number that it never sets, which may be NaN.
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def load(path):
    return torch.load(path, weights_only=True)


def evaluated(data, path, *more):
    return perplexities(1, data, "--path", path, "--tokens-per-sample", 8, "--batch-size", 4, *more)


def model_of(path, data):
    from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

    path = Path(path)
    hub = MoETransformerLanguageModel.from_pretrained(str(path.parent), path.name, data)
    return hub.models[0]  # in evaluation mode


@torch.no_grad()
def logits(path, data, double=True):
    tokens = torch.randint(4, 24, (3, 8), generator=torch.Generator().manual_seed(1))
    model = model_of(path, data)
    return (model.double() if double else model)(tokens)[0]
