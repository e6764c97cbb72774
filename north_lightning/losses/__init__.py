"""Objectives as pure functions on tensors: per-token log-probabilities, cross entropy, policy losses."""

from north_lightning.losses.cispo import CISPOLoss
from north_lightning.losses.cross_entropy import conversation_mean_weights, cross_entropy_sum, token_mean_weights
from north_lightning.losses.gspo import GSPOLoss
from north_lightning.losses.logprobs import token_logprobs, trained_positions
from north_lightning.losses.masked_importance import MaskedImportanceLoss
from north_lightning.losses.metrics import combine_metrics
from north_lightning.losses.policy_gradient import PolicyGradientLoss
from north_lightning.losses.truncated_importance import TruncatedImportanceLoss

__all__ = [
    "CISPOLoss",
    "GSPOLoss",
    "MaskedImportanceLoss",
    "PolicyGradientLoss",
    "TruncatedImportanceLoss",
    "combine_metrics",
    "conversation_mean_weights",
    "cross_entropy_sum",
    "token_logprobs",
    "token_mean_weights",
    "trained_positions",
]
