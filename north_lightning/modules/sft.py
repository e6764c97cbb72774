"""Supervised fine-tuning: cross entropy of the trained tokens.

In: ``PackedBatch``es. Out: an optimizer step on the mean over *all* trained tokens of the step, whatever micro-batches
and ranks they lie in. Not here: which tokens are trained (``chat``), which samples meet in a batch (``data``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from north_lightning.errors import TrainingError
from north_lightning.modules.base import NorthModule
from north_lightning.types import PackedBatch


class SFTModule(NorthModule):
    """Supervised fine-tuning. See ``NorthModule`` for the arguments."""

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        logprobs, _ = self.trained_logprobs(batch)  # [R]
        loss = -logprobs.sum() / batch.num_trained_tokens
        if not torch.isfinite(loss):
            raise TrainingError(f"step {self.global_step} was not taken: the loss is {loss.item()}")
        self._log_losses(batch, -logprobs.detach(), "train")
        return loss * self.gradient_scale()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        logprobs, _ = self.trained_logprobs(batch)
        self._log_losses(batch, -logprobs.detach(), "val")

    def _log_losses(self, batch: PackedBatch, losses: Tensor, stage: str) -> None:
        """``{stage}/loss`` and ``{stage}/loss/SOURCE``: means over trained tokens of ``losses`` [R]."""
        whole = stage == "val"
        positions = batch.loss_mask.nonzero().flatten()  # [R]
        documents = torch.bucketize(positions, batch.cu_seqlens[1:].long(), right=True)  # [R], document of each token
        if positions.numel():
            self.log(f"{stage}/loss", losses.mean(), on_step=not whole, on_epoch=whole, batch_size=positions.numel())
        for source in sorted(set(batch.sources)):
            members = torch.tensor([i for i, name in enumerate(batch.sources) if name == source], device=losses.device)
            chosen = losses[torch.isin(documents, members)]
            if chosen.numel():
                self.log(
                    f"{stage}/loss/{source}",
                    chosen.mean(),
                    on_step=not whole,
                    on_epoch=whole,
                    batch_size=chosen.numel(),
                )
