"""Two processes route as one does, with the scope world."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from router_loops import LOOPS
from training import EVAL, TRAIN, UPDATES, first_run, make_data, perplexity, resume, train

from fairseq_moe_ext.expert_parallel import ExpertParallel, WorldScope
from fairseq_moe_ext.moe.exchange import HERE
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import ROUTERS, GateSettings
from fairseq_moe_ext.moe.scope import PROCESS
from fairseq_moe_ext.router_flags import gate_settings

EXPERTS, TOKENS, DIM, VOCABULARY = 4, 22, 6, 9
NAMES = sorted(LOOPS)


def layer_of(name, exchange=HERE, scope=PROCESS):
    torch.manual_seed(5)
    k = 1 if name == "base" else 2
    settings = GateSettings(k, second_expert_policy="all", capacity_factor=1.2)
    return MoELayer.build(
        DIM, 7, EXPERTS, settings, router=name, exchange=exchange, scope=scope,
        token_counts=range(VOCABULARY),
    ).double()  # fmt: skip


def inputs():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(TOKENS, DIM, generator=generator).double()
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    padding = torch.rand(TOKENS, generator=generator) < 0.2
    return x + x[:, :1], ids, padding, torch.randn(TOKENS, DIM, generator=generator).double()


def steps(name, layer, part, total):
    """Two steps of training and one of evaluation; `total` sums over processes."""
    x, ids, padding, weight = (tensor[part] for tensor in inputs())
    x = x.clone().requires_grad_()
    if name == "relu":
        layer.gate.l1_weight.fill_(0.4)
    found = {"stats": []}
    for step in range(2):
        layer.zero_grad()
        out = layer(x, padding, token_ids=ids)
        loss = (out.out * weight).sum() + len(x) / TOKENS * (out.balance_loss + out.z_loss)
        if out.router_loss is not None:
            loss = loss + len(x) / TOKENS * out.router_loss
        if loss.requires_grad:
            loss.backward()
        losses = [each.detach() for each in (out.balance_loss, out.router_loss) if each is not None]
        found["stats"].append({**out.stats, "losses": losses})
        layer.gate.after_update({name: total(value) for name, value in out.observed.items()})
        found[f"out {step}"] = out.out.detach()
        found[f"x {step}"], x.grad = x.grad, None
        found["gates"] = [total(p.grad) for p in layer.gate.parameters()]
        of_each = [p.grad.flatten(1) for p in layer.experts.parameters()]
        found[f"experts {step}"] = torch.cat(of_each, dim=1)  # (E, numbers)
    layer.eval()
    layer.gate.settings = layer.gate.settings._replace(eval_token_fraction=1.0)
    found["evaluated"] = layer(x, padding, token_ids=ids).out.detach()
    found["state"] = list(layer.gate.state.values())
    return found


def summed(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def in_a_process(rank, sizes):
    exchange = ExpertParallel(EXPERTS)
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {n: steps(n, layer_of(n, exchange, WorldScope()), part, summed) for n in NAMES}


@pytest.mark.parametrize("sizes", [(11, 11), (17, 5), (22, 0)], ids=str)
def test_two_processes_route_as_one(sizes):
    """Outputs, losses, metrics, gradients and what the router learned, in two updates."""
    results = run_processes(2, in_a_process, sizes)
    for name in NAMES:
        one = steps(name, layer_of(name), slice(None), lambda x: x)
        for key, value in one.items():
            of_each = [result[name][key] for result in results]
            if isinstance(value, torch.Tensor):
                of_each = [torch.cat(of_each)]
            for many in of_each:
                torch.testing.assert_close(many, value, rtol=1e-9, atol=1e-12, msg=f"{name}, {key}")


def test_every_router_with_a_state_was_changed_by_it():
    for name in NAMES:
        layer = layer_of(name)
        before = [state.clone() for state in layer.gate.state.values()]
        after = steps(name, layer, slice(None), lambda x: x)["state"]
        assert (ROUTERS[name] in (ROUTERS["relu"], ROUTERS["threshold"])) == bool(before)
        assert all(not torch.equal(a, b) for a, b in zip(before, after))


QUICK = [("threshold", 1, 2), ("relu", 1, 2), ("hash", 1, 2), ("relu", 2, 1)]
ALL = [(name, *sizes) for name in NAMES for sizes in ((1, 2), (2, 1), (2, 4))]
RUNS = QUICK + [pytest.param(*run, marks=pytest.mark.slow) for run in ALL if run not in QUICK]


@pytest.mark.parametrize("name, before, after", RUNS)
def test_a_run_goes_on_on_another_number_of_processes(name, before, after, tmp_path):
    """From a checkpoint, with the state that it has, as the run that was not interrupted."""
    data = make_data(tmp_path)
    options = f"--moe-router {name} --moe-gate-loss-wt 0"
    options += "" if ROUTERS[name].capacity_free else " --moe-dropless"
    losses = first_run(data, tmp_path / "run", before, EXPERTS, options)
    resumed = resume(data, tmp_path / "run", after, EXPERTS, options)
    assert (tmp_path / "run" / "experts").is_dir() == (before > 1)
    assert resumed == pytest.approx(losses[-len(resumed) :], rel=1e-5)
    assert len(resumed) == UPDATES - 4
    saved = torch.load(tmp_path / "run" / "checkpoint_1_4.pt", weights_only=True)["model"]
    gate = "decoder.layers.1.moe_layer.gate"
    if name == "threshold":
        assert saved[f"{gate}.updates"] == 4 and saved[f"{gate}.threshold"].dtype == torch.float64
    if name == "relu":
        steps_up = math.log(float(saved[f"{gate}.l1_weight"]) / 1e-8) / math.log(1.2)
        assert round(steps_up, 6) in (-4, -2, 0, 2, 4)  # of four updates
    if name == "hash":
        assert saved[f"{gate}.table"].shape == (24, 2)


def test_flags_reach_the_gate_and_the_checkpoint(tmp_path):
    """From a command line, and by --model-overrides at evaluation."""
    data = make_data(tmp_path)
    flags = "--moe-score sigmoid --moe-normalize-weights none --moe-route-scale 2.5 --moe-groups 2"
    flags += " --moe-top-groups 1 --moe-input-jitter 0.1 --moe-eom 0.2 --moe-fom 0.3"
    flags += " --moe-gating-fp32-product --moe-expert-count 4 --max-update 2"
    train(0, 1, f"{data} {TRAIN} {flags} --save-dir {tmp_path / 'topk'}")
    saved = torch.load(tmp_path / "topk" / "checkpoint_last.pt", weights_only=True)
    found = gate_settings(SimpleNamespace(**saved["cfg"]["model"]))
    assert found == GateSettings(
        2, True, "all", score="sigmoid", normalize_weights="none", route_scale=2.5, groups=2,
        top_groups=1, input_jitter=0.1, eom=0.2, fom=0.3, fp32_product=True,
    )  # fmt: skip


def test_base_is_evaluated_in_both_ways(tmp_path, capsys):
    data = make_data(tmp_path)
    flags = "--moe-router base --moe-expert-count 4 --max-update 6 --moe-gate-loss-wt 0"
    train(0, 1, f"{data} {TRAIN} {flags} --save-dir {tmp_path}")
    line = f"{data} {EVAL} --path {tmp_path}/checkpoint_last.pt --model-overrides "
    ways = []
    for way in ("greedy", "balanced"):
        ways.append(perplexity(0, 1, line + f"{{'moe_base_evaluation':'{way}'}}"))
        warned = "score depends on later tokens" in capsys.readouterr().err
        assert warned == (way == "balanced")
    assert ways[0] != ways[1] and max(ways) < 40
