"""--bf16 on a CPU: float32 parameters, products of bfloat16, within bfloat16's rounding."""

import logging
from types import SimpleNamespace

import pytest
import torch
from processes import run_processes
from small_models import KINDS, MOE, build_model, build_stock_model, random_tokens

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models import precision

EPSILON = 2**-8  # bfloat16 rounds by half of this at most, relatively


@pytest.fixture(params=[True, False], ids=["pays", "gains nothing"])
def pays(request, monkeypatch):
    speed = 2.0 if request.param else 0.9
    monkeypatch.setattr(precision, "speed_over_float32", lambda: speed)
    precision._pays_here.cache_clear()
    yield request.param
    precision._pays_here.cache_clear()


def step(model, tokens):
    loss, extra = model(tokens, target=tokens.roll(-1, dims=1))
    (loss + sum(record.balance_loss for record in extra["moe"])).backward()
    return loss.detach(), extra, {name: p.grad for name, p in model.named_parameters()}


def build(**options):
    """A model that is to be trained with --bf16 on a CPU."""
    model = build_model(**options)
    cfg = SimpleNamespace(common=SimpleNamespace(bf16=True, cpu=True, memory_efficient_bf16=False))
    precision.take_bfloat16(cfg, model)
    return model


@pytest.mark.parametrize("flags", [{}, MOE])
def test_near_float64(flags, pays, caplog):
    options = {"dropout": 0.0, "attention_dropout": 0.0, **flags}
    with caplog.at_level(logging.INFO):
        model = build(**options).train()
        build(**options)
    assert sum("--bf16: computing in float32" in line for line in caplog.messages) == (not pays)
    exact = build_model(**options).train()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    tokens = random_tokens()
    loss, extra, grads = step(model, tokens)
    true_loss, _, true = step(exact, tokens)
    # Each layer rounds what its two norms, four products and the activation yield; a rounding moves
    # a number by half of EPSILON at most.
    bound = len(model.decoder.layers) * 7 * EPSILON / 2 if pays else 1e-5
    assert loss.dtype == torch.float32
    assert abs(loss - true_loss) < bound * true_loss
    assert all(record.balance_loss.dtype == torch.float32 for record in extra["moe"])
    norm = torch.stack([g.norm() for g in true.values()]).norm()
    error = torch.stack([(grads[name] - g).norm() for name, g in true.items()]).norm()
    assert error < 2 * bound * norm  # there and back again
    assert {g.dtype for g in grads.values()} == {torch.float32}
    embedding = "decoder.embed_tokens.weight"
    is_rounded = grads[embedding].equal(grads[embedding].bfloat16().float())
    assert not is_rounded  # it is added up in float32
    features = model(tokens, features_only=True)[0]
    assert features.dtype == (torch.bfloat16 if pays else torch.float32)


@pytest.mark.parametrize("speed, times", [(0.025, "40 times"), (1.1, ""), (2.0, "")])
def test_parameters_in_bfloat16_are_kept_and_a_cpu_that_is_slow_in_it_is_warned_of(
    monkeypatch, caplog, speed, times
):
    monkeypatch.setattr(precision, "speed_over_float32", lambda: speed)
    common = SimpleNamespace(bf16=True, cpu=True, memory_efficient_bf16=True)
    model = build_model()
    precision.take_bfloat16(SimpleNamespace(common=common), model)
    assert common.bf16 and not model.decoder.bfloat16_on_cpu
    warned = [line for line in caplog.messages if line.startswith("--memory-efficient-bf16: on")]
    assert len(warned) == bool(times) and all(times in line for line in warned)


def test_evaluation_on_a_gpu_converts_the_model(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cfg = SimpleNamespace(common=SimpleNamespace(bf16=True, fp16=False, cpu=False))
    cfg.generation = SimpleNamespace(retain_dropout=False)
    model = build_model().eval()
    model.prepare_for_inference_(cfg)
    assert model.decoder.embed_tokens.weight.dtype == torch.bfloat16


def test_a_converted_model_stays_as_it_is(pays):
    model = build().bfloat16()
    assert model(random_tokens(), features_only=True)[0].dtype == torch.bfloat16
    model = build().double()
    assert model(random_tokens(), features_only=True)[0].dtype == torch.float64


def test_evaluation_takes_the_flag(pays):
    model = build_model().eval()
    cfg = SimpleNamespace(common=SimpleNamespace(bf16=True, fp16=False, cpu=True))
    cfg.generation = SimpleNamespace(retain_dropout=False)
    model.prepare_for_inference_(cfg)
    features = model(random_tokens(), features_only=True)[0]
    assert features.dtype == (torch.bfloat16 if pays else torch.float32)


def test_a_model_that_was_trained_with_the_flag_is_evaluated_without_it(pays):
    """As one that is loaded from its checkpoint, whose settings have the flag."""
    assert build_model(bf16=True)(random_tokens(), features_only=True)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"share_decoder_input_output_embed": True},
        {**MOE, **KINDS["all"]},
        {**MOE, "moe_freq": 1},
    ],
    ids=["dense", "tied", "all kinds of experts", "sparse"],
)
def test_evaluation_converts_weights_of_products_once_and_changes_no_number(flags, pays):
    in_each_call = build_model(**flags).eval()
    in_each_call.decoder.bfloat16_on_cpu = pays
    model = precision.in_bfloat16(build_model(**flags).eval(), cpu=True)
    for tokens in (random_tokens(), random_tokens(1, 1)):
        with torch.no_grad():
            assert torch.equal(model(tokens)[0], in_each_call(tokens)[0])
            losses = [each(tokens, target=tokens)[0] for each in (model, in_each_call)]
            assert torch.equal(*losses)
    exact = ("embed_", "norm", ".gate.")
    for name, weights in model.state_dict().items():
        if weights.is_floating_point():
            converted = pays and not any(part in name for part in (*exact, "version"))
            assert weights.dtype == (torch.bfloat16 if converted else torch.float32), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU converts any model")
def test_evaluation_of_a_stock_model_is_refused(pays):
    model = precision.in_bfloat16(build_model(), cpu=True)
    assert model.decoder.bfloat16_on_cpu is pays
    with pytest.raises(UserError, match="--bf16: .*TransformerLanguageModel"):
        precision.in_bfloat16(build_stock_model(), cpu=True)


def test_its_speed_is_measured():
    assert 0.01 < precision.speed_over_float32() < 50


def dtype_in_experts(rank):
    """Where one process finds bfloat16 fast and the other does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "speed_over_float32", lambda: 2.0 - rank)
        precision._pays_here.cache_clear()
        try:
            return build(**MOE)(random_tokens())[0].dtype
        finally:
            precision._pays_here.cache_clear()


def test_all_processes_compute_in_one_precision():
    assert run_processes(2, dtype_in_experts) == [torch.bfloat16, torch.bfloat16]
