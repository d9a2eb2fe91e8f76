"""Evaluation by the function behind `fairseq-eval-lm`.

    python benchmarks/evaluate.py [--experts 8 64 512]
    python benchmarks/evaluate.py --peers [--shapes wide 256 96] [--one-thread]

An MoE model with a capacity (a quarter of the batch, the branch's default) and with nothing
dropped; one thread, seconds of the processor. With --peers against the forward pass and loss of
plain PyTorch, of Hugging Face's GPT-2 and OLMoE; two threads, by the clock. Random weights: the
work does not depend on them but by how even the gate is.
"""

from __future__ import annotations

import argparse
import functools
import logging
from typing import Any, Callable, Dict, Sequence

import fairseq_cli.eval_lm  # before our package, which then finds it to mend, as in the command
import peer_models
import peers
import torch
from measure import (
    attempted,
    clock,
    count,
    in_turn,
    keep,
    keep_table,
    language_model,
    matrix_rate,
    median,
    ratio,
)
from torch import Tensor

VOCABULARY, SENTENCES, CONTEXT = 8000, 4, 512
SHAPE = dict(
    decoder_layers=4,
    decoder_embed_dim=256,
    decoder_ffn_embed_dim=1024,
    decoder_attention_heads=4,
    share_decoder_input_output_embed=True,
    moe_freq=2,
    tokens_per_sample=CONTEXT,
)


def batch_of(words: Tensor) -> Dict[str, Any]:
    """As fairseq's datasets make it; words (B, T + 1)."""
    sentences, length = len(words), words.size(1) - 1
    return {
        "id": torch.arange(sentences),
        "net_input": {"src_tokens": words[:, :-1], "src_lengths": torch.full((sentences,), length)},
        "target": words[:, 1:],
        "ntokens": sentences * length,
    }


def measured(experts: int, rounds: int):
    """Seconds of each case in each round."""
    torch.manual_seed(0)
    model = language_model(VOCABULARY, moe_expert_count=experts, **SHAPE).eval()
    batch = batch_of(torch.randint(4, VOCABULARY, (SENTENCES, CONTEXT + 1)))
    gates = [layer.moe_layer.gate for layer in model.decoder.layers if layer.moe_layer]

    def evaluate(fraction: float) -> None:
        for gate in gates:
            gate.settings = gate.settings._replace(eval_token_fraction=fraction)
        fairseq_cli.eval_lm.eval_lm([model], model.decoder.dictionary, [batch])

    cases = {"capacity": lambda: evaluate(0.25), "dropless": lambda: evaluate(1.0)}
    with torch.no_grad():
        return in_turn(cases, rounds, warmup=1, clock=clock())


def of_peer(loss: torch.nn.Module, words: Tensor) -> Callable[[], float]:
    tokens, target = words[:, :-1].contiguous(), words[:, 1:].contiguous()

    def evaluate() -> float:
        with torch.no_grad():
            return float(loss(tokens, target))

    return evaluate


def of_ours(loss: torch.nn.Module, words: Tensor) -> Callable[[], float]:
    model, batch = loss.model, batch_of(words)

    def evaluate() -> float:
        return fairseq_cli.eval_lm.eval_lm([model], model.decoder.dictionary, [batch])["loss"]

    return evaluate


PEERS = {
    "plain PyTorch": (of_peer, peer_models.plain),
    "ours": (of_ours, peer_models.ours),
    "Hugging Face GPT-2": (of_peer, peer_models.hugging_face),
    "ours, 8 experts": (of_ours, lambda shape: peer_models.ours(shape, 8)),
    "OLMoE, 8 experts": (of_peer, lambda shape: peer_models.hugging_face(shape, 8)),
}


def against_peers(shapes: Sequence[str], rounds: int) -> None:
    threads = torch.get_num_threads()
    file = "evaluate_peers" + ("_one_thread" if threads == 1 else "")
    for name in shapes:
        shape = peers.SHAPES[name]
        torch.manual_seed(0)
        words = torch.randint(4, shape.vocabulary, (shape.rows, shape.context + 1))
        cases = {}
        for label, (way, build) in PEERS.items():
            model = attempted(label, functools.partial(build, shape), peers.optional(label))
            if model is not None:
                cases[label] = way(model.eval(), words)
        theirs = list(filter(peers.optional, cases))
        seconds = in_turn(cases, rounds, warmup=1, clock=clock(), optional=theirs)
        floor = shape.flops / 3 / matrix_rate(9, torch.float32, threads)
        rows = keep(file, {f"{name}: {label}": {
            "tokens_per_second": round(shape.rows * shape.context / median(seconds[label])),
            "speed": round(1 / ratio(seconds, label, "plain PyTorch"), 3),
            "of_the_floor": round(floor / median(seconds[label]), 3),
        } for label in seconds})  # fmt: skip
    keep_table(
        file,
        "Evaluation against the forward pass and loss of other projects' models (the shapes of "
        "peers.py), float32. Ours by the function behind fairseq-eval-lm. Speed: against plain "
        "PyTorch. Of the floor: the FLOPs at the rate of a product of matrices, over the time; "
        "of all cases the dense model's.",
        ["case", "tokens/s", "speed", "of the floor"],
        [
            [key, f"{row['tokens_per_second']:,}", f"{row['speed']:.2f}"]
            + [f"{row['of_the_floor']:.2f}"]
            for key, row in rows.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=count, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--peers", action="store_true", help="against other projects' models")
    parser.add_argument("--one-thread", action="store_true", help="--peers by the processor's time")
    parser.add_argument("--shapes", nargs="+", choices=peers.SHAPES, default=list(peers.SHAPES))
    args = parser.parse_args()
    logging.disable(logging.INFO)
    if args.peers:
        torch.set_num_threads(1 if args.one_thread else 2)
        against_peers(args.shapes, args.rounds)
        return
    torch.set_num_threads(1)
    for experts in args.experts:
        seconds = measured(experts, args.rounds)
        rows = keep("evaluate", {f"{experts} experts": {
            **{f"{name}_seconds": round(median(s), 4) for name, s in seconds.items()},
            "dropless_to_capacity": round(ratio(seconds, "dropless", "capacity"), 3),
        }})  # fmt: skip
    names = list(next(iter(rows.values())))
    keep_table(
        "evaluate",
        f"Evaluating {SENTENCES * CONTEXT} tokens by the function behind fairseq-eval-lm: 4 layers "
        f"of width 256, hidden 1024, every second sparse (top-2), a vocabulary of {VOCABULARY}, "
        "float32; one thread, seconds of the processor. Capacity: a quarter of the batch.",
        ["model", *(name.replace("_", " ") for name in names)],
        [[key] + [f"{row[name]:g}" for name in names] for key, row in rows.items()],
    )


if __name__ == "__main__":
    main()
