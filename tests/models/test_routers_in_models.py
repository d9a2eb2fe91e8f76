"""Every router in a language model: generation, padding, activation checkpointing, precision."""

import numpy as np
import pytest
import torch
from router_loops import LOOPS
from small_models import MOE, PAD, VOCABULARY, build_model, make_config, random_tokens

from fairseq_moe_ext.branch.writing import branch_settings
from fairseq_moe_ext.convert.targets import cast
from fairseq_moe_ext.cost import parameters
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation import specialisation
from fairseq_moe_ext.inspection import observing
from fairseq_moe_ext.moe.router import ROUTERS
from fairseq_moe_ext.shape import shape_of

NAMES = sorted(LOOPS)


def model_of(name, trained=True, **flags):
    """A model whose routers' state is not the first one."""
    model = build_model(**{**MOE, "moe_router": name, **flags}).double()
    if trained:
        model.train()
        update(model, random_tokens(4, 16))
    return model


def update(model, tokens):
    """What an update of the optimizer does to the routers."""
    updates = model.decoder.router_updates
    updates.begin()
    _, extra = model(tokens)
    updates.finish()
    return extra["moe"]


@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_teacher_forcing(name):
    """Token by token, and a prompt at once and then token by token; rows padded on the left."""
    model = model_of(name, moe_eval_capacity_token_fraction=1.0).eval()
    tokens = random_tokens(3, 10)
    tokens[1, :4] = PAD
    with torch.no_grad():
        whole = model(tokens)[0]
        for prompt in (1, 6):
            state = {}
            model.decoder(tokens[:, :prompt], incremental_state=state)
            for end in range(prompt + 1, tokens.size(1) + 1):
                logits = model.decoder(tokens[:, :end], incremental_state=state)[0][:, -1]
                real = tokens[:, end - 1] != PAD
                torch.testing.assert_close(logits[real], whole[real, end - 1])


@pytest.mark.parametrize("name", NAMES)
def test_a_sentence_s_logits_do_not_depend_on_the_batch_or_the_future(name):
    model = model_of(name, moe_eval_capacity_token_fraction=1.0).eval()
    tokens = random_tokens(3, 10)
    with torch.no_grad():
        whole = model(tokens)[0]
        torch.testing.assert_close(model(tokens[1:2, :6])[0], whole[1:2, :6])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_nothing(name, masked):
    """Gradients, losses, and what the routers observe, which recomputation must not count again."""
    tokens = random_tokens(3, 10)
    tokens[2, 7:] = PAD
    results = []
    for again in (False, True):
        model = model_of(name, trained=False, checkpoint_activations=again, use_moe_pad_mask=masked)
        states = []
        for _ in range(2):
            model.zero_grad()
            model.decoder.router_updates.begin()
            logits, extra = model(tokens)
            loss = logits.float().logsumexp(-1).sum()
            for record in extra["moe"]:
                own = 0 if record.router_loss is None else 1e9 * record.router_loss
                loss = loss + record.balance_loss + own
            loss.backward()
            model.decoder.router_updates.finish()
            gates = [layer.moe_layer.gate for layer in model.decoder.layers if layer.moe_layer]
            states += [s.clone() for gate in gates for s in gate.state.values()]
        results.append(([p.grad for p in model.parameters()], states))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_half_precision(name, dtype):
    model = build_model(**MOE, moe_router=name, moe_gating_use_fp32=True).to(dtype).train()
    loss, extra = model(random_tokens(), target=random_tokens())
    for record in extra["moe"]:
        loss = loss + record.balance_loss
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threshold", "relu", "hash"])
def test_it_compiles(name):
    """Attention is compiled; experts, of which a router chooses how many, are not."""
    plain, compiled = (
        build_model(**MOE, moe_router=name, compile=value).train() for value in (False, True)
    )
    tokens = random_tokens()
    torch.testing.assert_close(plain(tokens)[0], compiled(tokens)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["threshold", "relu", "hash"])
def test_conversion_to_another_precision_leaves_the_state(name):
    state = model_of(name).float().state_dict()
    model = {key: cast({key: value}, torch.float16)[key] for key, value in state.items()}
    for key, value in state.items():
        is_state = ".gate." in key and not key.endswith("wg.weight")
        is_stocks = key.endswith(("version", "_float_tensor"))
        assert (model[key] is value) == (is_state or is_stocks), key


def test_the_table_of_hash_is_by_the_dictionary_s_counts():
    model = build_model(**MOE, moe_router="hash")
    tables = [layer.moe_layer.gate.table for layer in model.decoder.layers if layer.moe_layer]
    assert len(tables) == 2 and torch.equal(*tables) and tables[0].shape == (VOCABULARY, 2)


REFUSED = {
    "unknown": (dict(moe_router="best"), "--moe-router best is unknown: use topk, "),
    "groups of hash": (
        dict(moe_router="hash", moe_groups=3, moe_top_groups=2),
        "--moe-groups 3 has no effect with --moe-router hash: remove it, or use topk or random",
    ),
    "score of relu": (
        dict(moe_router="relu", moe_score="sigmoid"),
        "--moe-score sigmoid has no effect with --moe-router relu: remove it, or use ",
    ),
    "jitter of hash": (
        dict(moe_router="hash", moe_input_jitter=0.1),
        "--moe-input-jitter 0.1 has no effect with --moe-router hash",
    ),
    "order of sinkhorn": (
        dict(moe_router="sinkhorn", moe_batch_prioritized_routing=True),
        "--moe-batch-prioritized-routing has no effect with --moe-router sinkhorn",
    ),
    "decay of topk": (
        dict(moe_threshold_decay=0.5),
        "--moe-threshold-decay 0.5 has no effect with --moe-router topk: remove it, or use thresh",
    ),
    "evaluation of topk": (
        dict(moe_base_evaluation="balanced"),
        "--moe-base-evaluation balanced has no effect with --moe-router topk: remove it, or use ba",
    ),
    "second expert of hash": (
        dict(moe_router="hash", moe_second_expert_policy="random"),
        "--moe-second-expert-policy random has no effect with --moe-router hash: remove it, or use",
    ),
    "router of a dense model": (
        dict(moe_freq=0, moe_expert_count=0, moe_router="hash"),
        "--moe-router hash with --moe-freq 0 has no layer to act on",
    ),
    "bias of a dense model": (
        dict(moe_freq=0, moe_expert_count=0, moe_balance="bias"),
        "--moe-balance bias with --moe-freq 0 has no layer to act on",
    ),
    "two experts of base": (
        dict(moe_router="base", moe_top_k=2),
        "--moe-top-k 2: --moe-router base",
    ),
    "capacity of relu": (
        dict(moe_router="relu", moe_capacity_factor=2.0),
        "--moe-capacity-factor 2.0: --moe-router relu has no capacity; remove it",
    ),
    "groups that do not divide": (
        dict(moe_groups=4, moe_top_groups=2),
        "--moe-groups 4 --moe-top-groups 2: 4 groups cannot have equal shares of the experts: use "
        "a number that divides 6",
    ),
    "too many groups": (
        dict(moe_groups=3, moe_top_groups=4),
        "--moe-top-groups 4: a token takes experts of 1 to all 3 groups, not of 4",
    ),
    "all groups": (dict(moe_groups=3, moe_top_groups=3), "excludes no expert"),
    "too few experts": (
        dict(moe_groups=3, moe_top_groups=1, moe_top_k=3),
        "--moe-top-groups 1: a token's groups, 1 of 3, hold fewer experts (2) than it takes (3)",
    ),
    "normalised twice": (
        dict(moe_normalize_weights="after", moe_normalize_gate_prob_before_dropping=True),
        "set the same thing",
    ),
    "one normalised": (
        dict(moe_normalize_weights="after", moe_top_k=1),
        "would make every weight 1",
    ),
    "an unknown score": (dict(moe_score="cosine"), "--moe-score cosine is unknown: use softmax, "),
    "all masked": (dict(moe_eom=1.0), "--moe-eom 1.0 is out of range"),
    "no scale": (dict(moe_route_scale=0.0), "--moe-route-scale 0.0 is out of range"),
    "nothing to freeze": (
        dict(moe_router="hash", moe_freeze="gate"),
        "--moe-freeze gate: --moe-router hash has no gate that is trained; remove the flag",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case):
    flags, words = REFUSED[case]
    with pytest.raises(UserError) as refused:
        build_model(**{**MOE, **flags})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_dense_model_has_a_name():
    """Which flags that have no effect on it must let pass."""
    assert build_model(moe_freq=0, moe_expert_count=0, _name="dense_lm_tiny") is not None


def test_what_a_router_heeds_is_a_setting():
    from fairseq_moe_ext.router_flags import _OF_SOME

    for name in NAMES:
        assert ROUTERS[name].heeds <= {*_OF_SOME.values(), "balance_bias"}


@pytest.mark.parametrize("name", NAMES)
def test_pages_on_experts_look_at_any_router(name):
    """The controls of random gates, also where a router has no gate or a token many experts."""
    model = model_of(name).float().eval()
    gate = model.decoder.layers[1].moe_layer.gate
    watch = specialisation.Watch(gate, torch.Generator().manual_seed(1))
    look = observing.WatchedGate(1, gate, False, torch.Generator().manual_seed(1))
    look.real = torch.ones(36, dtype=torch.bool)
    with torch.no_grad():
        model(random_tokens(3, 12))
    tables, first = watch.counted()
    chosen = look.view().chosen
    assert tables.shape == (1 + specialisation.RANDOM, 36, 6)
    assert (first[:, 0] == chosen[:, 0]).all(), "both count the same choices"
    assert (tables[0] == np.eye(7, dtype=int)[chosen].sum(1)[:, :6]).all()
    assert (tables.sum(-1) == tables[0].sum(-1)).all(), "controls have as many"
    if name not in ("threshold", "relu"):
        assert chosen.shape[1] == (1 if name == "base" else 2) and (chosen < 6).all()
    assert (tables[1:].sum((0, 1)) > 0).sum() > 3  # of 6: the controls are no constant
    assert gate.expert_vectors().shape == (6, 16)


TO_THE_BRANCH = {
    "router": (dict(moe_router="relu"), "--moe-router relu, 2 experts per token"),
    "top-3": (dict(moe_top_k=3), "--moe-router topk, 3 experts per token"),
    "sigmoid": (dict(moe_score="sigmoid"), "has --moe-score sigmoid; the branch has no such gates"),
    "scale": (dict(moe_route_scale=2.0), "has --moe-route-scale 2.0; the branch has no such gates"),
    "groups": (dict(moe_groups=3, moe_top_groups=2), "has --moe-groups 3; the branch has no such"),
    "weights": (dict(moe_normalize_weights="none"), "has --moe-normalize-weights none; the branch"),
}


@pytest.mark.parametrize("case", TO_THE_BRANCH)
def test_what_the_branch_has_not_is_refused_by_name(case):
    flags, words = TO_THE_BRANCH[case]
    with pytest.raises(UserError) as refused:
        branch_settings("x.pt", vars(make_config(**{**MOE, **flags})))
    assert words in str(refused.value)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_the_branch_has_is_said_in_its_words(when):
    flags = dict(moe_normalize_weights=when, moe_eom=0.2, moe_input_jitter=0.1)
    made = branch_settings("x.pt", vars(make_config(**MOE, **flags)))
    assert made["moe_normalize_gate_prob_before_dropping"] == (when == "before")
    assert not set(made) & {"moe_router", "moe_normalize_weights", "moe_eom", "moe_score"}


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_are_counted(name):
    model = build_model(**MOE, moe_router=name, share_decoder_input_output_embed=True)
    cfg = make_config(**MOE, moe_router=name, share_decoder_input_output_embed=True)
    counted = parameters(shape_of(cfg, VOCABULARY)).total
    assert counted == sum(p.numel() for p in model.parameters())
