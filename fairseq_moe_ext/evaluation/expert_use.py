"""Which expert takes which text, layer by layer, from a checkpoint and data-bins.

    python -m fairseq_moe_ext.evaluation.expert_use checkpoint_best.pt \\
        --bin docs=DATA/docs --bin code=DATA/code --subset test --json expert_use.json

Every choice of the gates is counted, before any is dropped for capacity: with top-2 routing a token
makes two in each MoE layer.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import torch

from .. import outputs
from ..errors import UserError
from .loading import language_modeling_task


def mutual_information(share: Sequence[Sequence[float]]) -> float:
    """Bits that one choice of expert tells about the kind of text, all kinds being equally likely.

    share[d][e]: how much of kind d's choices went to expert e; each row sums to 1. 0 when every
    kind uses the experts alike, log2(number of kinds) when the expert gives the kind away.
    """
    kinds = len(share)
    overall = [sum(row[e] for row in share) / kinds for e in range(len(share[0]))]
    return sum(
        p / kinds * math.log2(p / overall[e]) for row in share for e, p in enumerate(row) if p > 0
    )


def expert_use(
    checkpoint: Path,
    bins: Dict[str, Path],
    subset: str,
    tokens_per_sample: int,
    batch_size: int = 8,
) -> List[Dict]:
    """The share of each expert in the choices made on each data-bin, for each MoE layer.

    Args:
        checkpoint: a file of fairseq-train with a model of this package.
        bins: name -> ordinary fairseq data-bin (a folder with dict.txt and subset.{bin,idx}).
        subset: valid, test, ...
        tokens_per_sample: length of the blocks the text is cut into.
        batch_size: blocks a forward pass.

    Returns one dictionary per MoE layer: {"layer": its number from 0, "tokens": {name: tokens},
    "share": {name: list of E shares that sum to 1}}. Raises UserError for a model without experts.
    """
    from fairseq import checkpoint_utils

    if not checkpoint.is_file():
        raise UserError(f"checkpoint {checkpoint} does not exist: give a file fairseq-train wrote")
    counts: Dict[int, Dict[str, torch.Tensor]] = {}
    tokens: Dict[str, int] = {}
    model = None
    for name, folder in bins.items():
        task = language_modeling_task(folder, tokens_per_sample)
        if model is None:
            models, _ = checkpoint_utils.load_model_ensemble([str(checkpoint)], task=task)
            model = models[0].eval()
        task.load_dataset(subset)
        tokens[name] = 0
        for batch in _batches(task.dataset(subset), batch_size):
            with torch.no_grad():
                _, extra = model.decoder(batch, features_only=True)  # batch (B, L)
            if not extra["moe"]:
                raise UserError(f"checkpoint {checkpoint} has no MoE layer: nothing to count")
            tokens[name] += batch.numel()
            for record in extra["moe"]:
                layer = counts.setdefault(record.layer, {})
                layer[name] = layer.get(name, 0) + record.expert_counts.sum(0).double()  # (E,)
    return [
        {
            "layer": layer,
            "tokens": tokens,
            "share": {name: (c / c.sum()).tolist() for name, c in counts[layer].items()},
        }
        for layer in sorted(counts)
    ]


def _batches(dataset, batch_size: int) -> Iterator[torch.Tensor]:
    """Input tokens (B, L) without padding: only blocks of one length share a batch."""
    batch: List[torch.Tensor] = []
    for i in range(len(dataset)):
        tokens = dataset.collater([dataset[i]])["net_input"]["src_tokens"][0]  # (L,)
        if batch and (len(batch) == batch_size or len(tokens) != len(batch[0])):
            yield torch.stack(batch)
            batch = []
        batch.append(tokens)
    if batch:
        yield torch.stack(batch)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_moe_ext.evaluation.expert_use",
        description="Which expert takes which text, layer by layer.",
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
        "--tokens-per-sample", type=int, default=1024, help="block length (default: 1024)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="blocks a pass (default: 8)")
    parser.add_argument("--json", type=Path, help="write the result here instead of printing it")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json")
    args = parser.parse_args(argv)
    try:
        bins = {}
        for text in args.bin:
            name, equals, folder = text.partition("=")
            if not equals or not name or not Path(folder).is_dir():
                raise UserError(f"--bin {text}: give NAME=FOLDER with an existing data-bin")
            bins[name] = Path(folder)
        for flag, value in (
            ("--tokens-per-sample", args.tokens_per_sample),
            ("--batch-size", args.batch_size),
        ):
            if value < 1:
                raise UserError(f"{flag} {value}: use 1 or more")
        outputs.check([("--json", args.json)], args.overwrite, [args.checkpoint, *bins.values()])
        found = expert_use(
            args.checkpoint, bins, args.subset, args.tokens_per_sample, args.batch_size
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json is None:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        write_json(args.json, found)
    return 0


def write_json(path: Path, value: object) -> None:
    """Write the file, whole or not at all."""
    outputs.write_text(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
