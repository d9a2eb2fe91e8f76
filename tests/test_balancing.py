"""--moe-balance through fairseq's Trainer: on many processes and micro-batches as on one batch."""

import pytest
import torch
from processes import run_processes
from small_models import MOE, build_model, random_tokens
from training import first_run, make_data, resume
from updates import (
    BACKENDS,
    UPDATES,
    WORLD,
    as_sample,
    assert_same,
    batches,
    configure,
    joined,
    make_trainer,
    one_process,
    processes,
)

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.balance import Balance

EXPERTS = 4
FLAGS = f"--moe-expert-count {EXPERTS} --moe-dropless --moe-top1-expert --use-moe-pad-mask"
FLAGS += " --moe-normalize-expert-grad world_size --moe-gate-loss-wt 2 --clip-norm 5"
GLOBAL = f"{FLAGS} --moe-balance-over global_batch"
GATE = "decoder.layers.1.moe_layer.gate.wg.weight"
BIAS = "decoder.layers.1.moe_layer.gate.balance_bias"


def assert_same_updates(many, one):
    """Of the processes' runs and one's, gradients, parameters and the logged losses; other metrics
    are of micro-batches."""
    for update, expected in enumerate(one.gradients):
        found = joined([run.gradients[update] for run in many], EXPERTS)
        for name, value in found.items():
            what = f"gradient of {name}, update {update}"
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-11, msg=what)
    for name, value in joined([run.parameters for run in many], EXPERTS).items():
        torch.testing.assert_close(value, one.parameters[name], rtol=1e-8, atol=1e-10, msg=name)
    for run in many:
        for figures, expected in zip(run.figures, one.figures):
            for name in ("loss", "inner_loss", "moe_loss", "gnorm"):
                assert figures[name] == pytest.approx(expected[name], rel=1e-9), name


@pytest.fixture(scope="module")
def one_batch(folder):
    """The run with each update's rows in one batch of one process."""
    return one_process(folder, FLAGS)


def test_one_batch_is_its_own_global_batch(folder, one_batch):
    assert_same(one_batch, [one_process(folder, GLOBAL)], EXPERTS)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("options", ["", "--checkpoint-activations"])
def test_micro_batches_equal_one_batch(folder, one_batch, parts, options):
    assert_same_updates([one_process(folder, f"{GLOBAL} {options}", parts)], one_batch)


def test_the_choices_that_are_counted_are_those_that_are_trained(folder, monkeypatch):
    """With dropout, and second experts that are drawn, both passes have the same numbers."""
    of_batch, of_parts, loss = [], [], Balance.loss

    def watched(balance, routing, length=None):
        if balance.whole is not None and not balance.counting:
            of_batch.append(balance.whole.counts)
            of_parts.append(routing.counts)
        return loss(balance, routing, length)

    monkeypatch.setattr(Balance, "loss", watched)
    drawn = "--moe-second-expert-policy sampling --dropout 0.1"
    one_process(folder, GLOBAL.replace("--moe-top1-expert", drawn), 2, None, 2)
    trained = [first + second for first, second in zip(of_parts[::2], of_parts[1::2])]
    assert len(trained) == 2 and all(map(torch.equal, trained, of_batch[::2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_processes_equal_one_batch(folder, one_batch, parts, backend):
    flags = f"{GLOBAL} --checkpoint-activations"
    assert_same_updates(processes(2, folder, flags, backend, parts), one_batch)


@pytest.mark.parametrize("scope", ["process", "world"])
def test_the_loss_of_a_micro_batch_is_another(folder, one_batch, scope):
    """Without the flag these runs differ: the tests above can fail."""
    run = one_process(folder, f"{FLAGS} --moe-routing-scope {scope}", 2)
    difference = run.gradients[0][GATE] - one_batch.gradients[0][GATE]
    assert difference.norm() > 0.01 * one_batch.gradients[0][GATE].norm()


def test_a_process_without_data_counts_nothing(folder):
    one = one_process(folder, FLAGS, 1, 2, 3)
    for parts in (1, 2):
        many = processes(2, folder, GLOBAL, "legacy_ddp", parts, 2, 3)
        # what differs is how the rows of update 2 are cut, in none of which process 1 has any
        assert_same_updates(many, one)


def test_each_weight_of_the_loss_reaches_the_gate(folder):
    """The gradient grows by as much for each unit of weight, by every way of taking the loss."""
    for over in ("micro_batch", "sequence", "global_batch"):
        flags = f"{FLAGS} --checkpoint-activations --moe-balance-over {over} --clip-norm 0"
        none, one, two = (
            one_process(folder, f"{flags} --moe-gate-loss-wt {weight}", 2, None, 1)
            for weight in (0, 1, 2)
        )
        of_loss = one.gradients[0][GATE] - none.gradients[0][GATE]
        assert of_loss.abs().max() > 1e-3
        expected = none.gradients[0][GATE] + 2 * of_loss
        torch.testing.assert_close(two.gradients[0][GATE], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_on_two_processes_equal_one(folder, backend):
    flags = f"{FLAGS} --moe-balance-over sequence {WORLD}"
    assert_same(one_process(folder, flags), processes(2, folder, flags, backend), EXPERTS)


def test_none_is_as_without_weight(folder):
    """And logs the loss all the same."""
    none = one_process(folder, f"{FLAGS} --moe-balance none")
    without = one_process(folder, f"{FLAGS} --moe-gate-loss-wt 0")
    assert_same(without, [none], EXPERTS)
    assert none.figures[0]["moe_loss"] > 1


def test_loss_is_the_default(folder, one_batch):
    again = one_process(folder, f"{FLAGS} --moe-balance loss --moe-balance-over micro_batch")
    for name, value in again.parameters.items():
        assert torch.equal(value, one_batch.parameters[name])
    assert not any("balance_bias" in name for name in again.parameters)


# ---- the bias

BIASED = f"{FLAGS} --moe-balance bias --moe-bias-update-rate 0.05"


def biases(rank, cfg, backend, world, parts=1):
    """The bias after each update, and what the update's tokens say that it should be: this goes by
    the model as it is before the update, on all rows at once."""
    trainer = make_trainer(cfg, backend, world)
    model = trainer.get_model()
    gate = model.decoder.layers[1].moe_layer.gate
    found, expected, bias = [], [], [0.0] * EXPERTS
    for _, tokens in zip(range(UPDATES), batches()):
        sample = as_sample(tokens)
        with torch.no_grad():
            trainer.model.train()
            record = trainer.model(**sample["net_input"])[1]["moe"][0]
        loads = record.expert_counts.sum(dim=0).tolist()
        mean = sum(loads) / EXPERTS
        bias = [b + 0.05 * ((mean > load) - (mean < load)) for b, load in zip(bias, loads)]
        trainer.train_step([as_sample(part.chunk(world)[rank]) for part in tokens.chunk(parts)])
        found.append(gate.balance_bias.tolist())
        expected.append(bias)
    return found, expected


def test_the_bias_follows_the_load_of_an_update(folder):
    found, expected = biases(0, configure(folder, BIASED), "legacy_ddp", 1)
    for mine, true in zip(found, expected):
        assert mine == pytest.approx(true, abs=1e-6) and any(true)
    flags = f"{BIASED} --checkpoint-activations"
    assert biases(0, configure(folder, flags), "legacy_ddp", 1, 4)[0] == found
    for backend in BACKENDS[:: len(BACKENDS) - 1]:
        for many, _ in run_processes(2, biases, configure(folder, flags), backend, 2, 2):
            assert many == found


def test_both_has_loss_and_bias(folder):
    both = one_process(folder, f"{BIASED} --moe-balance both --moe-balance-over global_batch", 2)
    loss = one_process(folder, GLOBAL, 2)
    bias = one_process(folder, BIASED, 2)
    name = GATE  # in the first update the biases are 0
    torch.testing.assert_close(both.gradients[0][name], loss.gradients[0][name])
    assert not torch.equal(both.parameters[name], loss.parameters[name])
    assert not torch.equal(both.parameters[name], bias.parameters[name])


def test_a_bias_begins_at_0_in_a_model_that_was_trained_without():
    saved = build_model(**MOE, seed=1).state_dict()
    model = build_model(**MOE, moe_balance="bias", seed=2)
    model.load_state_dict(dict(saved))
    assert not model.state_dict()[BIAS].any()
    model.state_dict()[BIAS].fill_(0.5)
    build = build_model(**MOE, moe_balance="bias", seed=3)
    build.load_state_dict(model.state_dict())
    assert torch.equal(build.state_dict()[BIAS], torch.full((MOE["moe_expert_count"],), 0.5))
    with pytest.raises(UserError, match="balance_bias is not in the model"):
        build_model(**MOE).load_state_dict(model.state_dict())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("router", ["topk", "random"])
def test_the_bias_chooses_in_generation_as_at_evaluation(router, score):
    """Token by token as all at once, and otherwise than without it."""
    options = dict(MOE, moe_router=router, moe_score=score, moe_eval_capacity_token_fraction=1.0)
    model = build_model(**options, moe_balance="bias").double().eval()
    plain = build_model(**options).double().eval()
    torch.manual_seed(1)
    for layer in model.decoder.layers[1::2]:
        layer.moe_layer.gate.balance_bias.normal_()
    tokens = random_tokens()
    with torch.no_grad():
        whole, without = model(tokens)[0], plain(tokens)[0]
        state = {}
        steps = [
            model(tokens[:, : i + 1], incremental_state=state)[0][:, -1]
            for i in range(tokens.size(1))
        ]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(whole, without)


def test_a_frozen_gate_keeps_its_bias(folder):
    cfg = configure(folder, f"{BIASED} --moe-freeze gate")
    found, _ = biases(0, cfg, "legacy_ddp", 1)
    assert not any(map(any, found))


@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, before, after):
    data = make_data(tmp_path)
    options = "--moe-balance both --moe-bias-update-rate 0.01 --moe-dropless --moe-top-k 1"
    losses = first_run(data, tmp_path / "run", before, EXPERTS, options)
    resumed = resume(data, tmp_path / "run", after, EXPERTS, options)
    assert resumed == pytest.approx(losses[-len(resumed) :], rel=1e-5)
    saved = torch.load(tmp_path / "run" / "checkpoint_1_4.pt", weights_only=True)["model"]
    steps = saved[BIAS] / 0.01
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert 0 < steps.abs().max() <= 4


@pytest.mark.parametrize(
    "flags, words",
    [
        ("moe_balance=bias moe_top_k=6", "so a bias has no effect; lower --moe-top-k"),
        ("moe_balance=both moe_second_expert_policy=sampling", "--moe-second-expert-policy all"),
        (
            "moe_balance=bias moe_router=hash",
            "which does not choose by score, so a bias has no effect: use",
        ),
        ("moe_balance=both moe_router=sinkhorn", "--moe-router topk or random"),
        ("moe_balance=bias moe_router=relu", "--moe-router relu"),
        ("moe_balance=both moe_router=random", "whose gate is not trained"),
        ("moe_balance_over=global_batch moe_router=hash", "whose gate is not trained"),
        ("moe_balance=loss moe_bias_update_rate=0.1", "--moe-bias-update-rate 0.1"),
        ("moe_balance=bias moe_bias_update_rate=0.0", "--moe-bias-update-rate 0.0"),
        ("moe_balance=bias moe_balance_over=sequence", "has no balancing loss"),
        ("moe_balance=none moe_balance_over=global_batch", "has no balancing loss"),
        ("moe_balance_over=sequence moe_pad_rule=branch", "--moe-pad-rule branch"),
        ("moe_balance=biases", "--moe-balance biases is unknown: use loss, bias, both, none"),
        ("moe_balance_over=epoch", "--moe-balance-over epoch is unknown"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(flags, words):
    settings = dict(flag.split("=") for flag in flags.split())
    for name in ("moe_top_k", "moe_bias_update_rate"):
        if name in settings:
            settings[name] = (int if name == "moe_top_k" else float)(settings[name])
    with pytest.raises(UserError) as error:
        build_model(**{**MOE, **settings})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_null_experts_leave_a_choice_to_bias():
    flags = dict(moe_balance="bias", moe_top_k=6, moe_null_experts=1)
    assert (
        build_model(**{**MOE, **flags}).decoder.layers[1].moe_layer.gate.balance_bias.numel() == 7
    )


def test_a_transformed_loss_is_no_sum_over_micro_batches(folder):
    cfg = configure(folder, f"{GLOBAL} --moe-gate-loss-transform neg_log")
    with pytest.raises(UserError, match="--moe-gate-loss-transform neg_log"):
        make_trainer(cfg, "legacy_ddp", 1)
