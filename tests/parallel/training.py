"""A few optimizer steps, on any layout and by hand in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from north_lightning.losses import token_logprobs, trained_positions
from north_lightning.model import NorthConfig, NorthModel
from north_lightning.parallel import Layout, ParallelSizes, clip_grad_norm, parallelize, parameter_groups

CONFIG = NorthConfig(
    vocab_size=121,  # not divisible: the last process holds less
    hidden_size=32,
    intermediate_size=16,
    prefix_dense_intermediate_size=48,
    num_hidden_layers=4,  # dense and global with RoPE; sliding; global without; sliding
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    sliding_window=24,
    sliding_window_pattern=2,
    initializer_range=0.15,
)
ROWS = [[3, 120, 77], [30, 7], [90], [40, 1, 30]]
"""Lengths of the documents in each of the four rows of a step: longer and shorter than the window and than a piece."""

STEPS, LR, EPS, MAX_NORM = 3, 1e-2, 1e-3, 0.3


def documents(step: int, row: int) -> list[tuple[Tensor, Tensor]]:
    """(token ids, loss mask) of each document."""
    generator = torch.Generator().manual_seed(100 * step + row)
    result = []
    for length in ROWS[row]:
        mask = torch.rand(length, generator=generator) < 0.6
        mask[0] = False
        result.append((torch.randint(0, CONFIG.vocab_size, (length,), generator=generator), mask))
    return result


def packed(step: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, cu_seqlens, loss_mask."""
    ids, masks = zip(*documents(step, row), strict=True)
    bounds = torch.tensor([0, *ROWS[row]]).cumsum(0).int()
    return torch.cat(ids), bounds, torch.cat(masks)


def trained_tokens(step: int) -> int:
    return sum(int(packed(step, row)[2].sum()) for row in range(len(ROWS)))


def fresh_model() -> NorthModel:
    torch.manual_seed(0)
    return NorthModel(CONFIG)


def make_optimizer(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, eps=EPS)


def train_by_hand() -> dict[str, Any]:
    """One process, no parallelism, every document on its own, whole logits."""
    model = fresh_model()
    optimizer = make_optimizer(model.parameters())
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        total = torch.zeros(())
        for row in range(len(ROWS)):
            for token_ids, mask in documents(step, row):
                logits = model(token_ids, torch.tensor([0, len(token_ids)]).int()) @ model.embedding_weight.T
                logprobs = logits[:-1].log_softmax(-1).gather(-1, token_ids[1:, None])[:, 0]
                total = total - logprobs[mask[1:]].sum()
        loss = total / trained_tokens(step)
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, MAX_NORM / float(norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(float(norm))
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": dict(model.named_parameters())}


def train(sizes: ParallelSizes, compute_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same steps on a layout, with packed rows."""
    import torch.distributed as dist

    layout = Layout.create(sizes, "cpu")
    model = fresh_model()
    parallelize(model, layout, compute_dtype)
    optimizer = make_optimizer(parameter_groups(model))
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        total = torch.zeros(())
        for row in range(layout.data_rank, len(ROWS), sizes.data):
            token_ids, cu_seqlens, mask = packed(step, row)
            hidden = model(token_ids, cu_seqlens)
            held = model.tokens_held(len(token_ids))
            sources, targets = trained_positions(token_ids, cu_seqlens, mask)
            here = (sources >= held.start) & (sources < held.stop)
            logprobs, _ = token_logprobs(hidden[sources[here] - held.start], model.embedding_weight, targets[here])
            loss = -logprobs.sum() / trained_tokens(step)
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        gradients = gradients or {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
        norms.append(float(clip_grad_norm(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    weights = {n: p.full_tensor() for n, p in model.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "gradients": {n: g.detach().numpy() for n, g in gradients.items()},
        "weights": {n: w.detach().numpy() for n, w in weights.items()},
    }
