"""Command lines of fairseq's `moe` branch: docs/train.md, and what fairseq-train says of them."""

import re
from argparse import Namespace
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from fairseq_moe_ext.config import defaults
from fairseq_moe_ext.patches.flag_owners import BRANCH_ONLY

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Coming from")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^  \| (`transformer_lm.*) \| `(--.*)` \|$", SECTION, re.M))
SIZES = {f"decoder_{s}" for s in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")}
STOCK = [
    name
    for name, model in ARCH_MODEL_REGISTRY.items()
    if issubclass(model, TransformerLanguageModel)
]


def model_of(line):
    """The settings that fairseq-train gives the model."""
    basis = "x --task language_modeling --batch-size 1 --tokens-per-sample 64 "
    args = options.parse_args_and_arch(options.get_training_parser(), (basis + line).split())
    return convert_namespace_to_omegaconf(args).model


def refusal(capsys, line):
    with pytest.raises(SystemExit):
        model_of(line)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def differing(ours, stocks):
    """The settings of both that differ."""
    shared = [name for name in defaults() if name in stocks]
    assert len(shared) > 15
    return {name for name in shared if str(ours[name]) != str(stocks[name])}


def test_the_flags_of_the_rows_and_the_sizes_make_the_branchs_models():
    """Stock 0.12.2 has the branch's architectures, but for the number of layers of gpt2_big."""
    default = {
        field.name: field.default
        for field in fields(TransformerLanguageModelConfig)
        if not str(field.default).startswith("${")  # another group's
    }
    of_rows = 0
    for names, flags in ROWS.items():
        ours = model_of(f"--arch moe_transformer_lm {flags}")
        patterns = re.findall(r"`(\w+\*?)`", names)
        for arch in (arch for arch in STOCK if any(fnmatch(arch, name) for name in patterns)):
            stocks = Namespace()
            ARCH_CONFIG_REGISTRY[arch](stocks)
            assert differing(ours, {**default, **vars(stocks)}) <= SIZES, arch
            of_rows += 1
    assert of_rows == len([arch for arch in STOCK if not re.search("gbw|wiki|megatron", arch)])


@pytest.mark.parametrize(
    "line",
    [
        "--arch transformer_lm",
        "--arch transformer_lm_gbw --decoder-layers 3",
        "--arch transformer_lm_gpt2_bigger --decoder-layers 24 --attention-dropout 0.3",
        "--arch transformer_lm_gpt3_small --decoder-embed-dim 96",
    ],
)
def test_the_error_for_the_branchs_arch_lists_what_makes_its_model(capsys, line):
    told = refusal(capsys, f"{line} --moe-freq 2")
    _, arch, *more = line.split()
    written = re.search(rf"in place of --arch {arch} write (--arch moe_transformer_lm .*)", told)
    assert not differing(model_of(" ".join([*more, written[1]])), model_of(line))


def test_a_negative_value_beside_it_is_no_flag(capsys):
    """As for fairseq's own parser, also before Python 3.14."""
    told = refusal(capsys, "--arch transformer_lm --dropout -1e-1 --moe-freq 2")
    assert "in place of --arch transformer_lm write" in told


def test_the_page_names_all_flags_of_the_branch_alone_and_they_are_refused_so(capsys):
    bullet = re.search(r"^- Remove (`--is-moe`.*?), which do not exist here", SECTION, re.M | re.S)
    assert {*re.findall(r"`(--[\w-]+)`", bullet[1])} == BRANCH_ONLY
    for flag in BRANCH_ONLY:
        told = refusal(capsys, f"--arch moe_lm_tiny {flag} 0")
        assert told.endswith(
            f"; {flag} of fairseq's moe branch has no counterpart here: remove it\n"
        )


def test_other_flags_that_the_page_names_exist(capsys):
    named = {*re.findall(r"`(--[\w-]+)", SECTION)} - BRANCH_ONLY
    assert len(named) > 15
    for flag in named - {"--offload-activations"}:
        told = refusal(capsys, f"--arch moe_lm_tiny --optimizer adam {flag} x --no-such-flag")
        assert flag not in told.partition("unrecognized arguments:")[2]
    told = refusal(capsys, "--arch moe_lm_tiny --offload-activations")
    assert "unrecognized arguments: --offload-activations" in told


def test_a_command_line_of_the_branch_with_the_pages_changes():
    """The flags of the training command in its README.moe.md."""
    model = model_of(
        "--ddp-backend fully_sharded --memory-efficient-fp16 --checkpoint-activations "
        f"--arch moe_transformer_lm {ROWS['`transformer_lm_gpt`, `transformer_lm_gpt2_*`']} "
        "--share-decoder-input-output-embed --decoder-layers 24 --decoder-embed-dim 2048 "
        "--decoder-ffn-embed-dim 8192 --decoder-attention-heads 32 --moe-expert-count 8 "
        "--moe-freq 2 --moe-gating-use-fp32 --moe-second-expert-policy all "
        "--moe-normalize-expert-grad sqrt_world_size --moe-eval-capacity-token-fraction -1.0 "
        "--max-sentences-valid 1 --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 "
        "--moe-gate-loss-combine-method sum --optimizer adam --clip-norm 0.0 --lr 0.0005 "
        "--warmup-updates 750 --update-freq 1 --max-update 250 --disable-validation"
    )
    assert (model.moe_expert_count, model.attention_dropout) == (8, 0.1)
