"""How attempts are made: one block of settings, the same in recording, calibration, evaluation and RL.

In: settings from a config. Out: a ``RolloutRunner`` for a served model. Picklable: it travels to the rollout process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.errors import ConfigError
from north_lightning.interfaces import Harness, RewardVerifier, SandboxProvider
from north_lightning.rollout.chat_policy import ChatRunner, ChatServer
from north_lightning.rollout.journal import JournalledSampler
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.rollout.stages import Timeouts
from north_lightning.sampling.client import VLLMSampler
from north_lightning.sampling.pool import SamplerPool
from north_lightning.sandbox.scratch import delete_stale_scratch
from north_lightning.tasks import image_of
from north_lightning.types import Count, Fraction, NotNegative, RootFileSystem, SamplingParams, Task

log = logging.getLogger(__name__)


def roots_of(task: Task) -> set[RootFileSystem]:
    """Every root file system that attempts at ``task`` and their verification need."""
    parts = [step.task for step in task.steps] or [task]
    own = {part.own_verifier.root for part in parts if part.own_verifier is not None}
    return {root for root in {task.root, *own} if root is not None}


@dataclass(frozen=True, kw_only=True)
class AttemptSettings:
    """How attempts are made, whoever acts.

    Args:
        harnesses: Environment of a task -> the agent loop for it.
        verifier: What scores an attempt.
        sandboxes: Where commands run.
        timeouts: Limits of every stage of an attempt.
    """

    harnesses: dict[str, Harness]
    verifier: RewardVerifier
    sandboxes: SandboxProvider
    timeouts: Timeouts | None = None

    def prepare(self, tasks: Iterable[Task]) -> None:
        """Refuse what cannot run, and delete what killed runs have left on this machine.

        Raises:
            SandboxUnavailableError: commands cannot be isolated here.
            ConfigError: a task has no harness, or asks for what there is not here, or a stage's limit would strike
                before the harness's or verifier's own.
        """
        tasks = list(tasks)
        self.sandboxes.check()
        delete_stale_scratch()
        missing = {task.environment for task in tasks} - self.harnesses.keys()
        if missing:
            raise ConfigError(f"harnesses: expected one for every environment, none for {', '.join(sorted(missing))}")
        for task in tasks:
            if task.unsupported:
                what = ", ".join(task.unsupported)
                raise ConfigError(f"task_sets: task {task.id} asks for what cannot be had here: {what}")
        for root in {root for task in tasks for root in roots_of(task)}:
            self.sandboxes.check_root(root)
        self._check_limits(tasks)

    def _check_limits(self, tasks: Sequence[Task]) -> None:
        """A command or test run that is too slow is the model's failure; a stage that is too slow is infrastructure's.

        The first must strike before the second, or slow attempts are dropped instead of scored.
        """
        limits = self.timeouts or Timeouts()
        nested: list[tuple[str, float | None, str, object, str]] = [
            ("open_s", self.sandboxes.open_limit_s, "sandboxes", self.sandboxes, "making one ready")
        ]
        for environment in sorted({task.environment for task in tasks}):
            harness, path = self.harnesses[environment], f"harnesses.{environment}"
            nested.append(("act_s", harness.action_limit_s, path, harness, "a command"))
            nested.append(("attempt_s", harness.attempt_limit_s, path, harness, "all commands of an attempt"))
        for key, own_s, path, part, what in nested:
            if own_s is not None and own_s >= getattr(limits, key):
                raise ConfigError(
                    f"timeouts.{key}: expected more than the {own_s:g} s that {path} ({type(part).__name__}) gives "
                    f"{what}, got {getattr(limits, key):g}"
                )
        for task in (part for whole in tasks for part in ([step.task for step in whole.steps] or [whole])):
            self.verifier.check_task(task)
            own_s, whole_s = self.verifier.limit_s(task), limits.of_verifying(task)
            if own_s is not None and own_s >= whole_s:
                beside = f" (and {task.verifier_timeout_s:g} of the task)" if task.verifier_timeout_s else ""
                raise ConfigError(
                    f"timeouts.verify_s: expected more than the {own_s:g} s that verifier "
                    f"({type(self.verifier).__name__}) gives the tests of task {task.id!r}, got "
                    f"{limits.verify_s:g}{beside}"
                )


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(AttemptSettings):
    """How a model's attempts are made.

    Args:
        harnesses: Environment of a task -> the agent loop for it.
        verifier: What scores an attempt.
        sandboxes: Where commands run.
        timeouts: Limits of every stage of an attempt.
        max_turn_tokens: Longest turn, in tokens.
        max_context_tokens: Longest rollout, prompt and observations included.
        temperature: Of sampling.
        top_p: Of sampling.
        reasoning: Whether the model thinks before it acts; as in supervised fine-tuning.
    """

    max_turn_tokens: Count
    max_context_tokens: Count
    temperature: NotNegative = 1.0
    top_p: Fraction = 1.0
    reasoning: bool = False

    def __post_init__(self) -> None:
        if self.max_turn_tokens > self.max_context_tokens:
            raise ConfigError(
                f"rollouts.max_turn_tokens: expected at most max_context_tokens, {self.max_context_tokens}, got "
                f"{self.max_turn_tokens}"
            )

    def fitting(
        self, tasks: Sequence[Task], tokenizer_dir: Path, consequence: str = "these tasks are left out"
    ) -> list[Task]:
        """The tasks whose prompt leaves room for a turn; the others are said once, now and not when their turn comes.

        Raises:
            ConfigError: an environment is left without tasks.
        """
        chat = ChatFormat(NorthTokenizer.load(tokenizer_dir), self.reasoning)
        prompts = {task.id: self.harnesses[task.environment].prompt(task) for task in tasks}
        lengths = {name: len(chat.encode_prompt(one.messages, one.tools)) for name, one in prompts.items()}
        fit = [task for task in tasks if lengths[task.id] < self.max_context_tokens]
        if len(fit) == len(tasks):
            return fit
        longest = max(lengths, key=lambda name: lengths[name])
        said = (
            f"rollouts.max_context_tokens: expected more than the prompts of {len(tasks) - len(fit)} of {len(tasks)} "
            f"tasks, such as {longest} with {lengths[longest]} tokens, got {self.max_context_tokens}"
        )
        if {task.environment for task in fit} != {task.environment for task in tasks}:
            raise ConfigError(f"{said}: raise it, or leave those tasks out of task_sets")
        log.warning("%s; %s", said, consequence)
        return fit

    def check_server(self, max_model_len: int) -> None:
        """Refuse a server whose context is too short: it would fail long rollouts only, and bias training to short."""
        if self.max_context_tokens > max_model_len:
            raise ConfigError(
                f"rollouts.max_context_tokens: expected at most the sidecar's max_model_len, {max_model_len}, "
                f"got {self.max_context_tokens}"
            )

    def make_runner(
        self,
        tokenizer_dir: Path,
        urls: str | Sequence[str],
        record_routing: bool = False,
        salt_by_version: bool = False,
    ) -> RolloutRunner:
        """A runner for the model that the vLLM server at this URL, or each of several, serves; with its tokenizer."""
        servers = enumerate([urls] if isinstance(urls, str) else urls)
        limit_s = (self.timeouts or Timeouts()).sample_s
        samplers = [
            JournalledSampler(VLLMSampler(url, limit_s, salt_by_version=salt_by_version), index)
            for index, url in servers
        ]
        return RolloutRunner(
            ChatFormat(NorthTokenizer.load(tokenizer_dir), self.reasoning),
            samplers[0] if len(samplers) == 1 else SamplerPool(samplers),
            self.sandboxes,
            self.harnesses,
            self.verifier,
            image_of,
            self.max_turn_tokens,
            self.max_context_tokens,
            self.temperature,
            self.top_p,
            timeouts=self.timeouts,
            record_routing=record_routing,
        )

    def check_without_checkpoint(self) -> None:
        """Refuse what means nothing to a chat server."""
        if self.reasoning:
            raise ConfigError("rollouts.reasoning: expected false for a chat server, whose template decides, got true")

    def make_chat_runner(self, server: ChatServer) -> ChatRunner:
        """A runner for the model behind an OpenAI-compatible server, which thinks as its own template says."""
        return ChatRunner(
            server,
            SamplingParams(self.max_turn_tokens, self.temperature, self.top_p),
            self.max_context_tokens,
            sandboxes=self.sandboxes,
            harnesses=self.harnesses,
            verifier=self.verifier,
            image_of=image_of,
            timeouts=self.timeouts,
        )
