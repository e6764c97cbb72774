"""The two kinds of MLP: dense SwiGLU, and a mixture of SwiGLU experts behind a sigmoid router.

In: the normed hidden states of a packed row, [T, D]; optionally, experts to visit instead of the router's own choice.
Out: the MLP branch, before the residual sum. On request, what the router decided. There is no load-balancing bias, no
shared expert and no capacity limit: every token visits its experts.

Shapes: T tokens, D model, F expert width, E experts, K experts per token, S = T * K slots (token-expert pairs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from north_lightning.model.config import NorthConfig


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

    def __init__(self, config: NorthConfig, layer: int) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.layer = layer
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
        return mixture_of_experts(x_TD, weights_TK, expert_ids_TK, gate_up, down)


def _held(experts: Tensor) -> Tensor:
    return experts.to_local() if isinstance(experts, DTensor) else experts


def mixture_of_experts(
    x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """``sum_k weights[t, k] * down[e](silu(gate[e] x[t]) * up[e] x[t])`` with ``e = expert_ids[t, k]``.

    Args:
        x_TD: [T, D]
        weights_TK: [T, K] float32
        expert_ids_TK: [T, K] int64
        gate_up_EFD: [E, 2F, D], gate rows first
        down_EDF: [E, D, F]

    Returns:
        [T, D] in x's dtype.
    """
    num_experts = gate_up_EFD.shape[0]
    slots = expert_ids_TK.flatten().argsort(stable=True)  # [S] by expert, then by token
    counts = torch.bincount(expert_ids_TK.flatten(), minlength=num_experts)
    if x_TD.is_cuda:
        return _grouped_experts(x_TD, weights_TK, slots, counts, gate_up_EFD, down_EDF)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _LoopedExperts.apply(x_TD, weights_TK, slots, counts.tolist(), gate_up_EFD, down_EDF)


def _grouped_experts(
    x_TD: Tensor, weights_TK: Tensor, slots_S: Tensor, counts_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """One grouped matrix product per projection; no synchronisation with the device."""
    num_tokens, top_k = weights_TK.shape
    if torch.is_autocast_enabled(x_TD.device.type):  # grouped_mm is not on autocast's list
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, gate_up_EFD, down_EDF = x_TD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
    offsets = counts_E.cumsum(0).to(torch.int32)
    gate_up = F.grouped_mm(x_TD[slots_S // top_k], gate_up_EFD.transpose(1, 2), offs=offsets)
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = (F.silu(gate.float()) * up.float() * weights_TK.flatten()[slots_S, None]).to(x_TD.dtype)
    out = F.grouped_mm(hidden, down_EDF.transpose(1, 2), offs=offsets)
    return out[_inverse(slots_S)].view(num_tokens, top_k, -1).float().sum(1).to(x_TD.dtype)


def _inverse(permutation: Tensor) -> Tensor:
    positions = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


class _LoopedExperts(torch.autograd.Function):
    """For a CPU: one expert after the other, so that everything an expert touches stays in the cache.

    The router's weight is multiplied into the F-wide hidden activation instead of the D-wide output: the same number,
    and the weighted sum over a token's experts becomes a plain sum of rows. Only the inputs and the gate/up
    activations are kept for the backward pass.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, slots_S: Tensor, counts: list[int], w_in: Tensor, w_out: Tensor
    ) -> Tensor:
        num_tokens, top_k = weights_TK.shape
        width = w_out.shape[2]
        tokens_S = slots_S // top_k
        weights_S = weights_TK.flatten()[slots_S, None]
        rows_TK = _inverse(slots_S).view(num_tokens, top_k)  # where each token's K results lie
        gate_up = x_TD.new_empty(slots_S.shape[0], 2 * width)
        out = x_TD.new_empty(slots_S.shape[0], x_TD.shape[1])
        for expert, part in _nonempty(counts):
            torch.mm(x_TD.index_select(0, tokens_S[part]), w_in[expert].T, out=gate_up[part])
            gate, up = gate_up[part].chunk(2, dim=-1)
            hidden = F.silu(gate).mul_(up).mul_(weights_S[part])
            torch.mm(hidden, w_out[expert].T, out=out[part])
        ctx.save_for_backward(x_TD, tokens_S, weights_S, rows_TK, gate_up, w_in, w_out)
        ctx.counts = counts
        return F.embedding_bag(rows_TK, out, mode="sum")

    @staticmethod
    @custom_bwd(device_type="cpu")  # autocast stays off, whatever is on where backward is called
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grad_outputs
        x_TD, tokens_S, weights_S, rows_TK, gate_up, w_in, w_out = ctx.saved_tensors
        d_w_in, d_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                d_w_in[expert].zero_()
                d_w_out[expert].zero_()
        d_weights = torch.empty_like(weights_S)
        d_x = x_TD.new_empty(tokens_S.shape[0], x_TD.shape[1])
        for expert, part in _nonempty(ctx.counts):
            gate, up = gate_up[part].chunk(2, dim=-1)
            d_y = d_out.index_select(0, tokens_S[part])
            activation = F.silu(gate)
            hidden = activation * up
            d_hidden = torch.mm(d_y, w_out[expert])  # of the weighted hidden activation
            torch.sum(d_hidden * hidden, 1, keepdim=True, out=d_weights[part])
            torch.mm(d_y.T, hidden.mul_(weights_S[part]), out=d_w_out[expert])
            d_hidden.mul_(weights_S[part])
            d_gate_up = _swiglu_backward(d_hidden * up, d_hidden, activation, gate)
            torch.mm(d_gate_up.T, x_TD.index_select(0, tokens_S[part]), out=d_w_in[expert])
            torch.mm(d_gate_up, w_in[expert], out=d_x[part])
        d_weights_TK = d_weights.flatten()[rows_TK]
        return F.embedding_bag(rows_TK, d_x, mode="sum"), d_weights_TK, None, None, d_w_in, d_w_out


def _nonempty(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its slots) for every expert that got a token."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
        start += count
    return parts
