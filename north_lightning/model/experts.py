"""The two kinds of MLP: dense SwiGLU, and a mixture of SwiGLU experts behind a sigmoid router.

In: the normed hidden states of a packed row, [T, D]; optionally, experts to visit instead of the router's own choice.
Out: the MLP branch, before the residual sum. On request, what the router decided. There is no load-balancing bias, no
shared expert and no capacity limit: every token visits its experts.

How the experts are computed is in ``expert_backends``.

Shapes: T tokens, D model, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from north_lightning.model.compute import ComputeConfig
from north_lightning.model.config import NorthConfig
from north_lightning.model.expert_backends import mixture_of_experts


@dataclass(frozen=True)
class Routing:
    """What one layer's router decided for a packed row."""

    layer: int
    logits: Tensor  # [T, E] float32, with gradient
    expert_ids: Tensor  # [T, K] int64

    def tokens_per_expert(self) -> Tensor:
        """[E] int64; sums to T * K."""
        return torch.bincount(self.expert_ids.flatten(), minlength=self.logits.shape[1])

    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy (nats) of the sigmoid scores normalised over all experts: a scalar between
        0 (always one expert) and ln E."""
        scores = self.logits.detach().sigmoid()
        p = scores / scores.sum(-1, keepdim=True)
        return torch.special.entr(p).sum(-1).mean()

    def replayed_differently(self) -> Tensor:
        """Share of ``expert_ids`` that the router would not have chosen now: a scalar, 0 where nothing is replayed."""
        own_choice = self.logits.detach().topk(self.expert_ids.shape[1], dim=-1).indices  # [T, K]
        is_own = (self.expert_ids[:, :, None] == own_choice[:, None, :]).any(-1)
        return 1.0 - is_own.float().mean()


class RoutingRecord(list[Routing]):
    """A list of ``Routing`` that a forward pass fills. Of its own type because hooks on modules (FSDP's) pass copies of
    plain lists on, and what is appended to a copy is lost."""


class DenseMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_up_proj(x_TD)))


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of [T, 2F], keeping nothing but its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (d_hidden,) = grad_outputs
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return _swiglu_backward(d_hidden * up, d_hidden, F.silu(gate), gate)


def _swiglu_backward(d_activation: Tensor, d_hidden: Tensor, activation: Tensor, gate: Tensor) -> Tensor:
    """Gradient of [rows, 2F] from those of silu(gate) and of silu(gate) * up."""
    d_gate_up = torch.empty(gate.shape[0], 2 * gate.shape[1], dtype=gate.dtype, device=gate.device)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(d_hidden, activation, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_activation, gate, grad_input=d_gate)
    return d_gate_up


class Router(nn.Module):
    """Scores every expert by a sigmoid and picks the K best, in float32 whatever the model's dtype (as vLLM does)."""

    def __init__(self, config: NorthConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor, replayed_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E] float32, weights [T, K] float32, expert ids [T, K].

        Where ``replayed_TK`` is not negative it replaces the choice, and only the choice: the weights are gathered from
        this router's own scores, so its gradient is that of the experts that were really used (router replay, R3,
        https://arxiv.org/abs/2510.11370, section 4; sigmoid scores in place of the softmax there).
        """
        logits = F.linear(x_TD, self.weight).float()
        scores = logits.sigmoid()
        weights, expert_ids = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False)
        if replayed_TK is not None:
            expert_ids = torch.where(replayed_TK < 0, expert_ids, replayed_TK)
            weights = scores.gather(-1, expert_ids)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, expert_ids


class MoE(nn.Module):
    """Router and experts; the experts' weights are fused as ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F]."""

    def __init__(self, config: NorthConfig, layer: int, compute: ComputeConfig | None = None) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.layer = layer
        self.backend = (compute or ComputeConfig()).experts
        self.router = Router(config)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_TD: Tensor, routing: list[Routing] | None = None, replayed_TLK: Tensor | None = None) -> Tensor:
        """The experts' weighted sum, [T, D]; appends to ``routing`` when given; see ``NorthModel`` for replay."""
        replayed_TK = None if replayed_TLK is None else replayed_TLK[:, self.layer].long()
        logits, weights, expert_ids = self.router(x_TD, replayed_TK)
        if routing is not None:
            routing.append(Routing(self.layer, logits, expert_ids))
        return self.mix(x_TD, weights, expert_ids)

    def mix(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """``mixture_of_experts`` of those experts that this process holds: all, unless ``parallel`` has dealt them
        out, where ids count from this process's first one."""
        gate_up, down = _held(self.gate_up_proj), _held(self.down_proj)
        return mixture_of_experts(x_TD, weights_TK, expert_ids_TK, gate_up, down, self.backend)


def _held(experts: Tensor) -> Tensor:
    return experts.to_local() if isinstance(experts, DTensor) else experts
