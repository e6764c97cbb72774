"""The mixture of experts, computed in three ways: plain, batched (for a CPU) and grouped (for CUDA).

In: tokens, the router's weights and choices, the experts' fused matrices. Out: every token's weighted sum over its
experts, with gradients to all but the choices. Not here: who chooses (``experts.Router``).

The router's weight is multiplied into the F-wide hidden activation instead of the D-wide output: the same number, and
the weighted sum over a token's experts becomes a plain sum of rows. ``batched`` and ``grouped`` keep their inputs and
the gate/up activations for the backward pass, and nothing else.

Shapes: T tokens, D model, F expert width, E experts, K experts per token, S = T * K slots (token-expert pairs); e
experts of a batch, c slots of each of them; R >= S rows, the slots of all batches with their padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.nn import functional as F

from north_lightning.model.compute import ExpertBackend

MAX_BATCH_ROWS = 2048
"""Rows of one batched product: best of 1024, 2048 and 4096 on two cores (D of 64, 128, 256; 256 slots an expert)."""


def mixture_of_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    backend: ExpertBackend = "auto",
) -> Tensor:
    """``sum_k weights[t, k] * down[e](silu(gate[e] x[t]) * up[e] x[t])`` with ``e = expert_ids[t, k]``.

    Args:
        x_TD: [T, D]
        weights_TK: [T, K] float32
        expert_ids_TK: [T, K] int64
        gate_up_EFD: [E, 2F, D], gate rows first
        down_EDF: [E, D, F]
        backend: see ``ComputeConfig.experts``.

    Returns:
        [T, D] in x's dtype.
    """
    if backend == "auto":
        backend = "grouped" if x_TD.is_cuda else "batched"
    device_type = x_TD.device.type
    if backend == "grouped" and torch.is_autocast_enabled(device_type):  # grouped_mm is not on autocast's list
        dtype = torch.get_autocast_dtype(device_type)
        x_TD, gate_up_EFD, down_EDF = x_TD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
    implementation = {"plain": _plain_experts, "batched": _batched_experts, "grouped": _grouped_experts}[backend]
    with torch.autocast(device_type, enabled=False):
        return implementation(x_TD, weights_TK, expert_ids_TK, gate_up_EFD, down_EDF)


# ---- plain ---------------------------------------------------------------------------------------------------------


def _plain_experts(x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """One expert after the other, differentiated by autograd."""
    out = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
    for expert in range(w_in.shape[0]):
        tokens, choice = (expert_ids_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[tokens], w_in[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w_out[expert])
        out = out.index_add(0, tokens, y * weights_TK[tokens, choice, None])
    return out.to(x_TD.dtype)


# ---- batched: for a CPU --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ExpertBatch:
    """Experts whose numbers of slots are close, padded to the largest of them."""

    experts: list[int]  # e
    num_slots: int  # c
    index: Tensor  # [e]

    def select(self, w: Tensor) -> Tensor:
        """The experts' matrices of [E, ...], as [e, ...]; a view if it is only one."""
        if len(self.experts) == 1:
            return w[self.experts[0] : self.experts[0] + 1]
        return w.index_select(0, self.index)

    def store_product(self, w: Tensor, a: Tensor, b: Tensor) -> None:
        """Write the batched product ``a @ b`` to the experts' matrices of [E, ...]."""
        if len(self.experts) == 1:
            torch.bmm(a, b, out=self.select(w))
        else:
            w.index_copy_(0, self.index, torch.bmm(a, b))


@dataclass(frozen=True)
class _Plan:
    """Where every slot lies among the R rows."""

    batches: list[_ExpertBatch]
    idle: list[int]  # experts without a slot
    tokens_R: Tensor
    rows_TK: Tensor

    @property
    def batch_rows(self) -> list[int]:
        return [len(batch.experts) * batch.num_slots for batch in self.batches]


def _plan_batches(expert_ids_TK: Tensor, num_experts: int) -> _Plan:
    """Sort the slots by expert, and the experts by load, and cut them into batches of up to ``MAX_BATCH_ROWS`` rows.

    Padding rows belong to token 0 and have weight 0: they are finite, and no result or gradient comes from them.
    """
    device, top_k = expert_ids_TK.device, expert_ids_TK.shape[1]
    flat = expert_ids_TK.flatten()
    slots = flat.to(torch.int16).argsort(stable=True)  # [S] by expert, then by token; four times as fast as in int64
    counts = torch.bincount(flat, minlength=num_experts)
    count = counts.tolist()
    by_load = sorted(range(num_experts), key=count.__getitem__, reverse=True)
    first_row = [0] * num_experts
    batches, num_busy, rows = [], num_experts - count.count(0), 0
    start = 0
    while start < num_busy:
        num_slots = count[by_load[start]]
        experts = by_load[start : min(num_busy, start + max(1, MAX_BATCH_ROWS // num_slots))]
        batches.append(_ExpertBatch(experts, num_slots, torch.tensor(experts, device=device)))
        for expert in experts:
            first_row[expert] = rows
            rows += num_slots
        start += len(experts)
    shift = torch.tensor(first_row, device=device) - (counts.cumsum(0) - counts)
    row_S = torch.arange(len(slots), device=device) + torch.repeat_interleave(shift, counts, output_size=len(slots))
    tokens_R = torch.zeros(rows, dtype=torch.long, device=device).scatter_(0, row_S, slots // top_k)
    rows_TK = torch.empty_like(row_S).scatter_(0, slots, row_S).view(-1, top_k)
    return _Plan(batches, by_load[num_busy:], tokens_R, rows_TK)


def _batched_experts(x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return _BatchedExperts.apply(x_TD, weights_TK, _plan_batches(expert_ids_TK, w_in.shape[0]), w_in, w_out)


class _BatchedExperts(torch.autograd.Function):
    """Batches small enough for the cache, large enough for all threads; activations are laid out [e, F, c], so that
    gate and up are contiguous."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, plan: _Plan, w_in: Tensor, w_out: Tensor) -> Tensor:
        weights_R = weights_TK.new_zeros(plan.tokens_R.shape).scatter_(0, plan.rows_TK.flatten(), weights_TK.flatten())
        out_RD = x_TD.new_empty(plan.tokens_R.shape[0], x_TD.shape[1])
        gate_ups = []
        for batch, tokens, weights, out in _per_batch(plan, plan.tokens_R, weights_R, out_RD):
            x = x_TD.index_select(0, tokens).view(len(batch.experts), batch.num_slots, -1)  # [e, c, D]
            gate_up = torch.bmm(batch.select(w_in), x.transpose(1, 2))  # [e, 2F, c]
            gate, up = gate_up.chunk(2, dim=1)
            hidden = F.silu(gate).mul_(up).mul_(weights.view(-1, 1, batch.num_slots))  # [e, F, c]
            torch.bmm(hidden.transpose(1, 2), batch.select(w_out).transpose(1, 2), out=out.view(x.shape))
            gate_ups.append(gate_up)
        ctx.save_for_backward(x_TD, weights_R, w_in, w_out, *gate_ups)
        ctx.plan = plan
        return F.embedding_bag(plan.rows_TK, out_RD, mode="sum")

    @staticmethod
    @custom_bwd(device_type="cpu")  # autocast stays off, whatever is on where backward is called
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grad_outputs
        x_TD, weights_R, w_in, w_out, *gate_ups = ctx.saved_tensors
        plan: _Plan = ctx.plan
        d_w_in = _gradient_like(w_in, plan.idle) if ctx.needs_input_grad[3] else None
        d_w_out = _gradient_like(w_out, plan.idle) if ctx.needs_input_grad[4] else None
        d_weights_R = torch.empty_like(weights_R)
        d_x_RD = x_TD.new_empty(plan.tokens_R.shape[0], x_TD.shape[1])
        parts = _per_batch(plan, plan.tokens_R, weights_R, d_weights_R, d_x_RD)
        for gate_up, (batch, tokens, weights, d_weights, d_x) in zip(gate_ups, parts, strict=True):
            num_experts, num_slots = len(batch.experts), batch.num_slots
            d_y = d_out.index_select(0, tokens).view(num_experts, num_slots, -1)  # [e, c, D]
            d_hidden = torch.bmm(batch.select(w_out).transpose(1, 2), d_y.transpose(1, 2))  # of the weighted [e, F, c]
            gate, up = gate_up.chunk(2, dim=1)
            activation = F.silu(gate)
            hidden = activation * up
            d_weights.copy_((d_hidden * hidden).sum(1).flatten())
            weights = weights.view(num_experts, 1, num_slots)
            if d_w_out is not None:
                batch.store_product(d_w_out, d_y.transpose(1, 2), hidden.mul_(weights).transpose(1, 2))
            d_hidden.mul_(weights)
            d_gate_up = torch.empty_like(gate_up)
            d_gate, d_up = d_gate_up.chunk(2, dim=1)
            torch.mul(d_hidden, activation, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
            if d_w_in is not None:
                batch.store_product(d_w_in, d_gate_up, x_TD.index_select(0, tokens).view(d_y.shape))
            torch.bmm(d_gate_up.transpose(1, 2), batch.select(w_in), out=d_x.view(d_y.shape))
        return F.embedding_bag(plan.rows_TK, d_x_RD, mode="sum"), d_weights_R[plan.rows_TK], None, d_w_in, d_w_out


def _gradient_like(w: Tensor, idle: list[int]) -> Tensor:
    """[E, ...], zero for experts without a slot, not yet written for the others."""
    gradient = torch.empty_like(w)
    gradient[idle] = 0.0
    return gradient


def _per_batch(plan: _Plan, *tensors_R: Tensor) -> zip[tuple[Any, ...]]:
    """Every batch with its rows of the tensors."""
    return zip(plan.batches, *(tensor.split(plan.batch_rows) for tensor in tensors_R), strict=True)


# ---- grouped: for CUDA ---------------------------------------------------------------------------------------------


def _grouped_experts(x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    flat = expert_ids_TK.flatten()
    slots_S = flat.argsort(stable=True)
    rows_TK = torch.empty_like(slots_S).scatter_(0, slots_S, torch.arange(len(slots_S), device=flat.device))
    offsets_E = torch.bincount(flat, minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
    tokens_S = slots_S // expert_ids_TK.shape[1]
    return _GroupedExperts.apply(
        x_TD, weights_TK.flatten()[slots_S], tokens_S, rows_TK.view_as(expert_ids_TK), offsets_E, w_in, w_out
    )


class _GroupedExperts(torch.autograd.Function):
    """One grouped matrix product per projection and gradient; no synchronisation with the device."""

    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_S: Tensor,
        tokens_S: Tensor,
        rows_TK: Tensor,
        offsets_E: Tensor,
        w_in: Tensor,
        w_out: Tensor,
    ) -> Tensor:
        gate_up = F.grouped_mm(x_TD[tokens_S], w_in.transpose(1, 2), offs=offsets_E)  # [S, 2F]
        hidden = _weighted_swiglu(gate_up, weights_S)
        out = F.grouped_mm(hidden, w_out.transpose(1, 2), offs=offsets_E)  # [S, D]
        ctx.save_for_backward(x_TD, weights_S, tokens_S, rows_TK, offsets_E, w_in, w_out, gate_up)
        return _sum_rows(out, rows_TK)

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grad_outputs
        x_TD, weights_S, tokens_S, rows_TK, offsets_E, w_in, w_out, gate_up = ctx.saved_tensors
        d_y = d_out[tokens_S]
        d_hidden = F.grouped_mm(d_y, w_out, offs=offsets_E)  # of the weighted hidden activation, [S, F]
        hidden, d_gate_up, d_weights = _weighted_swiglu_backward(gate_up, weights_S, d_hidden)
        need_w_in, need_w_out = ctx.needs_input_grad[5:]
        d_w_out = F.grouped_mm(d_y.T, hidden, offs=offsets_E) if need_w_out else None
        del d_y, hidden, d_hidden
        d_w_in = F.grouped_mm(d_gate_up.T, x_TD[tokens_S], offs=offsets_E) if need_w_in else None
        d_x = _sum_rows(F.grouped_mm(d_gate_up, w_in, offs=offsets_E), rows_TK)
        return d_x, d_weights, None, None, None, d_w_in, d_w_out


def _weighted_swiglu(gate_up: Tensor, weights_S: Tensor) -> Tensor:
    """``weights * silu(gate) * up`` in float32, [S, F] in gate_up's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate.float()).mul_(up).mul_(weights_S[:, None])
    return hidden.to(gate_up.dtype)


def _weighted_swiglu_backward(gate_up: Tensor, weights_S: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its value again, and the gradients of gate_up [S, 2F] and of the weights [S]."""
    gate, up = gate_up.chunk(2, dim=-1)
    activation = F.silu(gate.float())
    hidden = activation * up
    d_weights = torch.linalg.vecdot(d_hidden.float(), hidden)
    hidden = hidden.mul_(weights_S[:, None]).to(gate_up.dtype)
    d_hidden = d_hidden.float().mul_(weights_S[:, None])
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    d_up.copy_(activation.mul_(d_hidden))
    d_gate.copy_(torch.ops.aten.silu_backward(d_hidden.mul_(up), gate.float()))
    return hidden, d_gate_up, d_weights


def _sum_rows(x_SD: Tensor, rows_TK: Tensor) -> Tensor:
    """The sum of every token's K rows, accumulated in float32."""
    return x_SD[rows_TK].sum(1, dtype=torch.float32).to(x_SD.dtype)
