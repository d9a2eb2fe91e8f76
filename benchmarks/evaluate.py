"""Evaluation by the function behind `fairseq-eval-lm`: an MoE model as it is, with a capacity (a
quarter of the batch, the branch's default) and with nothing dropped, and one whose layers are a
plain loop over experts that asks each token by `.item()` whether it is this expert's.

    python benchmarks/evaluate.py [--experts 8 64 512]

One thread, seconds of the processor. Random weights: the work does not depend on them but by how
even the gate is.
"""

from __future__ import annotations

import argparse
import logging
import time
from unittest import mock

import fairseq_cli.eval_lm  # before our package, which then finds it to mend, as in the command
import torch
from measure import in_turn, keep, keep_table, language_model, median, ratio
from torch import Tensor

from fairseq_moe_ext.moe.layer import MoELayer, MoEOutput

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


def loop_over_experts(self: MoELayer, x: Tensor, **_) -> MoEOutput:
    """MoELayer.forward, as it is often written."""
    tokens = x.reshape(-1, x.size(-1))  # (T, D)
    _, routing = self.gate(tokens)
    out = torch.zeros_like(tokens)
    fc1, fc2 = self.experts.fc1, self.experts.fc2
    for expert in range(len(fc1.bias)):
        for choice in range(routing.experts.size(1)):
            column, kept = routing.experts[:, choice], routing.kept[:, choice]
            mine = [t for t in range(len(tokens)) if column[t].item() == expert and kept[t].item()]
            if mine:
                y = tokens[mine] @ fc1.weight[expert].t() + fc1.bias[expert]
                y = self.experts.activation(y) @ fc2.weight[expert].t() + fc2.bias[expert]
                out[mine] += routing.weights[mine, choice].unsqueeze(1) * y
    zero = tokens.new_zeros(())
    return MoEOutput(out.view_as(x), zero, zero, {}, routing.counts, None, {})


def measured(experts: int, rounds: int):
    """Seconds of each case in each round."""
    torch.manual_seed(0)
    model = language_model(VOCABULARY, moe_expert_count=experts, **SHAPE).eval()
    words = torch.randint(4, VOCABULARY, (SENTENCES, CONTEXT + 1))
    batch = {
        "id": torch.arange(SENTENCES),
        "net_input": {
            "src_tokens": words[:, :-1],
            "src_lengths": torch.full((SENTENCES,), CONTEXT),
        },
        "target": words[:, 1:],
        "ntokens": words[:, 1:].numel(),
    }
    gates = [layer.moe_layer.gate for layer in model.decoder.layers if layer.moe_layer]
    losses = {}

    def evaluate(name: str, fraction: float) -> None:
        for gate in gates:
            gate.settings = gate.settings._replace(eval_token_fraction=fraction)
        dictionary = model.decoder.dictionary
        losses[name] = fairseq_cli.eval_lm.eval_lm([model], dictionary, [batch])["loss"]

    def evaluate_loop() -> None:
        with mock.patch.object(MoELayer, "forward", loop_over_experts):
            evaluate("loop", 0.25)

    cases = {
        "capacity": lambda: evaluate("capacity", 0.25),
        "dropless": lambda: evaluate("dropless", 1.0),
        "loop": evaluate_loop,
    }
    with torch.no_grad():
        seconds = in_turn(cases, rounds, warmup=1, clock=time.process_time)
    assert abs(losses["loop"] - losses["capacity"]) < 1e-4, losses
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    for experts in args.experts:
        seconds = measured(experts, args.rounds)
        rows = keep("evaluate", {f"{experts} experts": {
            **{f"{name}_seconds": round(median(s), 4) for name, s in seconds.items()},
            "loop_to_capacity": round(ratio(seconds, "loop", "capacity"), 2),
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
