"""A language model in plain PyTorch, as one writes it in an afternoon: what peers.py compares with.

Pre-norm decoder, learned positions, tied embeddings, scaled_dot_product_attention, cross_entropy;
dense, or with experts in every other layer.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """Top-2 Mixture of Experts without a capacity limit."""

    def __init__(self, count: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, count, bias=False)
        self.networks = nn.ModuleList(feed_forward(dim, hidden) for _ in range(count))
        self.balance: Optional[Tensor] = None  # (), of the last forward pass

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D)"""
        count = len(self.networks)
        probs = self.router(x).softmax(dim=1)  # (N, E)
        weights, chosen = probs.topk(2, dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True)
        order = chosen.flatten().argsort()  # (2 N,), by expert
        token = order // 2
        numbers = chosen.flatten().bincount(minlength=count).tolist()
        rows = x.index_select(0, token).split(numbers)
        y = torch.cat([network(its) for network, its in zip(self.networks, rows)])  # (2 N, D)
        share = chosen[:, 0].bincount(minlength=count) / len(x)
        self.balance = count * (probs.mean(dim=0) * share).sum()
        y = y * weights.flatten().index_select(0, order).unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, token, y)


def feed_forward(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), or that of experts of half the hidden
    width."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, experts: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = Experts(experts, dim, hidden // 2) if experts else feed_forward(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)"""
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)))
        return x + self.dropout(self.ffn(self.norm2(x).flatten(0, 1)).view_as(x))


class PlainGPT(nn.Module):
    """Tokens and their targets -> cross-entropy, summed, plus 0.01 x tokens x balancing losses."""

    def __init__(
        self,
        vocabulary: int,
        layers: int,
        dim: int,
        heads: int,
        hidden: int,
        context: int,
        dropout: float,
        experts: int = 0,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(context, dim)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        nn.init.normal_(self.positions.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden, dropout, i % 2 * experts) for i in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """tokens, target (B, T) int64 -> ()"""
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        for block in self.blocks:
            if isinstance(block.ffn, Experts):
                loss = loss + 0.01 * tokens.numel() * block.ffn.balance
        return loss
