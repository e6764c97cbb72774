"""Objectives as pure functions on tensors: per-token log-probabilities, cross entropy, CISPO."""

from north_lightning.losses.cispo import CISPOLoss
from north_lightning.losses.cross_entropy import cross_entropy_sum
from north_lightning.losses.logprobs import token_logprobs, trained_positions
from north_lightning.losses.metrics import combine_metrics

__all__ = ["CISPOLoss", "combine_metrics", "cross_entropy_sum", "token_logprobs", "trained_positions"]
