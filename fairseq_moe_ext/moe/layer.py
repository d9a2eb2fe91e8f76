"""The Mixture-of-Experts layer: route, dispatch, exchange, compute, exchange back, combine."""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Sequence, cast

import torch
from torch import Tensor, nn

from ..kernels.dtypes import autocast_dtype
from ..kernels.matmul import FEW_ROWS, Linear
from . import routers  # noqa: F401 - registers them
from .balance import Balance, z_loss
from .dispatch import lay_out, permute, unpermute
from .exchange import HERE, Exchange
from .experts import Experts, FeedForward
from .router import ROUTERS, GateSettings, TopKRouter
from .routing import Routing
from .scope import PROCESS, RoutingScope
from .stats import routing_stats


class MoEOutput(NamedTuple):
    """The output of a layer. Losses are outputs, not attributes: activation checkpointing runs
    `forward` twice, and a loss kept in an attribute would have no gradient."""

    out: Tensor  # as the input
    balance_loss: Tensor  # (), differentiable
    z_loss: Tensor  # (), differentiable
    stats: Dict[str, Tensor]  # see stats.py
    expert_counts: Tensor  # (K, E) int64: choices of each expert, null ones too, before dropping
    router_loss: Optional[Tensor]  # (), differentiable: a loss of the router's own, weighted
    observed: Dict[str, Tensor]  # sums over tokens, in training, for TopKRouter.after_update


class Latent(nn.Module):
    """Projections to the narrower vectors that experts compute on, and back; without biases, so
    that a token which no expert takes gets zeros."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.down = Linear(dim, latent_dim, bias=False)
        self.up = Linear(latent_dim, dim, bias=False)


class MoELayer(nn.Module):
    """A feed-forward layer in which each token uses only the experts that the router chooses."""

    def __init__(
        self,
        router: TopKRouter,
        experts: nn.Module,
        exchange: Exchange = HERE,
        shared: Optional[nn.Module] = None,
        latent: Optional[Latent] = None,
        balance: Optional[Balance] = None,
    ) -> None:
        """
        Args:
            router: (T, D) -> logits (T, E), Routing; its `scope` are the processes whose tokens are
                routed together.
            experts: rows (N, D) in expert order and the rows of each -> (N, D).
            exchange: between the processes that share the experts.
            shared: (T, D) -> (T, D), an expert that every token uses beside the chosen ones.
            latent: projections to the vectors that experts compute on, and back.
            balance: what the balancing loss is taken over; None: the tokens in the router's scope.
        """
        super().__init__()
        self.gate = router
        self.experts = experts
        self.exchange = exchange
        self.shared = shared
        self.latent = latent
        self.balance = balance or Balance(scope=router.scope)

    @classmethod
    def build(
        cls,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        settings: GateSettings,
        *,
        router: str = "topk",
        exchange: Exchange = HERE,
        scope: RoutingScope = PROCESS,
        shared_ffn_dim: int = 0,
        latent_dim: int = 0,
        token_counts: Sequence[int] = (),
        balance: Optional[Balance] = None,
        grad_scale: float = 1.0,
        in_files: bool = False,
        **options: Any,
    ) -> MoELayer:
        """A layer with a registered router and `Experts`.

        Args:
            shared_ffn_dim: hidden width of all shared experts together; 0: there are none.
            latent_dim: width of what experts compute on; 0: dim.
            token_counts: for the router (`set_token_counts`).
            balance: as that of the layer.
            grad_scale, in_files: of `Experts`.
            options: of `Experts` and of the shared ones: activation, dropout.
        """
        gate = ROUTERS[router](dim, num_experts, settings, scope)
        gate.set_token_counts(token_counts)
        held = exchange.held(num_experts)
        experts = Experts(
            len(held),
            latent_dim or dim,
            ffn_dim,
            first=held.start,
            grad_scale=grad_scale,
            in_files=in_files,
            **options,
        )
        shared = FeedForward(dim, shared_ffn_dim, **options) if shared_ffn_dim else None
        latent = Latent(dim, latent_dim) if latent_dim else None
        return cls(gate, experts, exchange, shared, latent, balance)

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        dropless: bool = False,
        token_ids: Optional[Tensor] = None,
        length: Optional[int] = None,
        output_alone: bool = False,
    ) -> MoEOutput:
        """
        Args:
            x: (..., D).
            padding_mask: (...) bool, True where x is padding, which is not routed.
            dropless: ignore the capacity in this call.
            token_ids: (...) int64, the input tokens, for routers that go by them.
            length: tokens of a sequence, where x is whole sequences one after the other.
            output_alone: leave losses at zero and metrics out; for generation, of whose time they
                would take half.
        """
        tokens = x.reshape(-1, x.size(-1))  # (T, D)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        if token_ids is not None:
            token_ids = token_ids.reshape(-1)
        logits, routing = self.gate(tokens, padding_mask, dropless, token_ids)
        out = self._through_experts(tokens, routing)
        if self.shared is not None:
            out = out + self.shared(tokens)
        if output_alone:
            zero = out.new_zeros(())
            return MoEOutput(out.view_as(x), zero, zero, {}, routing.counts, None, {})
        scope = self.gate.scope
        if self.gate.frozen or not self.gate.learned:
            # else its losses would train the layers before it to suit a fixed gate
            logits, routing = logits.detach(), routing._replace(probs=routing.probs.detach())
        learns = self.gate.has_state and self.training and torch.is_grad_enabled()
        return MoEOutput(
            out.view_as(x),
            self.balance.loss(routing, length),
            z_loss(logits, routing.counted, scope),
            routing_stats(routing, scope),
            routing.counts,
            self.gate.loss(logits, routing, padding_mask),
            self.gate.observe(logits, routing, padding_mask) if learns else {},
        )

    def _through_experts(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The sum of the outputs of each token's experts, by weight: (T, D) -> (T, D)."""
        y = tokens if self.latent is None else self.latent.down(tokens)  # (T, D), or (T, L)
        if self._has_few(tokens):
            out = cast(Experts, self.experts).choice_by_choice(y, routing)
        else:
            chunked = None
            # What other processes send arrives in expert order.
            if self.exchange is HERE and isinstance(self.experts, Experts):
                chunked = self.experts.chunked(y)
            rows = lay_out(routing, chunked)
            y = permute(y, rows)  # (N, D)
            counts = rows.counts[: len(rows.counts) - routing.null_experts]
            if rows.chunks is not None:
                y = self.experts(y, counts, rows.chunks)
            else:
                y, arrival = self.exchange.send(y, counts)  # (N', D)
                y = self.exchange.compute(self.experts, y, arrival.counts)  # (N', D)
                y = self.exchange.send_back(y, arrival)  # (N, D)
            out = unpermute(y, routing.weights.to(y.dtype), rows)  # (T, D)
        return out if self.latent is None else self.latent.up(out)

    def _has_few(self, tokens: Tensor) -> bool:
        """Whether these (T, D) are best computed choice by choice."""
        return (
            0 < len(tokens) <= FEW_ROWS
            and not self.training
            and not torch.is_grad_enabled()
            and self.exchange is HERE
            and isinstance(self.experts, Experts)
            and self.experts.is_plain
            and autocast_dtype(tokens) is None
        )
