"""From a task to rollouts: sample turn by turn, carry the actions out, and keep every token exactly as it was sampled.

In: a task and a seed. Out: a ``Rollout``, or a ``RolloutGroup`` with leave-one-out advantages. Nothing is ever
tokenised again: the ids of a rollout are the prompt's, then alternately what the sampler returned and what the tool
results encode to, only ever appended. It does not choose tasks and does not know the queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from north_lightning.errors import (
    AttemptError,
    ConfigError,
    InfrastructureError,
    InvalidActionError,
    NonFiniteError,
    PromptTooLongError,
    SamplerError,
    SandboxUnavailableError,
    VerifierError,
)
from north_lightning.interfaces import Harness, RewardVerifier, Sampler, SandboxProvider
from north_lightning.rollout.advantages import rloo_advantages
from north_lightning.rollout.attempt import AttemptEnds, AttemptLoop, Policy
from north_lightning.rollout.journal import one_attempt
from north_lightning.rollout.stages import Timeouts, within
from north_lightning.seeds import derive_seed
from north_lightning.types import (
    NOT_SAMPLED,
    AssistantAction,
    Message,
    Prompt,
    Reward,
    Rollout,
    RolloutGroup,
    Sample,
    SamplingParams,
    Step,
    Task,
    ToolSpec,
    Turn,
)

if TYPE_CHECKING:
    from north_lightning.chat import ChatFormat

log = logging.getLogger(__name__)

SAMPLER_GRACE_S = 0.5
"""A sampler that keeps the limit of a turn itself fails by itself: a pool then knows which server is slow."""


class SampledPolicy(Policy):
    """A model behind a sampler; keeps the token record of one attempt.

    Args:
        chat: Encodes prompts and tool results, parses sampled ids.
        sampler: Token ids in, token ids out.
        params: Of one turn; ``max_tokens`` is lowered to what the context leaves, ``seed`` is set per turn.
        max_context_tokens: Longest token record.
        timeout_s: Limit of one turn.
        rollout: Where the tokens go; ``rollout.seed`` seeds the turns.
        record_routing: Also ask for the experts that the sampler visits.
    """

    def __init__(
        self,
        chat: ChatFormat,
        sampler: Sampler,
        params: SamplingParams,
        max_context_tokens: int,
        timeout_s: float,
        rollout: Rollout,
        record_routing: bool = False,
    ) -> None:
        self._chat = chat
        self._sampler = sampler
        self._params = params
        self._max_context_tokens = max_context_tokens
        self._timeout_s = timeout_s
        self._rollout = rollout
        self._record_routing = record_routing
        self._tools: Sequence[ToolSpec] = ()
        self._unparsed: list[int] = []

    def begin(self, prompt: Prompt) -> None:
        self._tools = prompt.tools
        token_ids = self._chat.encode_prompt(prompt.messages, prompt.tools)
        if len(token_ids) >= self._max_context_tokens:
            raise PromptTooLongError(
                f"max_context_tokens: expected more than the {len(token_ids)} tokens of the prompt of task "
                f"{self._rollout.task_id!r}, got {self._max_context_tokens}"
            )
        self._append_context(token_ids)

    async def act(self, messages: Sequence[Message], next_call_id: int) -> AssistantAction:
        rollout = self._rollout
        room = self._max_context_tokens - len(rollout.token_ids)
        if room < 1:
            raise AttemptEnds("context")
        params = replace(
            self._params,
            max_tokens=min(self._params.max_tokens, room),
            seed=derive_seed(rollout.seed, "turn", len(rollout.turns)),
            routed_experts_from=self._num_routed() if self._record_routing else None,
        )
        generating = self._sampler.generate(list(rollout.token_ids), params)
        what = f"the sampler, for a turn of at most {params.max_tokens} tokens"
        limit_s = self._timeout_s + SAMPLER_GRACE_S
        sample = await within(limit_s, SamplerError, what, generating, "timeouts.sample_s")
        _check_sample(sample, params.max_tokens)
        self._append_sample(sample)
        if sample.finish_reason == "length":
            raise AttemptEnds("length" if params.max_tokens == self._params.max_tokens else "context")
        self._unparsed = sample.token_ids
        action = self._chat.parse(sample.token_ids, self._tools, next_call_id)
        self._unparsed = []
        return action

    def observe(self, step: Step) -> None:
        if step.results:
            token_ids = self._chat.encode_tool_results(step.results, step.message)
        else:
            token_ids = self._chat.encode_user_message(step.message)
        if len(self._rollout.token_ids) + len(token_ids) >= self._max_context_tokens:
            raise AttemptEnds("context")
        self._append_context(token_ids)

    def reject(self, error: InvalidActionError) -> Message | None:
        self._rollout.turns[-1] = replace(self._rollout.turns[-1], error=str(error))
        if not self._unparsed:
            return None
        tokenizer = self._chat.tokenizer
        return Message("assistant", tokenizer.decode(i for i in self._unparsed if i < tokenizer.vocab_size))

    def _append_context(self, token_ids: Sequence[int]) -> None:
        rollout = self._rollout
        rollout.token_ids.extend(token_ids)
        rollout.loss_mask.extend([False] * len(token_ids))
        rollout.rollout_logprobs.extend([0.0] * len(token_ids))
        rollout.policy_versions.extend([NOT_SAMPLED] * len(token_ids))

    def _num_routed(self) -> int:
        routed_experts = self._rollout.routed_experts
        return 0 if routed_experts is None else len(routed_experts)

    def _append_sample(self, sample: Sample) -> None:
        rollout = self._rollout
        if sample.routed_experts is not None:
            # Each turn appends what is new: a token keeps the experts of the policy that read it first.
            parts = [rollout.routed_experts, sample.routed_experts]
            rollout.routed_experts = np.concatenate([part for part in parts if part is not None])
        start = len(rollout.token_ids)
        rollout.token_ids.extend(sample.token_ids)
        rollout.loss_mask.extend([True] * len(sample.token_ids))
        rollout.rollout_logprobs.extend(sample.logprobs)
        rollout.policy_versions.extend(sample.policy_versions)
        rollout.turns.append(Turn(start, len(rollout.token_ids), sample.finish_reason))


class AttemptRunner(ABC):
    """Makes attempts at tasks with some model; what the model is, is said by ``make_policy``.

    Args:
        sandboxes: Where commands run.
        harnesses: Environment of a task -> the agent loop for it.
        verifier: What scores an attempt.
        image_of: The directory a task's ``/work`` starts from.
        vary_prompts: Every group gets its own wording of the prompt (all attempts of a group share it); otherwise the
            first wording is used throughout.
        timeouts: Limits of every stage.
        max_attempts: Tries per rollout when infrastructure fails.
        retry_delay_s: Pause before the second try; doubles with every further one.
    """

    def __init__(
        self,
        sandboxes: SandboxProvider,
        harnesses: Mapping[str, Harness],
        verifier: RewardVerifier,
        image_of: Callable[[Task], Path],
        vary_prompts: bool = True,
        timeouts: Timeouts | None = None,
        max_attempts: int = 3,
        retry_delay_s: float = 0.5,
    ) -> None:
        if max_attempts < 1:
            raise ConfigError(f"max_attempts: expected at least 1, got {max_attempts}")
        self.harnesses = harnesses
        self.vary_prompts = vary_prompts
        self.timeouts = timeouts or Timeouts()
        self.max_attempts = max_attempts
        self.retry_delay_s = retry_delay_s
        self.sandboxes = sandboxes
        self.verifier = verifier
        self.retried = Counter[str]()
        """Error class -> attempts that failed with it and were begun anew."""
        self._loop = AttemptLoop(sandboxes, verifier, image_of, self.timeouts)

    @property
    @abstractmethod
    def sampling(self) -> tuple[object, ...]:
        """What decides how the model samples: part of the identity of an attempt."""

    @abstractmethod
    def make_policy(self, rollout: Rollout) -> Policy:
        """The model in one attempt, which is recorded in ``rollout``."""

    @abstractmethod
    async def close(self) -> None:
        """Release connections."""

    def keep_work(self, keep: Callable[[Task, Rollout, Path], None]) -> None:
        """From now on, ``keep`` is given what every attempt left in ``/work``, before that is verified."""
        self._loop = replace(self._loop, keep=keep)

    async def verify(self, task: Task, rollout: Rollout, workdir: Path) -> Reward:
        """The verdict on what an earlier attempt left; ``VerifierError`` or ``SandboxError`` if there is none."""
        return await replace(self._loop, keep=None).verify(task, rollout, workdir)

    async def run(self, task: Task, group_id: int, index: int, seed: int) -> Rollout:
        """One attempt. The same (seed, group_id, index) asks the sampler with the same seeds.

        What the attempt itself makes fail (``AttemptError``) comes again with its seed: then it scores 0, with the
        reason ``model_error/...``.

        Raises:
            InfrastructureError: it failed ``max_attempts`` times; the last failure.
            ConfigError: no harness for the task's environment.
            PromptTooLongError: the prompt does not fit in the context.
        """
        is_own = False
        for attempt in range(1, self.max_attempts + 1):
            try:
                return await self._attempt(task, group_id, index, seed, is_own)
            except SandboxUnavailableError:
                raise
            except InfrastructureError as error:
                log.warning(
                    "group %d attempt %d at %r, try %d of %d: %s: %s",
                    group_id, index, task.id, attempt, self.max_attempts, type(error).__name__, error,
                )  # fmt: skip
                if attempt == self.max_attempts:
                    raise
                is_own = isinstance(error, AttemptError)
                self.retried[type(error).__name__] += 1
            await asyncio.sleep(self.retry_delay_s * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    async def _attempt(self, task: Task, group_id: int, index: int, seed: int, has_failed: bool) -> Rollout:
        harness = self.harnesses.get(task.environment)
        if harness is None:
            raise ConfigError(
                f"harnesses: expected one for environment {task.environment!r} of task {task.id!r}, "
                f"got {sorted(self.harnesses)}"
            )
        rollout_seed = derive_seed(seed, "rollout", group_id, index)
        rollout = Rollout(task.id, task.environment, task.family, group_id, index, rollout_seed)
        policy = self.make_policy(rollout)
        variation = derive_seed(seed, "variation", group_id) if self.vary_prompts else 0
        with one_attempt():
            try:
                await self._loop.run(task, harness, policy, rollout, variation)
            except AttemptError as error:
                if not has_failed or not (
                    rollout.turns or any(message.role == "assistant" for message in rollout.messages)
                ):
                    raise
                log.warning("group %d attempt %d at %r scores 0: %s", group_id, index, task.id, error)
                rollout.stop_reason = "model_error"
                rollout.reward = Reward(0.0, {"reason": f"model_error/{type(error).__name__}: {error}"})
        return rollout


class RolloutRunner(AttemptRunner):
    """Samples attempts at tasks, token by token.

    Args:
        chat: The chat format of the served model.
        sampler: Token ids in, token ids out.
        sandboxes: Where commands run.
        harnesses: Environment of a task -> the agent loop for it.
        verifier: What scores an attempt.
        image_of: The directory a task's ``/work`` starts from.
        max_turn_tokens: Longest turn.
        max_context_tokens: Longest rollout, prompt and observations included.
        temperature: Of sampling.
        top_p: Of sampling.
        record_routing: Keep the experts that the sampler visits, for router replay.
        further: ``vary_prompts``, ``timeouts``, ``max_attempts``, ``retry_delay_s`` of ``AttemptRunner``.
    """

    def __init__(
        self,
        chat: ChatFormat,
        sampler: Sampler,
        sandboxes: SandboxProvider,
        harnesses: Mapping[str, Harness],
        verifier: RewardVerifier,
        image_of: Callable[[Task], Path],
        max_turn_tokens: int,
        max_context_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        record_routing: bool = False,
        **further: Any,
    ) -> None:
        super().__init__(sandboxes, harnesses, verifier, image_of, **further)
        self.record_routing = record_routing
        self.chat = chat
        self.sampler = sampler
        self.params = SamplingParams(max_turn_tokens, temperature, top_p, tuple(chat.stop_token_ids))
        self.max_context_tokens = max_context_tokens

    @property
    def sampling(self) -> tuple[object, ...]:
        return (self.params, self.max_context_tokens, self.chat.reasoning)

    def make_policy(self, rollout: Rollout) -> Policy:
        return SampledPolicy(
            self.chat,
            self.sampler.for_attempt(),
            self.params,
            self.max_context_tokens,
            self.timeouts.sample_s,
            rollout,
            self.record_routing,
        )

    async def close(self) -> None:
        await self.sampler.close()

    async def run_group(self, task: Task, group_id: int, group_size: int, seed: int) -> RolloutGroup:
        """``group_size`` concurrent attempts with their advantages, those of the ones that did not fail.

        What fails by infrastructure does so whatever its reward would have been: each baseline is that of those left.

        Raises:
            InfrastructureError: fewer than two are left; the first failure.
            AttemptError: all of those left score 0 by what they themselves made fail.
        """
        if group_size < 2:
            raise ConfigError(
                f"group_size: expected at least 2 (each attempt is the others' baseline), got {group_size}"
            )
        attempts = [asyncio.ensure_future(self._try(task, group_id, index, seed)) for index in range(group_size)]
        try:
            ended = await asyncio.gather(*attempts)
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
        rollouts = [one for one in ended if isinstance(one, Rollout)]
        failures = [one for one in ended if not isinstance(one, Rollout)]
        if len(rollouts) < 2:
            raise failures[0]
        if all(rollout.stop_reason == "model_error" for rollout in rollouts):  # no signal, and maybe a bug of ours
            raise AttemptError(f"every attempt of group {group_id}: {rollouts[0].reward}")
        if missing := [rollout.index for rollout in rollouts if rollout.reward is None]:
            raise VerifierError(f"group {group_id} (task {task.id}): attempts {missing} have no reward")
        group = RolloutGroup(group_id, task.id, task.environment, rollouts, len(failures))
        for rollout, advantage in zip(rollouts, rloo_advantages(group.rewards), strict=True):
            rollout.advantage = advantage
        return group

    async def _try(self, task: Task, group_id: int, index: int, seed: int) -> Rollout | InfrastructureError:
        try:
            return await self.run(task, group_id, index, seed)
        except SandboxUnavailableError:
            raise
        except InfrastructureError as error:
            return error


def _check_sample(sample: Sample, max_tokens: int) -> None:
    if sample.finish_reason == "abort":
        raise SamplerError("the sampler: expected a finished turn, got an aborted one")
    lengths = {len(sample.token_ids), len(sample.logprobs), len(sample.policy_versions)}
    if len(lengths) != 1 or not 1 <= len(sample.token_ids) <= max_tokens:
        raise SamplerError(
            f"the sampler: expected 1 to {max_tokens} tokens, each with a log-probability and a version, got "
            f"{len(sample.token_ids)} tokens, {len(sample.logprobs)} log-probabilities, "
            f"{len(sample.policy_versions)} versions"
        )
    if not all(map(math.isfinite, sample.logprobs)):
        raise NonFiniteError("the sampler: expected finite log-probabilities, got NaN or infinity")
