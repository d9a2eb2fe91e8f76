"""The truth of the whole decoder where batches are padded: plain loops over rows and positions.

Shared with the package are the weights, the layer norm, the activation (fairseq's GELU rounds to
float32) and the embedding of positions. The MoE layers are those of reference.py."""

import reference
import torch


def run(model, tokens, *, capacity, hide_padding, masked=False, count_padding=True, full_rows=0):
    """Logits (B, T, V), and the outputs of the MoE layers (reference.Output).

    Args:
        model: with experts, in evaluation mode or without dropout.
        capacity: function of the number of tokens that count -> slots an expert has.
        hide_padding: no position looks at padding (the branch).
        masked: padding goes to no expert.
        full_rows: the gates see so many rows at least, of zeros that go to no expert.
    """
    decoder = model.decoder
    padding = tokens.eq(decoder.padding_idx)
    positions = torch.where(padding, decoder.padding_idx, 0)
    for row, pads in zip(positions, padding):
        row[~pads] = decoder.padding_idx + 1 + torch.arange(int((~pads).sum()))
    x = decoder.embed_scale * decoder.embed_tokens.weight[tokens]
    x = x + decoder._embed_positions(positions, tokens.size(1))
    outputs = []
    for layer in decoder.layers:
        x = x + _attention(layer.self_attn, layer.self_attn_layer_norm(x), padding, hide_padding)
        y = layer.final_layer_norm(x)
        if layer.moe_layer is None:
            x = x + layer.fc2(layer.activation(layer.fc1(y)))
            continue
        rows = torch.cat([y, y.new_zeros(max(0, full_rows - len(y)), *y.shape[1:])]).flatten(0, 1)
        mask = [bool(pad) and masked for pad in padding.flatten()]
        mask += [True] * (len(rows) - len(mask))
        counted = len(rows) if count_padding else mask.count(False)
        experts = layer.moe_layer.experts
        outputs.append(
            reference.moe_layer(
                rows,
                layer.moe_layer.gate.wg.weight,
                *(experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias),
                layer.activation,
                top_k=layer.moe_layer.gate.settings.top_k,
                capacity=capacity(counted),
                padding_mask=mask,
                count_padding=count_padding,
            )
        )
        x = x + outputs[-1].out[: tokens.numel()].view_as(x)
    return decoder.layer_norm(x) @ decoder.output_projection.weight.T, outputs


def _attention(attention, x, padding, hide_padding):
    """x (B, T, D) -> (B, T, D), position by position."""
    heads, dim = attention.heads, x.size(-1) // attention.heads
    q, k, v = (
        projection(x).unflatten(-1, (heads, dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for here in range(x.size(1)):
            seen = [j for j in range(here + 1) if not (hide_padding and padding[row, j])]
            for head in range(heads):
                scores = k[row, seen, head] @ q[row, here, head] / dim**0.5
                part = reference.softmax(scores) @ v[row, seen, head]
                out[row, here, head * dim : (head + 1) * dim] = part
    return attention.out_proj(out)
