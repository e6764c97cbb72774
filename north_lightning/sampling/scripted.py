"""A sampler with known answers, for tests of everything that samples.

Comes in: a script. Goes out: the same ``Sample`` for the same call, without model, server or network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from north_lightning.errors import SamplerError
from north_lightning.interfaces import Sampler
from north_lightning.types import FinishReason, Sample, SamplingParams

Answers = Sequence[Sequence[int]] | Mapping[tuple[int, ...], Sequence[int]] | Callable[[Sequence[int]], Sequence[int]]


class ScriptedSampler(Sampler):
    """Answers from a script, with fixed log-probabilities and a version that tests may change.

    Args:
        answers: a list (the i-th call gets the i-th answer, the last one repeats), a mapping from the end of the prompt
            to the answer (the longest end that fits wins), or a function from prompt to answer.
        logprob: log-probability of every token.
        policy_version: version of every token; an attribute, so that a test can "push" between two calls.
        delay_s: time every answer takes.
    """

    def __init__(self, answers: Answers, logprob: float = -0.5, policy_version: int = 0, delay_s: float = 0.0) -> None:
        self.answers = answers
        self.logprob = logprob
        self.policy_version = policy_version
        self.delay_s = delay_s
        self.prompts: list[list[int]] = []
        """Every prompt that came, in order."""

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        """The script's ids, cut after a stop token or ``max_tokens``; ``SamplerError`` where it has none."""
        call_index = len(self.prompts)
        self.prompts.append(list(prompt_token_ids))
        answer = list(self._answer(call_index, tuple(prompt_token_ids)))
        finish_reason: FinishReason = "length"
        for position, token in enumerate(answer[: params.max_tokens]):
            if token in params.stop_token_ids:
                answer, finish_reason = answer[: position + 1], "stop"
                break
        token_ids = answer[: params.max_tokens]
        await asyncio.sleep(self.delay_s)
        size = len(token_ids)
        return Sample(token_ids, [self.logprob] * size, [self.policy_version] * size, finish_reason)

    def _answer(self, call_index: int, prompt: tuple[int, ...]) -> Sequence[int]:
        if callable(self.answers):
            return self.answers(prompt)
        if not isinstance(self.answers, Mapping):
            return self.answers[min(call_index, len(self.answers) - 1)]
        fitting = [end for end in self.answers if prompt[len(prompt) - len(end) :] == end]
        if not fitting:
            raise SamplerError(f"the script has no answer for a prompt ending in {prompt[-8:]}")
        return self.answers[max(fitting, key=len)]
