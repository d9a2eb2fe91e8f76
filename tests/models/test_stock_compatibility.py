"""Dense checkpoints of stock `transformer_lm` load into our model and back, with equal logits."""

import pytest
import torch
from small_models import build_model, build_stock_model, random_tokens

from fairseq_moe_ext.errors import UserError


@pytest.fixture
def tokens():
    return random_tokens()


VARIANTS = [
    {},
    {"activation_fn": "gelu", "share_decoder_input_output_embed": True},
    {"decoder_learned_pos": True, "activation_fn": "gelu"},
    {"decoder_learned_pos": True, "share_decoder_input_output_embed": True},
    {"no_scale_embedding": True, "layernorm_embedding": True, "no_decoder_final_norm": True},
    {"no_token_positional_embeddings": True},
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "+".join(flags) or "base")
def test_logits_are_equal_both_ways(tokens, flags):
    stock = build_stock_model(0, **{"activation_fn": "relu", **flags})
    ours = build_model(seed=1, **{"activation_fn": "relu", **flags}).double().eval()
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(tokens)[0], stock(tokens)[0], rtol=1e-12, atol=1e-12)

    ours = build_model(seed=2, **{"activation_fn": "relu", **flags}).double().eval()
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(stock(tokens)[0], ours(tokens)[0], rtol=1e-12, atol=1e-12)


def test_padding_on_either_side_is_as_stock(tokens):
    stock = build_stock_model(0, activation_fn="gelu", decoder_learned_pos=True)
    ours = build_model(seed=1, decoder_learned_pos=True).double().eval()
    ours.load_state_dict(stock.state_dict())
    pad = stock.decoder.padding_idx
    left, right = tokens.clone(), tokens.clone()
    left[0, :5] = pad
    left[1, :1] = pad
    right[0, 7:] = pad
    real = right.ne(pad)
    torch.testing.assert_close(ours(right)[0][real], stock(right)[0][real])
    # Row by row without its padding, as with torch 2.4 stock's padding on the left spreads NaN.
    logits = ours(left)[0]
    for row, got in zip(left, logits):
        real = row.ne(pad)
        torch.testing.assert_close(got[real], stock(row[real].unsqueeze(0))[0][0])
    assert torch.isfinite(logits).all()


def test_gradients_are_as_stock(tokens):
    stock = build_stock_model(0, activation_fn="gelu").train()
    ours = build_model(seed=1).double().train()
    ours.load_state_dict(stock.state_dict())
    for model in (stock, ours):
        model(tokens)[0].logsumexp(dim=-1).sum().backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-9)


def test_positions_grow_as_stocks():
    """--add-bos-token makes rows one longer than --tokens-per-sample, 64 here."""
    stock = build_stock_model(0, activation_fn="gelu")
    ours = build_model(seed=1).double().eval()
    ours.load_state_dict(stock.state_dict())
    for length in (65, 64, 70):
        tokens = random_tokens(length=length)
        torch.testing.assert_close(ours(tokens)[0], stock(tokens)[0], rtol=1e-12, atol=1e-12)
    state, found = {}, []
    for end in range(1, 71):
        found.append(ours.decoder(tokens[:, :end], incremental_state=state)[0])
    torch.testing.assert_close(torch.cat(found, 1), stock(tokens)[0], rtol=1e-9, atol=1e-9)


def test_learned_positions_do_not_grow():
    ours = build_model(decoder_learned_pos=True)
    ours(random_tokens(length=64))
    with pytest.raises(UserError, match="65 tokens for --max-target-positions 64"):
        ours(random_tokens(length=65))
