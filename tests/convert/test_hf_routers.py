"""The routers that a folder of transformers has, against ours, with every pair of settings."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from small_models import make_config

from fairseq_moe_ext.config_checks import validate
from fairseq_moe_ext.convert import experts_fairseq_moe as theirs
from fairseq_moe_ext.convert.hf import ROUTERS, _translated
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.balance import balance_loss
from fairseq_moe_ext.moe.router import ROUTERS as OURS
from fairseq_moe_ext.router_flags import gate_settings

DIM, EXPERTS, VOCABULARY, TOKENS = 16, 8, 40, 60
FLAGS = [
    *({"moe_router": name} for name in ROUTERS if name != "topk"),
    {"moe_top_k": 1},
    {"moe_top_k": 3},
    {"moe_score": "sigmoid"},
    {"moe_normalize_weights": "before"},
    {"moe_normalize_weights": "none"},
    {"moe_normalize_gate_prob_before_dropping": True},
    {"moe_route_scale": 2.5},
    {"moe_groups": 4, "moe_top_groups": 2},
    {"moe_gating_use_fp32": True},
    {"moe_gating_fp32_product": True},
    {"moe_null_experts": 1},
    {"moe_null_experts": 3},
    {"moe_balance": "bias"},
    {"moe_balance": "both"},
]


def accepted(*settings):
    """The model's settings, or None if they do not go together."""
    flags = {name: value for some in settings for name, value in some.items()}
    if len(flags) < sum(map(len, settings)):
        return None
    cfg = make_config(
        moe_freq=1,
        moe_expert_count=EXPERTS,
        moe_second_expert_policy="all",
        moe_dropless=True,
        **flags,
    )
    try:
        validate(cfg)
    except UserError:
        return None
    return cfg


PAIRS = [pair for n in (0, 1, 2) for pair in combinations(FLAGS, n) if accepted(*pair)]


def routers(cfg, dtype):
    """Ours and theirs, with the same random weights and state, in a precision."""
    ours = OURS[cfg.moe_router](DIM, EXPERTS, gate_settings(cfg))
    ours.set_token_counts([1] * VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    for name, value in ours.state_dict().items():
        if name == "updates":
            value.fill_(1)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3)
    config = SimpleNamespace(**_translated(vars(cfg), VOCABULARY, 0.0))
    other = theirs.ROUTERS[config.router](config)
    trained = [{name for name, _ in router.named_parameters()} for router in (ours, other)]
    assert trained[0] == trained[1], cfg.moe_router
    other.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), other.to(dtype).eval()


def combined(routing, taken):
    """The weight of every expert for every token, (N, E)."""
    weights = routing.probs.new_zeros(routing.probs.shape)
    return weights.scatter_add(1, routing.experts, (routing.weights * taken).to(weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_pair_of_settings(dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, DIM, generator=generator).to(dtype)
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    assert len(PAIRS) > 90
    # Two implementations may round otherwise in the lower precisions.
    eps = 0 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for pair in PAIRS:
        ours, other = routers(accepted(*pair), dtype)
        with torch.no_grad():
            _, routing = ours(x, token_ids=ids)
            found = other(x, ids)
        assert found.weights.dtype == routing.weights.dtype, pair
        expected = combined(routing, routing.kept)
        assert torch.equal(combined(found, found.taken) > 0, expected > 0), f"{pair}: the experts"
        torch.testing.assert_close(
            combined(found, found.taken),
            expected,
            rtol=eps,
            atol=eps,
            msg=lambda m, pair=pair: f"{pair}: {m}",
        )
        loss = theirs.balance_loss(found, other.settings["null_experts"])
        torch.testing.assert_close(
            loss.float(), balance_loss(routing).float(), msg=lambda m, pair=pair: f"{pair}: {m}"
        )
