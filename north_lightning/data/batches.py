"""Rollouts to packed rows, and moving packed rows to a device. (Rows for SFT are made by ``store``.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from north_lightning.errors import DataError
from north_lightning.types import PackedBatch, Rollout, RolloutBatch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

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
        routed_experts=_join_routed_experts(rollouts),
    )


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on ``device``; everything else is shared, not walked through."""
    tensors: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)


def keep_predicted_from(batch: Batch, held: slice) -> Batch:
    """The batch with only those tokens left in ``loss_mask`` whose predecessor (what predicts them) is in ``held``."""
    if held == slice(0, len(batch.token_ids)):
        return batch
    mask = torch.zeros_like(batch.loss_mask)
    mask[held.start + 1 : held.stop + 1] = batch.loss_mask[held.start + 1 : held.stop + 1]
    return replace(batch, loss_mask=mask)


def rows_at_once(trainer: Trainer | None) -> tuple[int, int]:
    """How many different rows the processes of a trainer work on at a time, and the number of this process's."""
    split = None if trainer is None else trainer.distributed_sampler_kwargs
    return (1, 0) if split is None else (split["num_replicas"], split["rank"])


def _boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)


def _join_routed_experts(rollouts: Sequence[Rollout]) -> Tensor | None:
    """[T, L, K] int16, or None where no rollout has any."""
    recorded = [rollout.routed_experts for rollout in rollouts]
    shapes = {array.shape[1:] for array in recorded if array is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise DataError(f"routed_experts: expected one number of layers and experts per token, got {sorted(shapes)}")
    num_tokens = [len(rollout.token_ids) for rollout in rollouts]
    joined = torch.full((sum(num_tokens), *shapes.pop()), -1, dtype=torch.int16)
    for array, part in zip(recorded, joined.split(num_tokens), strict=True):
        if array is not None:
            part[: len(array)] = torch.from_numpy(array.astype("int16"))
    return joined


def _check_alignment(rollout: Rollout) -> None:
    name = f"rollout {rollout.index} of group {rollout.group_id} ({rollout.task_id})"
    expected = len(rollout.token_ids)
    for field in ("loss_mask", "rollout_logprobs", "policy_versions"):
        if (got := len(getattr(rollout, field))) != expected:
            raise DataError(f"{name}: expected {field} as long as its {expected} token_ids, got {got}")
    if rollout.routed_experts is not None and len(rollout.routed_experts) > expected:
        raise DataError(
            f"{name}: expected routed_experts of at most {expected} tokens, got {rollout.routed_experts.shape}"
        )
    if rollout.loss_mask and rollout.loss_mask[0]:
        raise DataError(f"{name}: expected a prompt before the first sampled token, got none")
