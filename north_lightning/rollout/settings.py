"""How attempts are made: one block of settings, the same in calibration, evaluation and RL.

In: settings from a config. Out: a ``RolloutRunner`` for a served model. Picklable: it travels to the rollout process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.interfaces import Harness, RewardVerifier, SandboxProvider
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.sampling.client import VLLMSampler
from north_lightning.tasks import image_of


@dataclass(frozen=True)
class RolloutSettings:
    """How attempts are made.

    Args:
        harnesses: Environment of a task -> the agent loop for it.
        verifier: What scores an attempt.
        sandboxes: Where commands run.
        max_turn_tokens: Longest turn, in tokens.
        max_context_tokens: Longest rollout, prompt and observations included.
        temperature: Of sampling.
        top_p: Of sampling.
        reasoning: Whether the model thinks before it acts.
    """

    harnesses: dict[str, Harness]
    verifier: RewardVerifier
    sandboxes: SandboxProvider
    max_turn_tokens: int
    max_context_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    reasoning: bool = False

    def make_runner(self, tokenizer_dir: Path, url: str) -> RolloutRunner:
        """A runner for the model that the vLLM server at ``url`` serves, with its tokenizer."""
        return RolloutRunner(
            ChatFormat(NorthTokenizer.load(tokenizer_dir), self.reasoning),
            VLLMSampler(url),
            self.sandboxes,
            self.harnesses,
            self.verifier,
            image_of,
            self.max_turn_tokens,
            self.max_context_tokens,
            self.temperature,
            self.top_p,
        )
