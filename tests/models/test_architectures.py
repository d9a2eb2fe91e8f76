"""The paper's sizes, by name, with the paper's parameter counts."""

from pathlib import Path

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf
from small_models import make_config, make_task

from fairseq_moe_ext.branch.settings import OtherModel, translated_settings
from fairseq_moe_ext.checkpoint.settings import check_buildable
from fairseq_moe_ext.cost import Shape, parameters
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.architectures import ARCHITECTURES, is_ours
from fairseq_moe_ext.models.language_model import MODEL_NAME, MoETransformerLanguageModel

# shared, expert with a vocabulary of 51,200: paper.md, "Cost"
PAPER = {
    "dense_lm_125m": (124_377_600, 0),
    "dense_lm_355m": (354_740_224, 0),
    "dense_lm_1_3b": (1_313_460_224, 0),
    "dense_lm_2_7b": (2_648_724_480, 0),
    "dense_lm_6_7b": (6_653_878_272, 0),
    "dense_lm_13b": (12_847_728_640, 0),
    "moe_lm_15b": (98_402_304, 14_605_713_408 - 98_402_304),
    "moe_lm_52b": (260_306_944, 51_831_371_776 - 260_306_944),
    "moe_lm_207b": (923_267_072, 207_144_611_840 - 923_267_072),
    "moe_lm_1_1t": (4_539_621_376, 1_104_219_021_312 - 4_539_621_376),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_of_the_built_model(name):
    flags = ARCHITECTURES[name]
    with torch.device("meta"):
        model = MoETransformerLanguageModel.build_model(
            make_config(**{"dropout": 0.1, **flags}), make_task(51_200)
        )
    expert = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    shared = sum(p.numel() for p in model.parameters()) - expert
    if name in PAPER:
        assert (shared, expert) == PAPER[name]
    shape = Shape(
        layers=flags["decoder_layers"],
        dim=flags["decoder_embed_dim"],
        ffn_dim=flags["decoder_ffn_embed_dim"],
        vocabulary=51_200,
        moe_freq=flags.get("moe_freq", 0),
        experts=flags.get("moe_expert_count", 0),
    )
    assert parameters(shape)[:2] == (shared, expert)


def test_paper_and_table_name_the_same_models():
    assert set(ARCHITECTURES) == set(PAPER) | {"dense_lm_tiny", "moe_lm_tiny"}
    assert all(ARCH_MODEL_REGISTRY[name] is MoETransformerLanguageModel for name in ARCHITECTURES)


def test_the_page_says_where_the_sparse_architectures_differ_from_the_branch():
    """docs/train.md: --arch moe_transformer_lm has the branch's defaults."""
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    words = " ".join(page.split("## Coming from")[1].split("## ")[0].split())

    def parsed(arch):
        line = ["x", *"--task language_modeling --batch-size 1 --arch".split(), arch]
        args = options.parse_args_and_arch(options.get_training_parser(), line)
        return convert_namespace_to_omegaconf(args).model

    branch, paper = parsed("moe_transformer_lm"), parsed("moe_lm_15b")
    policy = f"`--moe-second-expert-policy {paper.moe_second_expert_policy}`"
    assert f"{policy} (the branch: `{branch.moe_second_expert_policy}`)" in words
    assert paper.moe_gating_use_fp32 and not branch.moe_gating_use_fp32
    assert "`--moe-gating-use-fp32` (off)" in words
    divisor = f"`--moe-normalize-expert-grad {paper.moe_normalize_expert_grad}`"
    assert f"{divisor} (`{branch.moe_normalize_expert_grad}`)" in words


def test_a_flag_overrides_the_architecture():
    class Args:
        decoder_layers = 3
        moe_expert_count = 32

    args = Args()
    ARCH_CONFIG_REGISTRY["moe_lm_15b"](args)
    assert (args.decoder_layers, args.moe_expert_count) == (3, 32)
    assert (args.decoder_embed_dim, args.moe_freq, args.dropout) == (768, 2, 0.1)


def test_an_old_checkpoints_config_gets_the_defaults_of_newer_flags():
    cfg = OmegaConf.create({"_name": "moe_lm_15b", "decoder_layers": 3})
    ARCH_CONFIG_REGISTRY["moe_lm_15b"](cfg)
    assert cfg.decoder_layers == 3
    assert cfg.moe_dropless is False
    assert cfg.moe_capacity_factor is None


def test_an_architecture_that_a_plugin_registers_is_ours(monkeypatch):
    monkeypatch.setitem(ARCH_MODEL_REGISTRY, "mine", MoETransformerLanguageModel)
    for name in ("mine", MODEL_NAME, *ARCHITECTURES):
        assert is_ours({"_name": name})
    assert not is_ours({"_name": "transformer_lm"}) and not is_ours({})


def test_a_model_derived_from_ours_is_told_by_its_class(monkeypatch):
    """Its plugin is named already."""
    derived = type("Wider", (MoETransformerLanguageModel,), {})
    monkeypatch.setitem(ARCH_MODEL_REGISTRY, "wider", derived)
    words = "x.pt: has the architecture 'wider' of the model Wider; this command takes"
    with pytest.raises(OtherModel, match=words):
        translated_settings("x.pt", {**vars(make_config()), "_name": "wider"})


def test_what_no_plugin_has_registered_is_told_with_the_flag():
    """An own name that begins as the branch's was read by the branch's rules."""
    for name in ("transformer_lm_mine", "mine"):
        words = f"x.pt: has the architecture '{name}', which is not registered: .*--user-dir"
        with pytest.raises(OtherModel, match=words):
            translated_settings("x.pt", {**vars(make_config()), "_name": name})
    names = {"model": "moe_lm_tiny", "task": "language_modeling", "criterion": "cross_entropy"}
    for group, kind in {"model": "architecture", "task": "task", "criterion": "criterion"}.items():
        cfg = {key: {"_name": "mine" if key == group else name} for key, name in names.items()}
        words = f"x.pt: has the {kind} 'mine', which is not registered"
        with pytest.raises(UserError, match=words):
            check_buildable("x.pt", {"cfg": cfg, "args": None}, with_task=True)
