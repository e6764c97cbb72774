"""Rewards that ship: unit tests in a fresh sandbox."""

from north_lightning.verifiers.unit_tests import UnitTestVerifier

__all__ = ["UnitTestVerifier"]
