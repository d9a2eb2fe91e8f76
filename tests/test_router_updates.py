"""State of routers that changes once per optimizer update: by all tokens of it, and no others."""

import pytest
import torch
from processes import run_processes
from training import first_run, make_data, resume
from updates import BACKENDS, UPDATES, WORLD, as_sample, batches, configure, make_trainer

from fairseq_moe_ext.moe.router import GateSettings, TopKRouter, register_router

EXPERTS = 4


@register_router("counting")
class CountingRouter(TopKRouter):
    """Chooses as topk does, but favours the experts that earlier updates have used least, so that
    a state that is wrong shows in the loss."""

    def __init__(self, dim, num_experts, *args, **kwargs):
        super().__init__(dim, num_experts, *args, **kwargs)
        self.register_state("seen", torch.zeros(num_experts))
        self.register_state("updates", torch.zeros(()))

    def logits(self, x):
        return self.wg(x) - 0.01 * self.seen.to(x.dtype)

    def after_update(self, observed):
        self.seen += observed["load"].to(self.seen.dtype)
        self.updates += 1


FLAGS = f"--moe-router counting --moe-expert-count {EXPERTS} --moe-dropless --moe-top1-expert"
FLAGS += f" --use-moe-pad-mask --moe-gate-loss-wt 0 {WORLD}"  # the loss is of a micro-batch


def states(rank, cfg, backend, world, parts=1, idle=None, dtype=torch.float64):
    """What the router of layer 1 has seen after each update, and in how many; between the updates
    are validations, and a forward pass in training mode that is in no update."""
    trainer = make_trainer(cfg, backend, world, dtype)
    trainer.reset_dummy_batch(as_sample(next(batches())))
    router = trainer.get_model().decoder.layers[1].moe_layer.gate
    found = []
    for update, tokens in zip(range(UPDATES), batches()):
        samples = [as_sample(part.chunk(world)[rank]) for part in tokens.chunk(parts)]
        if update == idle:
            samples = [as_sample(tokens[:2]) if rank == 0 else {}]
        trainer.train_step(samples)
        found.append((router.seen.tolist(), float(router.updates)))
        trainer.valid_step(as_sample(tokens.chunk(world)[rank]))
        trainer.model.train()
        trainer.model(tokens.chunk(world)[rank][:, :-1])
    return found, router.seen.dtype


def one_process(folder, flags=FLAGS, *how):
    return states(0, configure(folder, flags), "legacy_ddp", 1, *how)


def test_an_update_tells_what_its_tokens_have_done_once(folder):
    found, _ = one_process(folder)
    tokens = [int(as_sample(batch)["ntokens"]) for batch in batches()]
    for update, (seen, updates) in enumerate(found):
        assert sum(seen) == sum(tokens[: update + 1])  # each has one expert
        assert updates == update + 1
    assert one_process(folder, FLAGS, 4) == (found, torch.float32)  # micro-batches
    assert one_process(folder, f"{FLAGS} --checkpoint-activations", 2) == (found, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_processes_know_as_much_as_one(folder, backend):
    expected = one_process(folder)
    flags = f"{FLAGS} --checkpoint-activations"
    for found in run_processes(2, states, configure(folder, flags), backend, 2, 2):
        assert found == expected


def test_a_process_without_data_joins(folder):
    expected = one_process(folder, FLAGS, 1, 2)
    for found in run_processes(2, states, configure(folder, FLAGS), "legacy_ddp", 2, 1, 2):
        assert found == expected


@pytest.mark.parametrize("precision", ["--bf16", "--memory-efficient-fp16"])
@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded"])
def test_it_stays_in_float32(folder, backend, precision):
    """Small steps would be lost in half precision."""
    cfg = configure(folder, f"{FLAGS} {precision} --optimizer adam --lr 0.01")
    for found, dtype in run_processes(2, states, cfg, backend, 2, 1, None, torch.float32):
        assert dtype == torch.float32
        assert found[-1][1] == UPDATES


def test_casting_keeps_it():
    layer = CountingRouter(4, EXPERTS, GateSettings())
    layer.seen += 1 / 3
    assert torch.equal(layer.half().seen, torch.full((EXPERTS,), 1 / 3))
    assert layer.bfloat16().seen.dtype == torch.float32 and layer.wg.weight.dtype == torch.bfloat16
    assert layer.double().seen.dtype == torch.float32
    assert torch.equal(layer.float().state_dict()["seen"], torch.full((EXPERTS,), 1 / 3))


def test_a_skipped_update_does_not_count(folder):
    """Of --fp16: at first the loss is scaled beyond float16."""
    cfg = configure(folder, f"{FLAGS} --fp16 --fp16-init-scale {2**40} --fp16-scale-window 99")
    trainer = make_trainer(cfg, "legacy_ddp", 1, torch.float32)
    router = trainer.get_model().decoder.layers[1].moe_layer.gate
    tokens = next(batches())
    skipped = 0
    while trainer.train_step([as_sample(tokens)]) is None:
        skipped += 1
        assert float(router.updates) == 0 and not router.seen.any()
    assert skipped > 0
    assert float(router.updates) == 1
    assert float(router.seen.sum()) == as_sample(tokens)["ntokens"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    data = make_data(tmp_path)
    options = "--moe-router counting --moe-top1-expert --moe-dropless"
    losses = first_run(data, tmp_path / "run", 1, EXPERTS, options)
    resumed = resume(data, tmp_path / "run", 1, EXPERTS, options)
    assert resumed == losses[-len(resumed) :]
    saved = torch.load(tmp_path / "run" / "checkpoint_1_4.pt", weights_only=True)["model"]
    assert saved["decoder.layers.1.moe_layer.gate.updates"] == 4
    assert saved["decoder.layers.1.moe_layer.gate.seen"].sum() == 4 * 8 * 8  # rows of 8 tokens
