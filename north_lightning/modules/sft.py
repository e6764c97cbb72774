"""Supervised fine-tuning: cross entropy of the trained tokens.

In: ``PackedBatch``es. Out: an optimizer step on the mean over *all* trained tokens of the step, or over all its
conversations, whatever micro-batches and ranks they lie in. Not here: which tokens are trained (``chat``), which
samples meet in a batch (``data``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from north_lightning.errors import ConfigError, TrainingError
from north_lightning.losses import conversation_mean_weights, token_mean_weights
from north_lightning.modules.base import NorthModule
from north_lightning.parallel import gather_objects
from north_lightning.types import PackedBatch


class SFTModule(NorthModule):
    """Supervised fine-tuning. See ``NorthModule`` for the other arguments.

    Logged: ``train/loss``, the mean over the step's trained tokens, and ``train/loss/SOURCE``; the same as ``val/...``;
    and ``train/conversation_loss`` where that is minimised.

    Args:
        loss_mean: what the loss is the mean of: all trained ``tokens`` of the step, or its ``conversations``, each with
            the mean of its own tokens.
    """

    def __init__(self, loss_mean: Literal["tokens", "conversations"] = "tokens", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if loss_mean not in ("tokens", "conversations"):
            raise ConfigError(f"model.loss_mean: expected tokens or conversations, got {loss_mean}")
        self.loss_mean = loss_mean
        self._losses = SourceLosses()  # of the micro-batches of this optimizer step

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        batch = self.keep_predicted_here(batch)
        logprobs, _ = self.trained_logprobs(batch)  # [R]
        loss = -(self._token_weights(batch) * logprobs).sum()
        if not torch.isfinite(loss):
            raise TrainingError(f"step {self.global_step} was not taken: the loss is {loss.item()}")
        self._losses.add(batch, -logprobs.detach())
        self._losses.objective += float(loss.detach())
        return loss * self.gradient_scale()

    def _token_weights(self, batch: PackedBatch) -> Tensor:
        """[R]; over all rows of the optimizer step they sum to 1."""
        if self.loss_mean == "tokens":
            return token_mean_weights(batch.loss_mask, batch.num_trained_tokens)
        assert batch.trained_per_document is not None, "rows for SFT are made with it"
        return conversation_mean_weights(
            batch.loss_mask, batch.cu_seqlens, batch.trained_per_document, batch.num_documents
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        losses, self._losses = self._losses.of_all_processes(), SourceLosses()
        self.log("train/loss", losses.mean())
        self.record({f"train/loss/{source}": mean for source, mean in losses.means().items()})
        if self.loss_mean == "conversations":
            self.record({"train/conversation_loss": losses.objective})

    def on_validation_epoch_start(self) -> None:
        self._validation_losses = SourceLosses()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        batch = self.keep_predicted_here(batch)
        logprobs, _ = self.trained_logprobs(batch)
        self._validation_losses.add(batch, -logprobs)

    def on_validation_epoch_end(self) -> None:
        losses = self._validation_losses.of_all_processes()
        self.log_dict({f"val/loss/{source}": mean for source, mean in losses.means().items()})
        self.log("val/loss", losses.mean())


class SourceLosses:
    """Sums of token losses by source, over several micro-batches."""

    def __init__(self) -> None:
        self.sums = defaultdict[str, float](float)
        self.counts = Counter[str]()
        self.objective = 0.0  # what was minimised

    def add(self, batch: PackedBatch, losses: Tensor) -> None:
        """``losses`` [R] of the tokens under ``batch.loss_mask``, in their order."""
        trained_per_document = torch.diff(
            batch.loss_mask.cumsum(0)[batch.cu_seqlens[1:].long() - 1], prepend=batch.cu_seqlens.new_zeros(1)
        )
        for source, of_document in zip(batch.sources, losses.split(trained_per_document.tolist()), strict=True):
            self.sums[source] += float(of_document.sum())
            self.counts[source] += len(of_document)

    def of_all_processes(self) -> SourceLosses:
        """The sums over all processes; each has added the tokens that it predicted, and no token is predicted twice."""
        whole = SourceLosses()
        for sums, counts, objective in gather_objects((dict(self.sums), dict(self.counts), self.objective)):
            whole.objective += objective
            for source in sums:
                whole.sums[source] += sums[source]
                whole.counts[source] += counts[source]
        return whole

    def mean(self) -> float:
        return sum(self.sums.values()) / max(self.counts.total(), 1)

    def means(self) -> dict[str, float]:
        return {source: self.sums[source] / count for source, count in self.counts.items() if count}
