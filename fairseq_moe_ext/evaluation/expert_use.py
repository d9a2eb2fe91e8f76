"""`fairseq-moe expert-use`: which expert takes which text, layer by layer, from a checkpoint and
data-bins.

Counts every choice of the gates, and drops none for capacity: with top-2 routing a token makes two
in each MoE layer. Reports how much information the choices carry about text and token,
beside that of random gates (specialisation.py).
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.models import FairseqLanguageModel

from .. import data_bin, outputs, tokenizer_files
from ..errors import UserError, require_positive
from ..wording import did_you_mean
from . import specialisation, texts
from .loading import (
    add_model_flags,
    check_path,
    language_modeling_task,
    load_model,
    moe_layers,
    on_device,
    parse_overrides,
    set_gates,
)

_LENGTH = 1024  # tokens of a block


def expert_use(
    checkpoint: Path,
    bins: Dict[str, Path],
    subset: str,
    tokens_per_sample: Optional[int] = None,
    batch_size: int = 8,
    among: Sequence[str] = (),
    cpu: bool = False,
    overrides: Optional[Dict[str, Any]] = None,
) -> List[specialisation.LayerUse]:
    """The share of each expert in the choices made on each data-bin, for each MoE layer.

    Args:
        checkpoint: a file of fairseq-train with a model of this package.
        bins: name -> ordinary fairseq data-bin (a folder with dict.txt and subset.{bin,idx}).
        subset: valid, test, ...
        tokens_per_sample: length of the blocks the text is cut into; by default 1,024, or the
            model's context if that is shorter.
        batch_size: blocks a forward pass.
        among: data-bins over which to take the information; all, if empty.
        cpu: use the CPU even if there is a GPU.
        overrides: settings of the model that replace the saved ones.

    Returns one entry per MoE layer, with the information of the first TOKENS tokens. Raises
    UserError for a model without experts, for longer blocks than it takes, and for data-bins
    without the subset or with different dictionaries.
    """
    check_path(checkpoint, "")
    _check_bins(bins, subset)
    task = language_modeling_task(next(iter(bins.values())), 1)
    tokenizer_files.check(checkpoint, *bins.values())
    model, _ = load_model(checkpoint, task, overrides)
    set_gates(model, dropless=True)
    model = on_device(model, cpu)
    device = next(model.parameters()).device
    watches = _watch(model)
    if not watches:
        raise UserError(f"{checkpoint}: has no experts; name an MoE checkpoint")
    length = _length(tokens_per_sample, model.max_positions())
    counts: Dict[int, Dict[str, torch.Tensor]] = {}
    tokens: Dict[str, int] = {}
    watched = list(among) or list(bins)
    seen = _Seen()
    for name, folder in bins.items():
        task = language_modeling_task(folder, length)
        task.load_dataset(subset)
        tokens[name] = 0
        for batch in _batches(task.dataset(subset), batch_size):
            looking = name in watched and tokens[name] < specialisation.TOKENS // len(watched)
            for watch in watches.values():
                watch.on, watch.length = looking, batch.size(1)
            if looking:
                seen.add(name, batch)
            with torch.no_grad():
                _, extra = model.decoder(batch.to(device), features_only=True)  # batch (B, L)
            tokens[name] += batch.numel()
            for record in extra["moe"]:
                layer = counts.setdefault(record.layer, {})
                layer[name] = (
                    layer.get(name, 0) + record.expert_counts.sum(0).double().cpu()
                )  # (E,)
    return [
        {
            "layer": layer,
            "tokens": tokens,
            "share": {name: (c / c.sum()).tolist() for name, c in counts[layer].items()},
            "among": watched,
            "information": specialisation.information(*watches[layer].counted(), *seen.arrays()),
        }
        for layer in sorted(counts)
    ]


def _check_bins(bins: Dict[str, Path], subset: str) -> None:
    for name, folder in bins.items():
        if not ((folder / data_bin.DICTIONARY).is_file() and data_bin.has_split(folder, subset)):
            raise UserError(
                f"--bin {name}={folder}: lacks {data_bin.DICTIONARY} or {subset}.idx; give a "
                "data-bin, and one of its splits as --subset"
            )
    data_bin.check_dictionaries(next(iter(bins.values())), bins)


def _length(asked: Optional[int], longest: int) -> int:
    """Tokens of a block, of a model that takes `longest` at most."""
    if asked is not None and asked > longest:
        raise UserError(
            f"--tokens-per-sample {asked}: the model takes at most {longest} tokens; use "
            f"{longest} or less"
        )
    return asked or min(_LENGTH, longest)


def _watch(model: FairseqLanguageModel) -> Dict[int, specialisation.Watch]:
    """Index of a layer -> the watch on its gate."""
    generator = torch.Generator().manual_seed(1)
    return {i: specialisation.Watch(moe.gate, generator) for i, moe in moe_layers(model).items()}


class _Seen:
    """The tokens that are counted, and the kinds of their blocks of text."""

    def __init__(self) -> None:
        self.token_ids: List[np.ndarray] = []
        self.kinds: List[int] = []  # of the blocks
        self.names: Dict[str, int] = {}  # of the kinds

    def add(self, name: str, batch: torch.Tensor) -> None:
        """Blocks (B, L) of one kind."""
        self.token_ids.append(batch.flatten().numpy())
        self.kinds += [self.names.setdefault(name, len(self.names))] * batch.size(0)

    def arrays(self) -> Tuple[np.ndarray, np.ndarray]:
        """As specialisation.information takes them."""
        return np.concatenate(self.token_ids), np.array(self.kinds)


def _batches(dataset: FairseqDataset, batch_size: int) -> Iterator[torch.Tensor]:
    """Input tokens (B, L) without padding."""
    rows = (
        dataset.collater([dataset[i]])["net_input"]["src_tokens"][0] for i in range(len(dataset))
    )
    return map(torch.stack, texts.batches(rows, len, batch_size))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Count which expert takes which text, layer by layer, and how many bits a choice says "
        "about the kind of text and about the token, beside those of random gates."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of fairseq-train")
    parser.add_argument(
        "--bin",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a data-bin and its name in the result; may be repeated",
    )
    parser.add_argument("--subset", default="test", help="split to read (default: test)")
    parser.add_argument(
        "--tokens-per-sample",
        type=int,
        help=f"block length (default: {_LENGTH}, or the model's context if that is shorter)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="blocks per pass (default: 8)")
    parser.add_argument(
        "--among",
        metavar="NAME,NAME,...",
        help="compute the information over these data-bins only (default: all)",
    )
    parser.add_argument("--json", type=Path, help="write the result here instead of printing it")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> None:
    """What the command line asks for. Raises UserError for what cannot be."""
    bins = {}
    for text in args.bin:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"--bin {text}: give NAME=FOLDER, a data-bin and a name for it")
        if not Path(folder).is_dir():
            raise UserError(f"--bin {text}: no such folder; check the path")
        if name in bins:
            raise UserError(f"--bin {text}: the name {name} is given twice; choose another")
        bins[name] = Path(folder)
    among = args.among.split(",") if args.among else []
    for name in among:
        if name not in bins:
            raise UserError(
                f"--among {args.among}: no --bin {name}; there are {', '.join(bins)}"
                + did_you_mean(name, bins)
            )
    require_positive(args, "tokens_per_sample", "batch_size")
    outputs.check([("--json", args.json)], args.overwrite, [args.checkpoint, *bins.values()])
    layers = expert_use(
        args.checkpoint,
        bins,
        args.subset,
        args.tokens_per_sample,
        args.batch_size,
        among,
        args.cpu,
        parse_overrides(args.model_overrides),
    )
    if args.json is None:
        print(outputs.as_json(layers))
        return
    outputs.write_json(args.json, layers)
    print(specialisation.verdict(layers, "domain", "kind of text"))
    print(specialisation.verdict(layers, "token", "token"))


if __name__ == "__main__":  # its name before there was `fairseq-moe expert-use`
    import fairseq_moe_command

    sys.exit(fairseq_moe_command.main(["expert-use", *sys.argv[1:]]))
