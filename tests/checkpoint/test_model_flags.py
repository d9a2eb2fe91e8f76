"""A training that starts from a checkpoint of other model flags says so, and only then."""

import re
from types import SimpleNamespace

import pytest
from fairseq.dataclass import ChoiceEnum
from small_models import MOE, make_config

from fairseq_moe_ext.checkpoint import model_flags
from fairseq_moe_ext.checkpoint.model_flags import FREE, changed
from fairseq_moe_ext.config import MoETransformerLMConfig, defaults
from fairseq_moe_ext.shape import shape_of

SPARSE = vars(make_config(**MOE))
_TWIN = shape_of({**SPARSE, "moe_dense_twin": True})
WITHOUT_DEFAULT = {  # another value of what has none, but a reference to another group
    "moe_expert_ffn_dim": 9,
    "moe_shared_expert_ffn_dim": 9,
    "moe_latent_dim": 5,
    "moe_layers": "0,2",
    "moe_top_k": 3,
    "moe_normalize_weights": "none",
    "moe_router": "sinkhorn",
}
(TWIN,) = {w for i, w in enumerate(_TWIN.dense_widths) if i in _TWIN.picked}
WITH = {"moe_shared_expert_ffn_dim": {"moe_shared_experts": 1}}  # what a flag needs to have effect


def another(name):
    """A value of a flag that is not its value in SPARSE."""
    value, kind = SPARSE[name], MoETransformerLMConfig.__dataclass_fields__[name].type
    if name in WITHOUT_DEFAULT:
        return WITHOUT_DEFAULT[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 2
    choices = getattr(kind, "__members__", None) or ("other",)
    return next(choice for choice in choices if choice != str(value))


def test_a_width_that_sets_that_of_experts_is_compared():
    """Also where no layer is dense."""
    saved = {**SPARSE, "moe_freq": 1}
    assert changed(saved, {**saved, "decoder_ffn_embed_dim": 6}) == ["decoder_ffn_embed_dim"]


@pytest.mark.parametrize("name", defaults())
def test_every_flag_is_compared_unless_it_is_free(name):
    here = {**SPARSE, **WITH.get(name, {})}
    saved = {**here, name: another(name)}
    assert changed(saved, here) == ([] if name in FREE else [name])


def test_what_is_free_is_a_flag():
    assert FREE <= set(defaults())


@pytest.mark.parametrize(
    "saved, here",
    [
        ({"moe_freq": 2}, {"moe_freq": 0, "moe_layers": "1,3"}),
        ({"moe_freq": 2}, {"moe_freq": 1, "moe_layers": "1, 3"}),
        ({"moe_top_k": None}, {"moe_top_k": 2}),
        ({"moe_top1_expert": True}, {"moe_top_k": 1}),
        ({"moe_expert_ffn_dim": None}, {"moe_expert_ffn_dim": SPARSE["decoder_ffn_embed_dim"]}),
        ({"moe_normalize_weights": "before"}, {"moe_normalize_gate_prob_before_dropping": True}),
        ({"moe_normalize_weights": None}, {"moe_normalize_weights": "after"}),
        (
            {"moe_shared_experts": 1, "moe_shared_expert_ffn_dim": 12},
            {"moe_shared_experts": 2, "moe_shared_expert_ffn_dim": 6},
        ),
        ({"moe_dense_twin": True, "moe_score": "sigmoid"}, {"moe_dense_twin": True}),
        ({"moe_dense_twin": True}, {"alternate_decoder_ffn_embed_dim": TWIN}),
        (
            {"moe_freq": 1, "alternate_decoder_ffn_embed_dim": 6},
            {"moe_freq": 0, "decoder_ffn_embed_dim": 6},
        ),
        (
            {"no_token_positional_embeddings": True, "decoder_learned_pos": True},
            {"no_token_positional_embeddings": True},
        ),
        ({"activation_fn": "gelu_fast"}, {"activation_fn": "gelu_accurate"}),
    ],
)
def test_two_ways_to_say_one_thing_are_one(saved, here):
    assert changed({**SPARSE, **saved}, {**SPARSE, **here}) == []
    assert changed({**SPARSE, **here}, {**SPARSE, **saved}) == []


def test_what_an_older_checkpoint_lacks_does_not_count():
    here = {**SPARSE, "moe_score": "sigmoid", "moe_layers": "1,3", "activation_fn": "relu"}
    sizes = ("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "activation_fn")
    old = {**{name: SPARSE[name] for name in sizes}, "moe_freq": 2, "moe_expert_count": 6}
    assert changed(old, here) == ["activation_fn"]
    assert changed({**old, "moe_top1_expert": True}, here) == ["activation_fn", "moe_top1_expert"]


def test_choices_are_compared_with_the_text_that_is_saved():
    scores = ChoiceEnum(["softmax", "sigmoid"])
    assert changed(SPARSE, {**SPARSE, "moe_score": scores.softmax}) == []
    assert changed(SPARSE, {**SPARSE, "moe_score": scores.sigmoid}) == ["moe_score"]


@pytest.mark.parametrize(
    "before, trained_on, now, processes, words",
    [
        ("world_size", 4, "world_size", 8, None),
        ("sqrt_num_experts", 1, "sqrt_num_experts", 8, None),
        ("sqrt_world_size", 1, "world_size", 1, None),
        ("sqrt_world_size", 2, "sqrt_world_size", 8, "are 2 times .* resume on 2 processes$"),
        ("sqrt_world_size", 8, "sqrt_world_size", 1, "are 0.354 times .* resume on 8 processes$"),
        ("world_size", 1, "sqrt_world_size", 4, "are 2 times .* use --.*-grad world_size$"),
        ("sqrt_world_size", 4, "world_size", 8, "are 0.5 .* sqrt_world_size on 4 processes$"),
        ("sqrt_num_experts", 1, "world_size", 1, r"are 2.83 .* use --.*-grad sqrt_num_experts$"),
    ],
)
def test_how_other_gradients_of_experts_are_told(
    before, trained_on, now, processes, words, monkeypatch, caplog
):
    """Of eight experts, on one process as on many."""
    monkeypatch.setattr(model_flags, "process_count", lambda: processes)
    eight = {**SPARSE, "moe_expert_count": 8}
    cfg = {
        "model": {**eight, "moe_normalize_expert_grad": before},
        "distributed_training": {"distributed_world_size": trained_on},
    }
    here = SimpleNamespace(model={**eight, "moe_normalize_expert_grad": now})
    model_flags.warn_of_other_gradients({"cfg": cfg}, SimpleNamespace(cfg=here), "x.pt")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == bool(words) and re.search(words or "", "".join(told))
