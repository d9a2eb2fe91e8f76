"""Small checkpoints of fairseq's `moe` branch, and what reads them."""

import copy
import sys
from pathlib import Path

import branch_files
import fairseq_cli.eval_lm
import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from processes import run_processes
from small_models import VOCABULARY, build_model
from training import USER_DIR, status_of, write_data_bin
from updates import as_sample, batches, configure, make_trainer

from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"the branch's own checkpoint is not there: {REFERENCE}"
)


SHAPE = dict(
    decoder_layers=4,
    decoder_embed_dim=16,
    decoder_ffn_embed_dim=32,
    decoder_attention_heads=2,
    dropout=0.0,
    attention_dropout=0.0,
    tokens_per_sample=64,
    max_target_positions=64,
    activation_fn="gelu",
    share_decoder_input_output_embed=True,
    moe_freq=2,
    moe_expert_count=4,
    moe_second_expert_policy="all",
    moe_gating_use_fp32=True,
    moe_normalize_expert_grad="world_size",
    moe_eval_capacity_token_fraction=-1.0,
)
SMALL = {"_name": "transformer_lm_gpt2_tiny", **SHAPE}


def make_data_bin(folder, dictionary):
    generator = torch.Generator().manual_seed(3)

    def rows():
        sizes = range(5, 17)
        return [torch.randint(4, len(dictionary), (n,), generator=generator) for n in sizes]

    return write_data_bin(folder, {"train": rows(), "valid": rows()}, dictionary)


def evaluate(rank, world, line):
    """fairseq-eval-lm in this process, one of those that tests/processes.py started."""
    sys.argv = ["fairseq-eval-lm", *line.split("|")]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser()))
    cfg.distributed_training.distributed_world_size = world
    cfg.distributed_training.distributed_rank = rank
    return float(fairseq_cli.eval_lm.main(cfg)["perplexity"])


def perplexities(world, *arguments):
    """Of all processes."""
    common = "--user-dir", USER_DIR, "--gen-subset", "valid", "--cpu", "--num-workers", "0"
    line = "|".join([*map(str, arguments), *common, "--no-progress-bar"])
    return [evaluate(0, 1, line)] if world == 1 else run_processes(world, evaluate, world, line)


# What the branch's own code reported (README.md beside the checkpoint).
REPORTED = {-1.0: 133.9989, 0.25: 137.8824, 1.0: 133.9311}


# Settings beside SMALL, ranks, how the files are written.
CHECKPOINTS = {
    "two ranks": ({}, 2, {}),
    "one rank": ({}, 1, {}),
    "a rank an expert": ({}, 4, {}),
    "experts on two ranks each": ({}, 8, {}),
    "old args": ({}, 2, {"old_args": True}),
    "FSDP": ({}, 2, {"fsdp": "state"}),
    "FSDP, one module, experts on two ranks each": ({}, 8, {"fsdp": "state", "wrapped": False}),
    "FSDP, weights too": (dict(moe_expert_count=6), 3, {"fsdp": "weights"}),
    "top-1": (dict(moe_top1_expert=True), 2, {}),
    "all layers": (dict(moe_freq=1), 2, {}),
    "learned positions": (dict(decoder_learned_pos=True), 2, {}),
    "own output": (dict(share_decoder_input_output_embed=False), 2, {}),
    "relu, normed": (dict(activation_fn="relu", layernorm_embedding=True), 2, {}),
    "unscaled": (dict(no_scale_embedding=True, no_decoder_final_norm=True), 2, {}),
    "dead width": (dict(moe_expert_ffn_dim=7, _name="transformer_lm_gpt3_small"), 2, {}),
    "top-1 on eight, old args": (dict(moe_top1_expert=True, moe_freq=1), 8, {"old_args": True}),
    "prioritized, masked": (
        dict(
            moe_batch_prioritized_routing=True,
            use_moe_pad_mask=True,
            moe_normalize_gate_prob_before_dropping=True,
        ),
        4,
        {},
    ),
    "gpt3, untied": (
        dict(
            _name="transformer_lm_gpt3_small",
            decoder_learned_pos=True,
            share_decoder_input_output_embed=False,
            moe_freq=1,
        ),
        8,
        {"fsdp": "weights", "wrapped": False},
    ),
    "before zip files": ({}, 2, {"zipped": False}),
}
NOT_OURS = ("_name", "moe_expert_ffn_dim")


def write_small(folder, case="two ranks", seed=0, **more):
    """A checkpoint of the branch and the model of ours with the same weights."""
    changes, ranks, how = CHECKPOINTS[case]
    settings = {**SMALL, **changes}
    flags = {key: value for key, value in settings.items() if key not in NOT_OURS}
    model = build_model(seed, **flags).eval()
    Path(folder).mkdir(exist_ok=True)
    branch_files.write(
        str(folder), settings, VOCABULARY, ranks, branch_files.of_model(model), **how, **more
    )
    return model


def tokens():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, VOCABULARY, (2, 24), generator=generator)


def loaded_logits(rank, folder, data, overrides):
    lm = MoETransformerLanguageModel.from_pretrained(folder, "model.pt", data, **overrides)
    with torch.no_grad():
        return lm.models[0](tokens())[0]


AS_SAVED = {"moe_eval_capacity_token_fraction": -1.0}


ADAM = "--optimizer adam --adam-betas (0.9,0.98) --lr 0.001 --tokens-per-sample 64"
ADAM += " --decoder-layers 4 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
ADAM += " --moe-expert-count 4"


def remembered(name, shape):
    """A state of Adam that tells which parameter it is of."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1000 + len(name))
    return {
        "step": 10,
        "exp_avg": torch.randn(shape, generator=generator),
        "exp_avg_sq": torch.rand(shape, generator=generator),
    }


def restored(rank, folder, path, flags, world, reset=False):
    """Updates, and of each parameter of this process its value and the optimizer's exp_avg."""
    cfg = configure(folder, f"{ADAM} {flags}")
    trainer = make_trainer(cfg, "legacy_ddp", world, torch.float32)
    trainer.load_checkpoint(path, reset_optimizer=reset)
    state = trainer.optimizer.state_dict()["state"]
    named = trainer.get_model().named_parameters()
    found = {
        name: (parameter.detach().float().clone(), copy.deepcopy(state.get(i)))
        for i, (name, parameter) in enumerate(named)
    }
    updates = trainer.get_num_updates()
    trainer.train_step([as_sample(next(batches())[:2])])  # the state serves
    return updates, found


def run(capsys, name, line):
    """A command of fairseq in this process; its status and what it says on stderr."""
    return status_of(f"fairseq-{name} {line}"), capsys.readouterr().err


TRAIN = f"--user-dir {USER_DIR} --task language_modeling --criterion moe_cross_entropy --cpu"
TRAIN += f" --arch moe_lm_tiny {ADAM} --decoder-attention-heads 2 --batch-size 2 --num-workers 0"
TRAIN += " --no-progress-bar --no-epoch-checkpoints"


def change(path, edit):
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)
