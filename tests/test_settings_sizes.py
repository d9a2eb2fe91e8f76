"""A checkpoint whose settings ask for a model that its tensors are not."""

from argparse import Namespace

import pytest
import torch

from fairseq_moe_ext.checkpoint.settings import check_settings
from fairseq_moe_ext.errors import UserError

WEIGHTS = {f"decoder.layers.{i}.self_attn.q_proj.weight": torch.zeros(1) for i in range(2)}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("decoder_layers", 10**9, "decoder_layers is 1000000000, not 2 as its tensors"),
        ("decoder_layers", 3, "decoder_layers is 3, not 2 as its tensors"),
        ("decoder_embed_dim", 10**9, "decoder_embed_dim is 1000000000, not 1048576 at most"),
        ("decoder_ffn_embed_dim", 10**9, "not 1048576 at most"),
        ("moe_expert_count", 10**9, "not 1048576 at most"),
    ],
)
@pytest.mark.parametrize("form", ["cfg", "args"])
def test_sizes_beyond_the_tensors_are_refused(form, name, value, message):
    settings = {"arch": "moe_lm_tiny", name: value}
    cfg = {"model": {"_name": "moe_lm_tiny", name: value}}
    state = {"args": Namespace(**settings)} if form == "args" else {"cfg": cfg}
    with pytest.raises(UserError, match=message):
        check_settings("x.pt", {"model": WEIGHTS, **state})


def test_sizes_of_the_tensors_pass():
    cfg = {"model": {"_name": "moe_lm_tiny", "decoder_layers": 2, "decoder_embed_dim": 128}}
    check_settings("x.pt", {"model": WEIGHTS, "cfg": cfg})
    check_settings("x.pt", {"model": {"flat_param_0": torch.zeros(1)}, "cfg": cfg})
