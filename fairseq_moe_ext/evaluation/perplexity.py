"""`fairseq-moe evaluate`: perplexity of one model on many test sets, with one load of the model.

The paper's protocol (blocks): a set's text is cut into blocks of `context` tokens, each scored on
its own, as fairseq-eval-lm does. The other (sliding): each token is scored with at least
`context - stride` tokens before it.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat, data_bin, outputs
from ..errors import DAMAGED, UserError
from ..wording import small
from . import capacity
from .cost_table import markdown, plain
from .expert_use import write_json
from .loading import check_path, corpora_of, language_modeling_task, parse_overrides

_LOGITS = 2**24  # that exist at a time


class Text(NamedTuple):
    """One test set."""

    name: str
    folder: Path
    trained: bool  # the model was trained on the corpus: in domain
    tokens: Tensor  # (N,) int64
    units: np.ndarray  # (U,) first token of each unit that the bootstrap draws
    bytes: Optional[int]  # UTF-8, as `fairseq-moe prepare` counted; None: not known


class Scores(NamedTuple):
    """What one pass over a set gives."""

    nll: np.ndarray  # (N,) nats
    # Share of first, and of second, choices; of all where there are more; None: no experts.
    dropped: Optional[Tuple[float, ...]]
    seconds: float


def read_texts(
    folders: Sequence[Path],
    subset: str,
    context: int,
    dictionary: Any,
    trained_on: Optional[Sequence[str]] = None,
) -> List[Text]:
    """The test sets below the folders, each a data-bin or a folder of data-bins. Raises UserError
    for a set that is missing, empty or there twice.

    Args:
        trained_on: names of corpora that the model was trained on, as far as they are known.
    """
    texts: Dict[str, Text] = {}
    for data in folders:
        corpora = data_bin.find_corpora(data)
        having = {n: f for n, f in corpora.items() if data_bin.has_split(f, subset)}
        if not having:
            raise UserError(f"{data}: no data-bin {subset} in it or its folders (--subset)")
        missing = sorted(corpora.keys() - having.keys())
        if missing:
            where = f"{', '.join(missing)} of {data}"
            print(f"{where}: no {subset} split, so in no figure", file=sys.stderr)
        for corpus, folder in having.items():
            name = data_bin.own_name(corpus, folder)
            prefix = str(folder / subset)
            if name in texts:
                raise UserError(f"{folder}: a second set called {name!r}; rename its folder")
            dtype = compat.check_data_bin(prefix)
            tokens = np.fromfile(f"{prefix}.bin", dtype=dtype)
            compat.check_tokens(f"{prefix}.bin", tokens, dictionary)
            tokens = tokens.astype(np.int64)
            trained = corpus in data_bin.trained_on(corpora, trained_on)
            texts[name] = Text(
                name,
                folder,
                trained,
                torch.from_numpy(tokens),
                unit_starts(tokens, dictionary.eos(), context),
                _bytes(folder, subset, len(tokens)),
            )
    return list(texts.values())


def unit_starts(tokens: np.ndarray, eos: int, least: int) -> np.ndarray:
    """Where the units of the bootstrap begin: (U,) positions, the first 0.

    Documents end at a blank line (two </s>), and a document with blank lines in it looks like
    several. So stretches are joined until a unit has at least `least` tokens: text that hangs
    together stays so.
    """
    ends = np.flatnonzero((tokens[1:] == eos) & (tokens[:-1] == eos)) + 2
    starts = [0]
    for end in ends:
        if end - starts[-1] >= least and end < len(tokens):
            starts.append(int(end))
    return np.array(starts)


def _bytes(folder: Path, subset: str, tokens: int) -> Optional[int]:
    path = folder.parent / "counts.json"
    if not path.is_file():
        return None
    try:
        counted = json.loads(path.read_text(encoding="utf-8"))["corpora"][folder.name][subset]
        return counted["bytes"] if counted["tokens"] == tokens else None
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not what `fairseq-moe prepare` writes ({type(error).__name__}); prepare the "
            "data again, or move the file away"
        ) from None


def windows(length: int, context: int, stride: int) -> List[Tuple[int, int, int]]:
    """(begin, end, first new) of each pass over `length` tokens: [begin, end) is at most `context`
    tokens, and the tokens from `first new` on are scored. stride = context: blocks."""
    found, done = [], 0
    while done < length:
        end = min(length, context if not done else done + stride)
        found.append((max(0, end - context) if stride < context else done, end, done))
        done = end
    return found


def score(
    model: torch.nn.Module, text: Text, eos: int, context: int, stride: int, batch_size: int
) -> Scores:
    """Negative log-likelihood of every token of a set, and how many choices of experts were dropped
    for capacity. Only windows of one length share a batch, so nothing is padding."""
    device = next(model.parameters()).device
    inputs = torch.cat([torch.tensor([eos]), text.tokens])  # token i is predicted from inputs[i]
    nll = np.empty(len(text.tokens))
    dropped: List[Tensor] = []  # of each layer and batch, (K,) times its tokens
    positions = 0
    started = time.monotonic()
    spans = windows(len(text.tokens), context, stride)
    while spans:
        size = spans[0][1] - spans[0][0]
        batch = [span for span in spans[:batch_size] if span[1] - span[0] == size]
        spans = spans[len(batch) :]
        rows = torch.stack([inputs[a:b] for a, b, _ in batch]).to(device)  # (B, L)
        targets = torch.stack([text.tokens[a:b] for a, b, _ in batch]).to(device)
        with torch.no_grad():
            x, extra = model.decoder(rows, features_only=True)  # (B, L, D)
            losses = _losses(model, x, targets).cpu().numpy()
        for (a, b, new), row in zip(batch, losses):
            nll[new:b] = row[new - a :]
        positions += rows.numel()
        for record in extra.get("moe") or []:
            choices = len(record.expert_counts)
            names = [f"overflow_expert{i + 1}" for i in range(choices)]
            shares = [record.stats[k] for k in (names if choices <= 2 else ["overflow"])]
            dropped.append(torch.stack(shares).cpu() * rows.numel() / 100)
    seconds = time.monotonic() - started
    if not dropped:
        return Scores(nll, None, seconds)
    layers = len(extra["moe"])
    lost = torch.stack(dropped).sum(0) / (positions * layers)
    return Scores(nll, tuple(lost.tolist()), seconds)


def _losses(model: torch.nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """(B, L, D) and (B, L) -> (B, L) nats in float32, logits a chunk at a time."""
    flat, goal = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    types = model.decoder.embed_tokens.num_embeddings
    chunk = max(1, _LOGITS // types)
    parts = [
        F.cross_entropy(model.decoder.output_layer(a).float(), b, reduction="none")
        for a, b in zip(flat.split(chunk), goal.split(chunk))
    ]
    return torch.cat(parts).view_as(targets)


def bootstrap(nll: np.ndarray, units: np.ndarray, draws: int, seed: int = 1) -> np.ndarray:
    """(draws,) perplexities of as many units as there are, drawn with replacement."""
    rng = np.random.default_rng(seed)
    sums = np.add.reduceat(nll, units)  # (U,)
    sizes = np.diff(np.append(units, len(nll)))
    found = np.empty(draws)
    for i in range(draws):
        drawn = np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units))
        found[i] = _perplexity((drawn @ sums) / (drawn @ sizes))
    return found


def evaluate(
    model: torch.nn.Module,
    texts: Sequence[Text],
    eos: int,
    context: int,
    stride: int,
    batch_size: int,
    draws: int,
) -> Dict[str, Any]:
    """{"sets": {name: figures}, "mean": {"in_domain", "out_of_domain", "all": figures}}; means are
    plain means over sets, as the paper's."""
    sets: Dict[str, Dict[str, Any]] = {}
    drawn: Dict[str, np.ndarray] = {}
    for i, text in enumerate(texts):
        print(f"{i + 1}/{len(texts)} {text.name}", file=sys.stderr, flush=True)
        scores = score(model, text, eos, context, stride, batch_size)
        if not np.isfinite(scores.nll).all():
            raise UserError(
                f"{text.name}: the model gives a token a probability that is no number: {DAMAGED}"
            )
        total, count = float(scores.nll.sum()), len(scores.nll)
        drawn[text.name] = bootstrap(scores.nll, text.units, draws, seed=i + 1)
        sets[text.name] = {
            "in_domain": text.trained,
            "tokens": count,
            "perplexity": _perplexity(total / count),
            "interval": _interval(drawn[text.name]) if len(text.units) > 1 else None,
            "units": len(text.units),
            "bits_per_byte": total / math.log(2) / text.bytes if text.bytes else None,
            "dropped": scores.dropped,
            "tokens_per_second": count / max(scores.seconds, 1e-9),
        }
    means = {}
    for label, wanted in (("in_domain", (True,)), ("out_of_domain", (False,)), ("all", (1, 0))):
        names = [name for name, found in sets.items() if found["in_domain"] in wanted]
        if names:
            known = all(sets[name]["interval"] for name in names)
            means[label] = {
                "perplexity": float(np.mean([sets[name]["perplexity"] for name in names])),
                "interval": _interval(np.mean([drawn[name] for name in names], axis=0))
                if known
                else None,
            }
    return {"sets": sets, "mean": means}


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # of a training that went wrong
        return math.inf


def _interval(draws: np.ndarray) -> List[float]:
    return [float(x) for x in np.percentile(draws, [2.5, 97.5])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Perplexity of a model on every test set of the given folders."
    parser.add_argument("data", type=Path, nargs="+", help="data-bins, or folders of data-bins")
    parser.add_argument("--path", type=Path, required=True, help="checkpoint, as fairseq-eval-lm's")
    parser.add_argument("--subset", default="test", help="split to read (default: test)")
    parser.add_argument("--context", type=int, help="tokens a block (default: as trained)")
    parser.add_argument(
        "--stride",
        type=int,
        help="sliding window: new tokens a pass; default: as the context, each block on its own",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="blocks a pass (default: 16)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws (default: 1000)")
    parser.add_argument(
        "--capacity",
        type=float,
        help="share of a batch that an expert takes (default: 1.0, nothing is dropped)",
    )
    parser.add_argument(
        "--sweep-capacity",
        metavar="F,F,...",
        help="evaluate with each of these capacities, and draw perplexity and speed",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="page to draw --sweep-capacity on (default: capacity.html)",
    )
    parser.add_argument("--cpu", action="store_true", help="no GPU, though there is one")
    parser.add_argument(
        "--model-overrides", metavar="DICT", help="settings of the model, as fairseq-eval-lm's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of --json and --figure"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(args: argparse.Namespace) -> None:
    """Evaluate and print. Raises UserError for flags or files that cannot be."""
    from fairseq import checkpoint_utils

    if args.sweep_capacity is None:
        share = 1.0 if args.capacity is None else args.capacity
        capacities = capacity.parse("--capacity", [str(share)])
    elif args.capacity is not None:
        raise UserError("--capacity and --sweep-capacity: give one of them")
    else:
        capacities = capacity.parse("--sweep-capacity", args.sweep_capacity.split(","))
    for name in ("context", "stride", "batch_size", "bootstrap"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    if args.figure is not None and args.sweep_capacity is None:
        raise UserError(f"--figure {args.figure}: only --sweep-capacity draws; give it too")
    figure = (args.figure or Path("capacity.html")) if args.sweep_capacity else None
    outputs.check(
        [("--json", args.json), ("--figure", figure)], args.overwrite, [args.path, *args.data]
    )
    overrides = parse_overrides(args.model_overrides)
    check_path(args.path)
    first = next(iter(data_bin.find_corpora(args.data[0]).values()), None)
    if first is None:
        raise UserError(f"{args.data[0]}: no data-bin in it; make some with `fairseq-moe prepare`")
    for data in args.data:
        corpora = data_bin.find_corpora(data)
        data_bin.check_dictionaries(first, corpora)
    task = language_modeling_task(first, args.context or 1)
    models, cfg = checkpoint_utils.load_model_ensemble(
        [str(args.path)], arg_overrides=overrides, task=task
    )
    model = models[0].eval()
    if torch.cuda.is_available() and not args.cpu:
        model = model.cuda()
    context = args.context or model.max_positions()
    if context > model.max_positions():
        raise UserError(f"--context {context}: the model takes {model.max_positions()} at most")
    stride = args.stride or context
    if stride > context:
        raise UserError(f"--stride {stride} is above --context {context}: tokens would be left out")
    dictionary = task.source_dictionary
    eos = dictionary.eos()
    texts = read_texts(
        args.data, args.subset, context, dictionary, corpora_of(cfg.task, task, args.data)
    )
    results = []
    for fraction in capacities:
        capacity.set_capacity(model, fraction)
        found = evaluate(model, texts, eos, context, stride, args.batch_size, args.bootstrap)
        results.append({"capacity": fraction, **found})
    head = {
        "path": str(args.path),
        "subset": args.subset,
        "protocol": "blocks" if stride == context else "sliding",
        "context": context,
        "stride": stride,
        "batch_size": args.batch_size,
    }
    whole = {**head, "sweep": results} if args.sweep_capacity else {**head, **results[0]}
    if args.json is not None:
        write_json(args.json, whole)
    form = markdown if args.markdown else plain
    print(form(capacity.table(results) if args.sweep_capacity else _table(results[0])))
    if args.sweep_capacity:
        capacity.write_page(figure, args.path, results)
        print(f"drawn in {figure}")


def _table(found: Dict[str, Any]) -> List[List[str]]:
    rows = [["set", "tokens", "perplexity", "95 % interval", "bits a byte", "dropped %"]]
    for name, one in found["sets"].items():
        rows.append(
            [
                name + ("" if one["in_domain"] else " (held out)"),
                f"{one['tokens']:,}",
                f"{one['perplexity']:.2f}",
                _ends(one["interval"]),
                f"{one['bits_per_byte']:.3f}" if one["bits_per_byte"] else "",
                _percent(one["dropped"]),
            ]
        )
    for label, one in found["mean"].items():
        label = "mean, " + label.replace("_", " ")
        rows.append([label, "", f"{one['perplexity']:.2f}", _ends(one["interval"]), "", ""])
    return rows


def _ends(interval: Optional[Sequence[float]]) -> str:
    return "one unit, none" if interval is None else "{:.2f} to {:.2f}".format(*interval)


def _percent(dropped: Optional[Sequence[float]]) -> str:
    return "" if dropped is None else small(100 * sum(dropped) / len(dropped))
