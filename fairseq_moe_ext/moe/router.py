"""Routers: from tokens to a routing. To add one, register a subclass under a name::

    @register_router("mine")
    class MyRouter(TopKRouter):
        def logits(self, x): ...      # (T, D) -> (T, E), and, or
        def route(self, logits, ...): ...

`--moe-router mine` selects it. examples/add_a_router is a complete plugin of this kind.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, FrozenSet, NamedTuple, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dtypes import at_least_float32, without_autocast
from ..kernels.matmul import linear
from .routing import Routing, check_groups, check_routing, counted_tokens, route, token_capacity
from .scope import PROCESS, RoutingScope


class GateSettings(NamedTuple):
    """How a router routes. The flags are in config.py, router_flags.py and balance_flags.py;
    router_flags.gate_settings translates them."""

    top_k: int = 2  # experts per token
    use_fp32: bool = False  # scores and weights in float32 at least
    second_expert_policy: str = "sampling"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    capacity_factor: Optional[float] = None  # training; None: top_k
    eval_token_fraction: float = 0.25  # evaluation; <= 0: the rule of training
    dropless: bool = False  # no capacity, in training and at evaluation
    count_padding: bool = False  # count unrouted padding in capacity, losses and metrics
    score: str = "softmax"  # or "sigmoid"
    normalize_weights: Optional[str] = None  # None: after dropping, with one expert not at all
    route_scale: float = 1.0  # factor on the weights
    groups: int = 1  # of experts; a token chooses among those of its best top_groups
    top_groups: int = 1
    fp32_product: bool = False  # logits in float32 at least, too
    input_jitter: float = 0.0  # training: factor U(1 - jitter, 1 + jitter) on the router's input
    eom: float = 0.0  # expert output masking: dropout probability of an expert's output for a token
    fom: float = 0.0  # final output masking: the same for the sum over a token's experts
    threshold_decay: float = 0.99  # threshold: of the moving quantile, per update
    balanced_evaluation: bool = False  # base: assign evenly at evaluation, too
    null_experts: int = 0  # beside the others; they share a logit and compute nothing
    bias_update_rate: float = 0.0  # step of the balancing bias in an update; 0: there is no bias

    @property
    def normalize(self) -> Optional[str]:
        """Whether and when a token's weights are divided by their sum: before, after, None."""
        if self.normalize_weights is not None:
            return None if self.normalize_weights == "none" else self.normalize_weights
        if self.top_k == 1:
            return None
        return "before" if self.normalize_before_dropping else "after"

    def check(self, num_experts: int) -> None:
        """Raise ValueError for a setting that would silently do something else."""
        check_routing(
            self.top_k, num_experts, self.score, self.second_expert_policy, self.normalize
        )
        check_groups(self.top_k, num_experts, self.groups, self.top_groups)
        factor, fraction = self.capacity_factor, self.eval_token_fraction
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"capacity_factor {factor}: use a number above 0, or None")
        if not -math.inf < fraction <= 1:
            raise ValueError(
                f"eval_token_fraction {fraction}: use a share of the batch, above 0 up to 1, or a "
                "negative number for the rule of training"
            )


ROUTERS: Dict[str, Type[TopKRouter]] = {}


def register_router(name: str) -> Callable[[Type[TopKRouter]], Type[TopKRouter]]:
    """Register a class as `--moe-router NAME`. Raises ValueError if the name is taken."""

    def register(cls: Type[TopKRouter]) -> Type[TopKRouter]:
        known = ROUTERS.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a router called {name!r} is already registered: {known}")
        ROUTERS[name] = cls  # the same again: its module was imported anew
        return cls

    return register


@register_router("topk")
class TopKRouter(nn.Module):
    """Sends each token to the top_k experts that a linear layer without bias scores best.

    With a balancing bias, an expert's score plus its bias decides the choice; the score alone is
    the weight."""

    # The optional settings that this router uses; others are rejected (router_flags.py).
    heeds: FrozenSet[str] = frozenset(
        "score normalize_before_dropping normalize_weights route_scale groups batch_prioritized"
        " fp32_product input_jitter null_experts balance_bias second_expert_policy".split()
    )
    frozen = False  # whether its state is not updated
    balance_bias: Optional[Tensor]
    default_top_k = 2
    causal = True  # in training, without a capacity; at evaluation a router must be
    capacity_free = False  # the number of a token's experts varies, so that there is no capacity
    learned = True  # whether the gate is trained; losses on another have no gradient

    def __init__(
        self, dim: int, num_experts: int, settings: GateSettings, scope: RoutingScope = PROCESS
    ) -> None:
        """Raises ValueError for settings that do not fit together."""
        super().__init__()
        self._state_names: Tuple[str, ...] = ()
        settings.check(num_experts)
        self.scope = scope
        self.dim = dim
        self.num_experts = num_experts + settings.null_experts
        self.num_logits = num_experts + (settings.null_experts > 0)
        self.settings = settings
        # Wang et al., arXiv 2408.15664
        self.register_buffer("balance_bias", None)
        if settings.bias_update_rate > 0:
            self.register_state("balance_bias", torch.zeros(self.num_experts))
        self.add_gate()

    def add_gate(self) -> None:
        """Make what `logits` needs."""
        self.wg = nn.Linear(self.dim, self.num_logits, bias=False)

    def expert_vectors(self) -> Tensor:
        """What the gate compares tokens with, (E, D) in float32 and without gradient; zeros where
        it compares nothing."""
        return self.of_every_expert(self.wg.weight.detach().float())

    def set_token_counts(self, counts: Sequence[int]) -> None:
        """Called once, before the weights are loaded, with the training data's count of each token
        id."""

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        dropless: bool = False,
        token_ids: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Routing]:
        """
        Args:
            x: (T, D).
            padding_mask: (T,) bool, True where x is padding, which is not routed.
            dropless: ignore the capacity in this call.
            token_ids: (T,) int64, the input tokens, for routers that use them.

        Returns:
            logits (T, E) and their routing.
        """
        s = self.settings
        if hasattr(self, "wg"):  # in float32 where it is, though experts compute in bfloat16
            x = x.to(self.wg.weight.dtype)
        if self.training and s.input_jitter > 0:
            # Drawn in bfloat16, U(0.99, 1.01) would be one of four numbers, none of them above 1.
            factor = torch.empty_like(x, dtype=at_least_float32(x))
            x = (x * factor.uniform_(1 - s.input_jitter, 1 + s.input_jitter)).to(x.dtype)
        logits = self.of_every_expert(self.logits(x), dim=1)
        if s.use_fp32:
            logits = logits.to(at_least_float32(logits))
        capacity = None if dropless else self.capacity(len(x), padding_mask)
        routing = self.route_tokens(logits, capacity, padding_mask, token_ids)
        return logits, self._mask_outputs(routing)

    def of_every_expert(self, x: Tensor, dim: int = 0) -> Tensor:
        """Logits, or rows of the gate, of every expert: the last, of the null experts, repeated."""
        null = self.settings.null_experts
        if null < 2:
            return x
        return torch.cat([x, *[x.narrow(dim, -1, 1)] * (null - 1)], dim)

    def logits(self, x: Tensor) -> Tensor:
        """x (T, D), in the precision of the gate's weights -> (T, E), where all null experts have
        one."""
        if not self.settings.fp32_product:
            return linear(x, self.wg.weight, None)
        dtype = at_least_float32(x)
        with without_autocast(x):
            return linear(x.to(dtype), self.wg.weight, None)

    def route_tokens(
        self,
        logits: Tensor,
        capacity: Optional[int],
        padding_mask: Optional[Tensor],
        token_ids: Optional[Tensor],
    ) -> Routing:
        """Like `route`, for routers that also use the token ids (T,) int64."""
        return self.route(logits, capacity, padding_mask)

    def route(
        self, logits: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor]
    ) -> Routing:
        """logits (T, E) -> which token goes to which expert, in the current mode."""
        s = self.settings
        return route(
            logits,
            s.top_k,
            score=s.score,
            bias=self.balance_bias,
            # Noise is for exploration only; evaluation takes the runner-up without it.
            runner_up=s.second_expert_policy if self.training else "all",
            normalize=s.normalize,
            scale=s.route_scale,
            groups=s.groups,
            top_groups=s.top_groups,
            prioritized=s.batch_prioritized,
            capacity=capacity,
            padding_mask=padding_mask,
            count_padding=s.count_padding,
            null_experts=s.null_experts,
            scope=self.scope,
        )

    def _mask_outputs(self, routing: Routing) -> Routing:
        """Expert and final output masking (NLLB, arXiv 2207.04672, section 6.2): dropout of whole
        rows, those of an expert or their sum, here by their weights."""
        s, weights = self.settings, routing.weights
        if not self.training or s.eom == s.fom == 0:
            return routing
        weights = F.dropout(weights, s.eom)
        return routing._replace(weights=weights * F.dropout(torch.ones_like(weights[:, :1]), s.fom))

    def loss(
        self, logits: Tensor, routing: Routing, padding_mask: Optional[Tensor]
    ) -> Optional[Tensor]:
        """A loss of the router's own, its weight included: a scalar, or None."""
        return None

    def observe(
        self, logits: Tensor, routing: Routing, padding_mask: Optional[Tensor]
    ) -> Dict[str, Tensor]:
        """What `after_update` learns from. Its values are summed over the micro-batches and the
        processes of an update, so each is a sum over this process's tokens, padding left out:
        load (E,) float64, choices of an expert before dropping; tokens (1,) float64."""
        tokens = len(logits) - (0 if padding_mask is None else padding_mask.sum())
        with torch.no_grad():
            load = routing.counts.sum(dim=0).double()
            return {"load": load, "tokens": load.new_zeros(1) + tokens}

    def after_update(self, observed: Dict[str, Tensor]) -> None:
        """Change the state (`register_state`), where there is any: called once per update of the
        optimizer, with the sums of what was observed in its forward passes. Validation and the
        recomputation of activations do not count. Here the balancing bias: that of an expert with
        fewer choices than the mean rises, that of one with more falls."""
        if self.balance_bias is not None:
            load = observed["load"]
            step = self.settings.bias_update_rate * torch.sign(load.mean() - load)
            self.balance_bias += step.to(self.balance_bias)

    def register_state(self, name: str, value: Tensor) -> None:
        """Add a buffer for `after_update` to change. It is in the checkpoint, and keeps its dtype
        where the model is cast: a small step would be lost in float16."""
        self.register_buffer(name, value)
        self._state_names = (*self._state_names, name)

    @property
    def state(self) -> Dict[str, Tensor]:
        """What `after_update` changes, by name."""
        return {name: getattr(self, name) for name in self._state_names}

    @property
    def has_state(self) -> bool:
        """Whether there is any state for `after_update` to change."""
        return bool(self._state_names) and not self.frozen

    def _apply(self, fn: Callable[..., Any], *rest: Any, **named: Any) -> TopKRouter:
        before = self.state
        super()._apply(fn, *rest, **named)
        for name, state in before.items():
            cast, self._buffers[name] = self._buffers[name], state
            setattr(self, name, cast)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP casts buffers by assignment
        # (fairscale/nn/data_parallel/fully_sharded_data_parallel.py:613@0.4.13).
        if name in self.__dict__.get("_state_names", ()) and isinstance(value, Tensor):
            state = self._buffers[name]
            if state is not None and state.dtype != value.dtype:
                value = state.to(value.device)
        super().__setattr__(name, value)

    def capacity(self, tokens: int, padding_mask: Optional[Tensor] = None) -> Optional[int]:
        """Slots per expert for this process's number of tokens, in the current mode; None: no
        limit."""
        s = self.settings
        if s.dropless or self.capacity_free:
            return None
        counted = counted_tokens(padding_mask, s.count_padding)
        tokens = self.scope.tokens(tokens if counted is None else int(counted.sum()))
        if not self.training and s.eval_token_fraction > 0:
            return token_capacity(tokens, self.num_experts, fraction=s.eval_token_fraction)
        factor = s.top_k if s.capacity_factor is None else s.capacity_factor
        return token_capacity(tokens, self.num_experts, factor=factor)
