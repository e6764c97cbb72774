"""Rollouts to packed rows, and moving packed rows to a device. (Rows for SFT are made by ``store``.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from north_lightning.errors import DataError
from north_lightning.types import PackedBatch, Rollout, RolloutBatch

Batch = TypeVar("Batch", bound=PackedBatch)


def pack_rollouts(rollouts: Sequence[Rollout], num_trained_tokens: int) -> RolloutBatch:
    """One row of rollouts; ``num_trained_tokens`` is the whole optimizer step's, ``sources`` the environments.

    Raises:
        DataError: a rollout's per-token lists are not aligned, or its first token is to be trained.
    """
    for rollout in rollouts:
        _check_alignment(rollout)

    def join(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for rollout in rollouts for value in getattr(rollout, name)], dtype=dtype)

    mask = join("loss_mask", torch.bool)
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
    advantages = torch.tensor([rollout.advantage for rollout in rollouts], dtype=torch.float32)
    return RolloutBatch(
        token_ids=join("token_ids", torch.int64),
        cu_seqlens=_boundaries(lengths.tolist()),
        loss_mask=mask,
        num_trained_tokens=num_trained_tokens,
        sources=[rollout.environment for rollout in rollouts],
        rollout_logprobs=join("rollout_logprobs", torch.float32),
        advantages=advantages.repeat_interleave(lengths) * mask,
        policy_versions=join("policy_versions", torch.int64),
    )


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on ``device``; everything else is shared, not walked through."""
    tensors: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)


def _boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)


def _check_alignment(rollout: Rollout) -> None:
    name = f"rollout {rollout.index} of group {rollout.group_id} ({rollout.task_id})"
    expected = len(rollout.token_ids)
    for field in ("loss_mask", "rollout_logprobs", "policy_versions"):
        if (got := len(getattr(rollout, field))) != expected:
            raise DataError(f"{name}: expected {field} as long as its {expected} token_ids, got {got}")
    if rollout.loss_mask and rollout.loss_mask[0]:
        raise DataError(f"{name}: expected a prompt before the first sampled token, got none")
