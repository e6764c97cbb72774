"""Rewards that ship: unit tests in a fresh sandbox, and what may be added to their verdict."""

from north_lightning.verifiers.penalties import FormatPenalty, LengthPenalty, LoopPenalty, Part, RewardSum
from north_lightning.verifiers.unit_tests import UnitTestVerifier

__all__ = ["FormatPenalty", "LengthPenalty", "LoopPenalty", "Part", "RewardSum", "UnitTestVerifier"]
