"""Scores of tokens in chunks of logits equal those of all logits, to the bit."""

from types import SimpleNamespace

import pytest
import torch
from small_models import build_model

from fairseq_moe_ext.kernels.matmul import Linear
from fairseq_moe_ext.models import token_scores


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_equal_the_whole(chunk, monkeypatch):
    decoder = build_model().eval().decoder
    torch.manual_seed(1)
    size, dim = decoder.output_projection.weight.shape
    features, target = torch.randn(7, dim), torch.randint(size, (7,))
    with torch.no_grad():
        expected = decoder.output_projection(features).double().log_softmax(-1)
        chosen = expected[range(7), target]
        monkeypatch.setattr(token_scores, "LOGITS_AT_A_TIME", chunk * size)
        found = token_scores.in_chunks(token_scores.log_probs, decoder, features, target)
        assert len(found) == -(-7 // chunk)
        torch.testing.assert_close(torch.cat(found).double(), chosen, rtol=1e-5, atol=1e-6)
        target[2] = expected[2].argmax()
        both = token_scores.in_chunks(
            token_scores.log_probs_and_likeliest, decoder, features, target
        )
    likeliest = torch.cat([part for _, part in both])
    assert likeliest.tolist() == expected.argmax(-1).eq(target).tolist() and likeliest[2]


def test_half_precision_is_scored_in_single():
    decoder = build_model().half().eval().decoder
    features = torch.randn(2, decoder.output_projection.weight.size(1)).half()
    assert token_scores.exact_logits(decoder, features).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_features_make_no_ties(dtype):
    """Two tokens have logits of about 16, which in bfloat16 are 1/8 apart."""
    torch.manual_seed(0)
    projection = Linear(64, 40, bias=False)
    weight = torch.randn(40, 64) / 8
    two = weight[3] / weight[3].norm() ** 2 + weight[4] / weight[4].norm() ** 2
    features = (torch.randn(300, 64) / 8 + 16 * two).to(dtype)
    projection.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    decoder = SimpleNamespace(output_layer=projection, output_projection=projection)
    logits = features.double() @ weight.to(dtype).double().T
    expected = logits.log_softmax(-1)
    for token in (3, 4):
        scores, likeliest = token_scores.log_probs_and_likeliest(
            decoder, features, torch.full((300,), token)
        )
        assert likeliest.tolist() == (logits.argmax(-1) == token).tolist()
        torch.testing.assert_close(scores.double(), expected[:, token], rtol=1e-5, atol=1e-5)
    assert 50 < (logits.argmax(-1) == 3).sum() < 250
