"""A reward of your own, in one file: what another verifier says, less for long-winded attempts.

In YAML (``plugins/`` is on the path; verifiers nest like any other class):

    verifier:
      class_path: verifiers.concise.ConciseVerifier
      init_args:
        verifier: {class_path: north_lightning.verifiers.UnitTestVerifier}
        free_tokens: 400

To write another: subclass ``RewardVerifier`` and return a ``Reward``. ``rollout`` has the messages, tokens and stop
reason, ``workdir`` the files the attempt left, ``sandboxes`` opens fresh ones to run something in. Do not run or import
what is in ``workdir`` here. Raise ``VerifierError`` where a score would not be the attempt's doing: it is never a 0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from north_lightning.errors import ConfigError
from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.types import Reward, Rollout, Task


class ConciseVerifier(RewardVerifier):
    """Scales another verifier's reward by ``free_tokens / generated tokens``, but not below ``floor``.

    A solved attempt of at most ``free_tokens`` keeps its reward, an unsolved one its 0: being short is never worth
    more than being right.

    Args:
        verifier: Who says what the attempt is worth.
        free_tokens: Generated tokens, reasoning included, that cost nothing.
        floor: Share of the reward that a solved attempt of any length keeps; between 0 and 1.
    """

    def __init__(self, verifier: RewardVerifier, free_tokens: int, floor: float = 0.5) -> None:
        if free_tokens < 1:
            raise ConfigError(f"free_tokens: expected at least 1, got {free_tokens}")
        if not 0 < floor <= 1:
            raise ConfigError(f"floor: expected a number above 0, at most 1, got {floor}")
        self.verifier = verifier
        self.free_tokens = free_tokens
        self.floor = floor

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        """The scaled reward; whatever the other verifier raises passes through."""
        reward = await self.verifier.verify(task, rollout, workdir, sandboxes)
        length = max(rollout.num_sampled_tokens, 1)
        scale = max(self.floor, min(1.0, self.free_tokens / length))
        return replace(reward, value=reward.value * scale, details={**reward.details, "length_scale": scale})
