"""Evaluation through the function behind `fairseq-eval-lm`, on a sparse model.

    python benchmarks/evaluate.py

Ours with capacity (a quarter of the batch, the branch's default) and with nothing dropped, against
a plain loop over experts that asks each token by `.item()` whether it is this expert's. Random
weights: the work does not depend on them, but how even the gate is does.
"""

from __future__ import annotations

import logging
from typing import Dict, List

import torch
from fairseq.data import Dictionary
from fairseq_cli.eval_lm import eval_lm
from measure import in_turn, keep, keep_table, median, ratio

import fairseq_moe_ext  # noqa: F401 - registers the model
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.models.decoder import MoETransformerDecoder
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.moe.layer import MoELayer, MoEOutput

TYPES, SENTENCES, CONTEXT, BATCHES = 8000, 4, 512, 1
SHAPE = dict(
    decoder_layers=4,
    decoder_embed_dim=512,
    decoder_ffn_embed_dim=2048,
    decoder_attention_heads=8,
    share_decoder_input_output_embed=True,
    moe_freq=2,
    tokens_per_sample=CONTEXT,
    max_target_positions=None,
    distributed_world_size=1,
)


def loop_over_experts(self: MoELayer, x, padding_mask=None, dropless: bool = False) -> MoEOutput:
    """MoELayer.forward without dispatch: each expert looks for its tokens, one by one."""
    tokens = x.reshape(-1, x.size(-1))  # (T, D)
    _, routing = self.gate(tokens, self.gate.capacity(len(tokens)))
    out = torch.zeros_like(tokens)
    fc1, fc2 = self.experts.fc1, self.experts.fc2
    for expert in range(len(fc1.bias)):
        for choice in range(routing.experts.size(1)):
            chosen = [
                t
                for t in range(len(tokens))
                if routing.experts[t, choice].item() == expert and routing.kept[t, choice].item()
            ]
            if chosen:
                y = tokens[chosen] @ fc1.weight[expert].t() + fc1.bias[expert]
                y = self.experts.activation(y) @ fc2.weight[expert].t() + fc2.bias[expert]
                out[chosen] += routing.weights[chosen, choice].unsqueeze(1) * y
    zero = tokens.new_zeros(())
    return MoEOutput(out.view_as(x), zero, zero, {}, routing.counts)


def main() -> None:
    logging.disable(logging.INFO)
    dictionary = Dictionary()
    for i in range(TYPES - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    torch.manual_seed(0)
    batches: List[Dict] = []
    for _ in range(BATCHES):
        words = torch.randint(4, TYPES, (SENTENCES, CONTEXT + 1))
        inputs = {"src_tokens": words[:, :-1], "src_lengths": torch.full((SENTENCES,), CONTEXT)}
        batches.append(
            {
                "id": torch.arange(SENTENCES),
                "net_input": inputs,
                "target": words[:, 1:],
                "ntokens": words[:, 1:].numel(),
            }
        )
    rows = {}
    for experts in (8, 64):
        cfg = MoETransformerLMConfig(moe_expert_count=experts, **SHAPE)
        model = MoETransformerLanguageModel(MoETransformerDecoder(cfg, dictionary)).eval()
        gates = [layer.moe_layer.gate for layer in model.decoder.layers if layer.moe_layer]
        forward, found = MoELayer.forward, {}

        def evaluate(name: str, fraction: float, layer=forward, model=model, gates=gates, to=found):
            for gate in gates:
                gate.settings = gate.settings._replace(eval_token_fraction=fraction)
            MoELayer.forward = layer
            to[name] = float(eval_lm([model], dictionary, batches)["loss"])

        cases = {
            "capacity": lambda run=evaluate: run("capacity", 0.25),
            "dropless": lambda run=evaluate: run("dropless", 1.0),
            "loop": lambda run=evaluate: run("loop", 0.25, loop_over_experts),
        }
        with torch.no_grad():
            seconds = in_turn(cases, rounds=5, warmup=1)
        MoELayer.forward = forward
        assert abs(found["loop"] - found["capacity"]) < 1e-4, found
        for name in cases:
            rows[f"{experts} experts, {name}"] = {
                "seconds": round(median(seconds[name]), 4),
                "of_the_loop": round(ratio(seconds, name, "loop"), 4),
                "of_capacity": round(ratio(seconds, name, "capacity"), 4),
            }
    rows = keep("evaluate", rows)
    keep_table(
        "evaluate",
        f"Evaluating {BATCHES * SENTENCES * CONTEXT} tokens, 4 layers of width 512, {TYPES} types",
        ["case", "seconds", "of the loop", "of capacity"],
        [[name] + [f"{value:.3f}" for value in row.values()] for name, row in rows.items()],
    )


if __name__ == "__main__":
    main()
