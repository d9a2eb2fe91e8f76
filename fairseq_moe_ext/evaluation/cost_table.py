"""`fairseq-moe cost`: what a model costs, and the paper's Table 1."""

import argparse
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY

from .. import cost
from ..branch.outline import settings_of
from ..config import MoETransformerLMConfig
from ..config_checks import refuse_both_of_layers, validate
from ..errors import UserError, require_positive
from ..models.architectures import ARCHITECTURES, is_ours
from ..router_flags import check_known
from ..shape import Shape, shape_of
from ..text_table import add_form_flags, formed
from ..wording import did_you_mean, flag
from . import paper
from .loading import naming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Parameters, training FLOPs and memory of a model, given by --arch and the flags of "
        "fairseq-train, by --path, or by flags only."
    )
    parser.add_argument("--arch", help="an architecture of fairseq-train")
    parser.add_argument("--path", type=Path, help="a checkpoint, instead of flags")
    parser.add_argument("--paper", action="store_true", help="print the paper's Table 1 and stop")
    parser.add_argument(
        "--types", type=int, help=f"size of the vocabulary (default: {paper.VOCABULARY})"
    )
    parser.add_argument("--context", type=int, help=f"tokens per block (default: {paper.CONTEXT})")
    parser.add_argument(
        "--tokens", type=float, default=paper.TOKENS, help="training tokens (default: 300e9)"
    )
    parser.add_argument(
        "--experts-per-token",
        type=float,
        metavar="N",
        help="average experts per token (experts_per_token in the log), to count the FLOPs "
        "actually spent with null experts, threshold and relu (default: those of a balanced "
        "router)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="blocks per device (default: 1)")
    parser.add_argument("--world-size", type=int, default=1, help="number of devices (default: 1)")
    parser.add_argument(
        "--precision",
        choices=list(cost.PRECISIONS),
        default="fp32",
        help="of training on a GPU; on a CPU --bf16 keeps fp32 (default: fp32)",
    )
    parser.add_argument(
        "--optimizer", choices=list(cost.OPTIMIZERS), default="adam", help="(default: adam)"
    )
    parser.add_argument(
        "--sharding",
        choices=cost.SHARDINGS,
        default="none",
        help="shard the optimizer state, or parameters and gradients too, over all devices "
        "(default: none)",
    )
    add_form_flags(parser)
    model = parser.add_argument_group(
        "the model's flags, as for fairseq-train", argument_default=argparse.SUPPRESS
    )
    gen_parser_from_dataclass(model, MoETransformerLMConfig(), delete_default=True)


def run(args: Namespace) -> None:
    """Print what is asked for. Raises UserError for flags that contradict."""
    if args.paper:
        print(formed(args, paper_models(), [list(TABLE_1_HEAD), *table_1()]))
        return
    require_positive(args, "types", "context", "batch_size", "world_size")
    if args.precision == "memory-efficient-bf16" and args.sharding == "full":
        raise UserError(
            "--precision memory-efficient-bf16 with --sharding full: --ddp-backend fully_sharded "
            "has no such training; use bf16"
        )
    if not 0 < args.tokens < math.inf:
        raise UserError(f"--tokens {args.tokens}: use a number above 0")
    settings, vocabulary = _settings(args)
    shape = shape_of(settings, vocabulary)._replace(experts_per_token=args.experts_per_token)
    _check_experts_per_token(args.experts_per_token, shape)
    if shape.sparse:
        check_known(str(settings.get("moe_router", "topk")))
        more, fewer = sorted([args.world_size, shape.experts], reverse=True)
        if more % fewer:
            raise UserError(
                f"--world-size {args.world_size}: must divide the {shape.experts} experts of a "
                "layer, or be a multiple of their number"
            )
    context = args.context or settings.get("tokens_per_sample") or paper.CONTEXT
    numbers = costs(args, shape, int(context), bool(settings.get("dropout", 0) > 0))
    print(formed(args, numbers, _table(numbers)))


def _check_experts_per_token(number: Optional[float], shape: Shape) -> None:
    if number is not None and not (shape.sparse and 0 <= number <= shape.experts):
        most = f"at most the {shape.experts} of a layer" if shape.sparse else "a model with experts"
        raise UserError(f"--experts-per-token {number}: use 0 or more, {most}")


def _settings(args: Namespace) -> Tuple[Dict[str, Any], int]:
    """The model's settings and the size of its vocabulary."""
    flags = {
        name: value
        for name, value in vars(args).items()
        if name in MoETransformerLMConfig.__dataclass_fields__ and name != "batch_size"
    }
    if args.path is not None:
        if args.arch or flags or args.types:
            name = "arch" if args.arch else next(iter(flags), "types")
            raise UserError(
                f"--path with {flag(name)}: the checkpoint defines the model; remove one of them"
            )
        with naming(args.path):
            return settings_of(str(args.path))
    refuse_both_of_layers(flags.get("moe_freq"), flags.get("moe_layers"))
    space = Namespace(**flags)
    if args.arch is not None:
        if not is_ours({"arch": args.arch}):
            near = did_you_mean(args.arch, ARCHITECTURES)
            raise UserError(f"--arch {args.arch}: use one of {', '.join(ARCHITECTURES)}{near}")
        ARCH_CONFIG_REGISTRY[args.arch](space)
    elif not flags:
        raise UserError("no model given: use --arch, --path, flags of a model, or --paper")
    config = MoETransformerLMConfig(**vars(space))
    for name, value in (
        ("tokens_per_sample", args.context or paper.CONTEXT),
        ("max_target_positions", None),
        ("batch_size", None),
        ("ddp_backend", "legacy_ddp"),
    ):
        setattr(config, name, value)
    validate(config)
    return dict(vars(config)), args.types or paper.VOCABULARY


def costs(args: Namespace, shape: Shape, context: int, dropout: bool) -> Dict[str, Any]:
    """Everything that the command prints, as numbers: parameters, FLOPs and bytes."""
    parameters = cost.parameters(shape)
    numbers: Dict[str, Any] = {
        "parameters": {
            "total": parameters.total,
            "shared": parameters.shared,
            "expert": parameters.expert,
            "active": parameters.active,
        },
        "context": context,
        "tokens": args.tokens,
    }
    if shape.dense_twin:
        widths = [shape.dense_widths[layer] for layer in shape.picked]
        difference = cost.twin_difference(shape, context)
        numbers["twin"] = {"widths": widths, "flops_per_token_beyond_sparse": difference}
    for name, recompute in (("plain", False), ("recompute", True)):
        flops = cost.training_flops_per_token(shape, context, recompute)
        memory = cost.memory_per_device(
            shape,
            args.batch_size * context,
            world_size=args.world_size,
            precision=args.precision,
            optimizer=args.optimizer,
            sharding=args.sharding,
            recompute=recompute,
            dropout=dropout,
        )
        numbers[name] = {
            "flops_per_token": flops,
            "zflops": flops * args.tokens / 1e21,
            "bytes_per_device": {**memory._asdict(), "total": memory.total},
        }
    return numbers


def _table(numbers: Dict[str, Any]) -> List[List[str]]:
    without, again = numbers["plain"], numbers["recompute"]
    rows = [["", "plain", "recomputing"]]
    for name, value in numbers["parameters"].items():
        rows.append([f"parameters, {name}", f"{value:,}", f"{value:,}"])
    for label, key, digits in (
        ("GFLOPs per token", "flops_per_token", 1e9),
        (f"ZFLOPs of {numbers['tokens']:.3g} tokens", "zflops", 1),
    ):
        rows.append([label, f"{without[key] / digits:,.4g}", f"{again[key] / digits:,.4g}"])
    if "twin" in numbers:
        beyond = f"{numbers['twin']['flops_per_token_beyond_sparse']:+,.4g}"
        rows.append(["FLOPs per token beyond the sparse model's", beyond, ""])
    whole = without["bytes_per_device"]["total"]
    unit, size = ("GB", 1e9) if whole >= 1e9 else ("MB", 1e6)
    for name in without["bytes_per_device"]:
        sizes = (case["bytes_per_device"][name] / size for case in (without, again))
        rows.append([f"{unit} per device, {name}", *(f"{value:,.2f}" for value in sizes)])
    return rows


TABLE_1_HEAD = ("model", "parameters", "experts", "layers", "hidden", "heads", "ZFLOPs")


def paper_models() -> List[Dict[str, Any]]:
    """The models of the paper's Table 1, computed: parameters with a vocabulary of 51,200, ZFLOPs
    of 300e9 tokens with activation recomputation and a vocabulary of 50,000: with these we get the
    paper's numbers."""
    models = []
    for row in paper.TABLE_1:
        shape = Shape(
            row.layers,
            row.dim,
            4 * row.dim,
            vocabulary=paper.VOCABULARY,
            moe_freq=2 if row.experts else 0,
            experts=row.experts,
        )
        flops = cost.training_flops_per_token(
            shape._replace(vocabulary=paper.VOCABULARY_OF_TABLE_1), paper.CONTEXT, recompute=True
        )
        counts = cost.parameters(shape).total, row.experts, row.layers, row.dim, row.heads
        zflops = paper.TOKENS * flops / 1e21
        models.append(dict(zip(TABLE_1_HEAD, (row.name, *counts, zflops))))
    return models


def table_1() -> List[List[str]]:
    """Rows of text, in the digits of the paper's Table 1."""
    return [
        [
            model["model"],
            f"{model['parameters']:,}",
            str(model["experts"] or ""),
            *(str(model[name]) for name in ("layers", "hidden", "heads")),
            f"{model['ZFLOPs']:.2f}",
        ]
        for model in paper_models()
    ]
