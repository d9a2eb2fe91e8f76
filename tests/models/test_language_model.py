"""The model as a whole: precision, checkpointing, decoding, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from small_models import KINDS, MOE, SMALL, VOCABULARY, build_model, make_config, random_tokens

from fairseq_moe_ext.config_checks import validate
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import expert_grad_scale
from fairseq_moe_ext.models.decoder import LayerRecord
from fairseq_moe_ext.moe.layer import MoEOutput


@pytest.fixture
def tokens():
    return random_tokens()


LAYOUTS = [
    {},
    MOE,
    {**MOE, "moe_top1_expert": True, "use_moe_pad_mask": True},
    {**MOE, "moe_freq": 1, "moe_second_expert_policy": "sampling"},
    {**MOE, "moe_second_expert_policy": "random"},
    {**MOE, "alternate_decoder_ffn_embed_dim": 64},
    *({**MOE, **kind} for kind in KINDS.values()),
]


def losses(model, tokens):
    target = tokens.roll(-1, dims=1)
    nll, extra = model(tokens, target=target)
    gate = sum(r.balance_loss + 0.1 * r.z_loss for r in extra["moe"])
    return nll + 10 * gate


@pytest.mark.parametrize("flags", LAYOUTS)
def test_loss_for_a_target_equals_that_of_the_logits(tokens, flags):
    model = build_model(**flags).double().eval()
    target = tokens.roll(-1, dims=1)
    target[0, 3:] = model.decoder.padding_idx
    loss, _ = model(tokens, target=target)
    logits, _ = model(tokens)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=1, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("flags", LAYOUTS)
def test_activation_checkpointing_changes_no_number(tokens, flags):
    grads = {}
    for recompute in (False, True):
        options = {"dropout": 0.2, "attention_dropout": 0.1, **flags}
        model = build_model(checkpoint_activations=recompute, **options).double().train()
        torch.manual_seed(7)
        loss = losses(model, tokens)
        loss.backward()
        grads[recompute] = {n: p.grad for n, p in model.named_parameters()}
        grads[recompute]["loss"] = loss.detach()
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-12, atol=1e-12)


HALF = [{**MOE, "moe_gating_use_fp32": True}, MOE, {}]
HALF += [{**HALF[0], **KINDS[kind]} for kind in ("gated", "all")]


@pytest.mark.parametrize("dtype, rtol", [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("flags", HALF)
def test_half_precision_is_near_single(tokens, dtype, rtol, flags):
    exact, half = build_model(**flags), build_model(**flags).to(dtype)
    for model in (exact, half):
        losses(model.train(), tokens).backward()
    assert all(p.grad.dtype == dtype for p in half.parameters())
    want, got = (
        torch.cat([p.grad.flatten().float() for p in m.parameters()]) for m in (exact, half)
    )
    # Rounding may send a token to another expert, so single gradients differ: their whole counts.
    assert (got - want).norm() / want.norm() < 10 * rtol
    torch.testing.assert_close(
        losses(half, tokens).float(), losses(exact, tokens), rtol=rtol, atol=0
    )


def one_by_one(model, tokens):
    state = {}
    steps = [
        model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in range(tokens.size(1))
    ]
    return torch.cat(steps, dim=1)


DROPLESS = [
    *({**flags, "moe_dropless": True} for flags in LAYOUTS if flags),
    {"decoder_learned_pos": True},
    {},
]


@pytest.mark.parametrize("flags", DROPLESS)
def test_token_by_token_equals_one_pass(tokens, flags):
    model = build_model(**flags).double().eval()
    whole = model(tokens)[0]
    torch.testing.assert_close(one_by_one(model, tokens), whole, rtol=1e-9, atol=1e-9)
    for row in range(len(tokens)):  # nor does a row depend on its batch
        torch.testing.assert_close(model(tokens[row : row + 1])[0][0], whole[row])


@pytest.mark.parametrize("flags", DROPLESS)
def test_what_follows_changes_nothing_in_training_either(tokens, flags):
    noiseless = {**flags, "moe_second_expert_policy": "all"} if "moe_freq" in flags else flags
    model = build_model(**noiseless).double().train()
    other = tokens.clone()
    other[:, 7:] = other[:, 7:].flip(0)
    before, after = (model(each)[0][:, :7] for each in (tokens, other))
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.25, -1.0, 1.0])
def test_generation_does_not_depend_on_the_rest_of_the_batch(tokens, fraction):
    model = build_model(moe_eval_capacity_token_fraction=fraction, **MOE).double().eval()
    together = one_by_one(model, tokens)
    for i, row in enumerate(tokens):
        torch.testing.assert_close(together[i], one_by_one(model, row[None])[0])


@pytest.mark.parametrize("flags", [{}, {**MOE, "moe_dropless": True}])
def test_padding_on_the_left_changes_no_number(tokens, flags):
    for learned in (False, True):
        model = build_model(decoder_learned_pos=learned, **flags).double().eval()
        pad = torch.full((3, 4), model.decoder.padding_idx)
        padded = torch.cat([pad, tokens], dim=1)
        padded[2] = torch.cat([tokens[2], pad[2]])  # and one row is padded on the right
        alone = model(tokens)[0]
        for out in (model(padded)[0], one_by_one(model, padded)):
            torch.testing.assert_close(out[:2, 4:], alone[:2])
            torch.testing.assert_close(out[2, :-4], alone[2])


@pytest.mark.parametrize("flags", [{}, {**MOE, "moe_dropless": True}])
def test_several_positions_at_once_equal_one_pass(tokens, flags):
    model = build_model(**flags).double().eval()
    padded = torch.cat([torch.full((3, 4), model.decoder.padding_idx), tokens], dim=1)
    for rows, first in ((tokens, 0), (padded, 4)):
        state = {}
        parts = [
            model.decoder(rows[:, :end], incremental_state=state)[0] for end in (5, 6, 9, None)
        ]
        assert [part.size(1) for part in parts] == [5, 1, 3, rows.size(1) - 9]
        together = torch.cat(parts, dim=1)[:, first:]
        torch.testing.assert_close(together, model(tokens)[0], rtol=1e-9, atol=1e-9)


def test_beam_search_reorders_the_cache(tokens):
    model = build_model(moe_dropless=True, **MOE).double().eval()
    state = {}
    model.decoder(tokens[:, :1], incremental_state=state)
    order = torch.tensor([2, 0])
    model.decoder.reorder_incremental_state_scripting(state, order)
    longer = torch.cat([tokens[order, :1], tokens[:2, 1:2]], dim=1)
    out, _ = model.decoder(longer, incremental_state=state)
    torch.testing.assert_close(out[:, -1], model(longer)[0][:, -1])


def test_a_layer_s_record_has_the_fields_of_its_output_in_their_order():
    """It is filled by position."""
    assert LayerRecord._fields[1:] == MoEOutput._fields[1:]


def test_noise_is_off_at_evaluation(tokens):
    for policy in ("sampling", "random"):
        noisy = build_model(**{**MOE, "moe_second_expert_policy": policy}).eval()
        plain = build_model(**MOE).eval()
        torch.testing.assert_close(noisy(tokens)[0], plain(tokens)[0], rtol=0, atol=0)
        torch.manual_seed(3)
        first = noisy.train()(tokens)[0]
        torch.manual_seed(4)
        assert not torch.equal(first, noisy(tokens)[0])


def test_dropless_drops_nothing_and_capacity_does(tokens):
    def overflow(training, **flags):
        model = build_model(**{**MOE, **flags}).train(training)
        figures = [record.stats for record in model(tokens)[1]["moe"]]
        return sum(float(s["overflow_expert1"] + s["overflow_expert2"]) for s in figures)

    for training in (True, False):
        assert overflow(training, moe_dropless=True) == 0
    assert overflow(True, moe_capacity_factor=0.5) > 0
    assert overflow(True, moe_capacity_factor=0.5) > overflow(True, moe_capacity_factor=1.0)
    assert overflow(False, moe_eval_capacity_token_fraction=1.0) == 0
    assert overflow(False, moe_eval_capacity_token_fraction=0.1) > 0


def test_expert_width_of_its_own():
    layer = build_model(moe_expert_ffn_dim=48, **MOE).decoder.layers[1].moe_layer
    assert layer.experts.fc1.weight.shape == (6, 48, 16)


@pytest.mark.parametrize(
    "choice, processes, factor",
    [
        ("world_size", 4, 1 / 4),
        ("sqrt_world_size", 4, 1 / 2),
        ("sqrt_num_experts", 4, 1 / 4 * 8**-0.5),
        ("world_size", 32, 1 / 32),
        ("sqrt_world_size", 32, 1 / 4 * 8**-0.5),  # mean of 4 replicas, then the root of 32/4
        ("sqrt_num_experts", 32, 1 / 32 * 8**-0.5),
    ],
)
def test_scale_of_the_gradients_of_experts(choice, processes, factor):
    """Of eight experts. They are sums over all tokens."""
    assert expert_grad_scale(choice, 8, processes) == pytest.approx(factor)


def test_expert_gradients_are_scaled(tokens):
    def gradients(choice):
        model = build_model(**MOE, moe_normalize_expert_grad=choice).double().train()
        losses(model, tokens).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, scaled = gradients("world_size"), gradients("sqrt_num_experts")  # on one process
    for name in plain:
        expected = plain[name] * (6**-0.5 if ".experts." in name else 1)
        torch.testing.assert_close(scaled[name], expected)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"moe_freq": 0, "moe_expert_count": 4}, "--moe-expert-count 4 with --moe-freq 0"),
        ({"moe_expert_count": 0}, "--moe-expert-count 0"),
        ({"moe_expert_count": -3}, "--moe-expert-count -3"),
        ({"moe_expert_count": 1}, "too few for top-2"),
        ({"moe_freq": 5}, "--moe-freq 5 picks no layer of --decoder-layers 4"),
        ({"moe_freq": -1}, "--moe-freq -1"),
        ({"moe_expert_ffn_dim": 0}, "--moe-expert-ffn-dim 0"),
        ({"moe_capacity_factor": 0.0}, "--moe-capacity-factor 0.0"),
        ({"moe_capacity_factor": float("nan")}, "--moe-capacity-factor nan"),
        ({"moe_capacity_factor": 2.0, "moe_dropless": True}, "conflicts with --moe-dropless"),
        ({"moe_eval_capacity_token_fraction": 0.0}, "--moe-eval-capacity-token-fraction 0.0"),
        ({"moe_eval_capacity_token_fraction": 1.5}, "--moe-eval-capacity-token-fraction 1.5"),
        ({"moe_top1_expert": True, "moe_batch_prioritized_routing": True}, "no effect"),
        ({"alternate_decoder_ffn_embed_dim": -8}, "--alternate-decoder-ffn-embed-dim -8"),
        ({"decoder_attention_heads": 3}, "--decoder-attention-heads 3"),
        ({"decoder_embed_dim": 2}, "--decoder-embed-dim 2 is too narrow for sinusoidal positions"),
        ({"decoder_embed_dim": 3, "decoder_attention_heads": 3}, "--decoder-embed-dim 3 is too"),
        ({"decoder_layers": 0}, "--decoder-layers 0"),
        ({"dropout": 1.5}, "--dropout 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, words):
    with pytest.raises(UserError) as error:
        validate(make_config(**{**MOE, **flags}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dense_twin_is_built_without_a_word(caplog):
    """Commands that convert or evaluate build models, too; a training says what its twin is."""
    with caplog.at_level("INFO"):
        build_model(**MOE, moe_dense_twin=True)
    assert "twin" not in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        {"decoder_embed_dim": 1, "decoder_attention_heads": 1},
        {"decoder_embed_dim": 2, "decoder_learned_pos": True},
        {"decoder_embed_dim": 2, "no_token_positional_embeddings": True},
        {"decoder_embed_dim": 4},
    ],
)
def test_the_narrowest_models_are_built(tokens, flags):
    build_model(**{**MOE, **flags})(tokens)


def test_usual_settings_are_accepted():
    validate(make_config())
    for flags in LAYOUTS:
        validate(make_config(**flags))


@pytest.mark.parametrize(
    "saved, loaded, words",
    [
        ({"vocabulary": 50}, {}, "vocabulary of 50, but the dictionary one of 40"),
        (
            {"decoder_embed_dim": 32},
            {},
            "embed_tokens.weight is 40 x 32 in the checkpoint, 40 x 16",
        ),
        ({"decoder_layers": 2}, {}, "decoder.layers.2"),
        (MOE, {}, "moe_layer"),
        ({}, MOE, "trained with, or make a sparse model of it with `fairseq-moe convert --upcyc"),
        ({**MOE, "moe_expert_count": 4}, MOE, "is 4 x 16 in the checkpoint, 6 x 16 in the model"),
    ],
)
def test_a_checkpoint_of_another_shape_is_told_in_one_line(saved, loaded, words):
    state = build_model(**saved).state_dict()
    model = build_model(seed=1, **loaded)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        model.load_state_dict(state)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_experts_start_as_separate_linear_layers():
    """Same distribution as nn.Linear's, each expert different, and the same from the same seed."""
    fc1 = build_model(**MOE).decoder.layers[1].moe_layer.experts.fc1
    bound = SMALL["decoder_embed_dim"] ** -0.5
    assert fc1.weight.abs().max() <= bound
    assert abs(float(fc1.weight.detach().std()) - bound / 3**0.5) < 0.02
    assert len({round(float(w.sum()), 6) for w in fc1.weight}) == len(fc1.weight)
    again = build_model(**MOE).decoder.layers[1].moe_layer.experts.fc1
    assert torch.equal(fc1.weight, again.weight)


def test_an_output_projection_of_its_own_is_not_lost():
    tied = build_model(share_decoder_input_output_embed=True)
    with pytest.raises(UserError, match="separate output projection.*--arch moe_transformer_lm"):
        tied.load_state_dict(build_model().state_dict())


@pytest.fixture
def refused_empty(monkeypatch):
    """As PyTorch's flash attention before 2.10, in half precision on a GPU."""
    attend = F.scaled_dot_product_attention

    def refusing(q, *rest, **more):
        if q.size(0) == 0:
            raise RuntimeError("batch size must be positive")
        return attend(q, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", refusing)


@pytest.mark.parametrize("flags", [{}, MOE], ids=["dense", "moe"])
def test_a_batch_without_rows_has_gradients_of_zero(tokens, flags, refused_empty):
    """Processes that have run out of batches need them in every collective."""
    model = build_model(**flags).train()
    with pytest.raises(RuntimeError, match="must be positive"):
        F.scaled_dot_product_attention(*torch.zeros(3, 0, 2, 4, 8))
    loss, _ = model(tokens[:0], target=tokens[:0])
    loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.eq(0).all() for grad in trained.values())
    state = {}
    logits, _ = model.eval()(tokens[:0, :3], incremental_state=state)
    assert logits.shape == (0, 3, VOCABULARY)
    assert model(tokens[:0, :4], incremental_state=state)[0].shape == (0, 1, VOCABULARY)
