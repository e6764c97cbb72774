"""Everything that is replaceable, on one page.

Each class is chosen in YAML by ``class_path`` and may live in any importable module (``./plugins`` is on the path). A
plug-in needs only this module, ``types`` and ``errors``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from north_lightning.errors import ConfigError
from north_lightning.types import (
    AssistantAction,
    CommandResult,
    Conversation,
    Grading,
    Prompt,
    Reward,
    Rollout,
    RolloutGroup,
    RootFileSystem,
    Sample,
    SamplingParams,
    Step,
    Task,
)

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from torch import Tensor

    from north_lightning.errors import InvalidActionError


# ---- SFT data ------------------------------------------------------------------------------------------------------


class ConversationImporter(ABC):
    """Reads one foreign data format.

    ``strict`` says that a key that is not understood is an error; without, it is counted in ``account``.
    """

    strict: bool = False

    @abstractmethod
    def convert(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation in one decoded record; ``DataError`` names the JSON path, expected and got."""

    def account(self) -> dict[str, dict[str, int]]:
        """What was met so far, for filter.json: kind of finding -> finding -> count."""
        return {}


class ConversationFilter(ABC):
    """Finds one kind of fault in samples. Looks and repairs nothing."""

    reason: str
    """What dropped samples are counted under, in snake case."""
    remembers: ClassVar[bool] = False
    """Whether a sample's fault may depend on the samples before it."""

    @abstractmethod
    def find_fault(self, sample: Conversation) -> str | None:
        """Where and what the fault is, for people; None for a sample that has none."""


class ConversationVariation(ABC):
    """Tells the same trajectory in other words, so that a model reads its prompt instead of replaying one."""

    @abstractmethod
    def vary(self, sample: Conversation, seed: int) -> Conversation | None:
        """The sample retold, the same for the same seed; None for a sample this variation does not know.

        ``RetellingError`` for one that it knows and cannot retell; the reason is counted and the sample stays.
        """


# ---- loss ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PolicyLossInputs:
    """Aligned per-token tensors of one (micro-)batch."""

    trainer_logprobs: Tensor  # [T] float32, with gradient
    rollout_logprobs: Tensor  # [T] float32
    advantages: Tensor  # [T] float32
    loss_mask: Tensor  # [T] bool
    num_trained_tokens: int  # of the whole optimizer step: the denominator
    entropy: Tensor | None = None  # [T], without gradient; for metrics
    sequence_ids: Tensor | None = None  # [T] int64: which rollout of the row a token belongs to


@dataclass(frozen=True, slots=True)
class PolicyLossOutputs:
    loss: Tensor  # scalar, to be minimised; already divided by ``num_trained_tokens``
    metrics: Mapping[str, float] = field(default_factory=dict)


class PolicyLoss(ABC):
    """A reinforcement-learning objective over tokens.

    ``is_zero_without_advantage`` says that a token with advantage 0 adds nothing to loss and gradient: such rollouts
    are then not computed. A loss with a KL or entropy term leaves it false.
    ``corrects_mismatch`` says that the loss weighs tokens by trainer over sampler already: a second weight on top
    counts the mismatch twice, and whatever would put one there refuses such a loss.
    ``needs_whole_sequences`` says that a token's loss depends on the others of its rollout: it is refused where several
    processes share a row.
    """

    is_zero_without_advantage: ClassVar[bool] = False
    corrects_mismatch: ClassVar[bool] = False
    needs_whole_sequences: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        """Raise ``ValueError`` on non-finite inputs under the mask."""


# ---- queue ---------------------------------------------------------------------------------------------------------


class RolloutQueue(ABC):
    """Between producer and trainer. Holds groups from dispatch until trained or dropped; each ends exactly once.

    Life of a group: ``admit`` (a slot is charged, ids count up from 0) -> ``complete`` or ``drop`` -> ``take`` ->
    ``release`` (the slot is free again). Calls come from several threads; none of them blocks.

    ``groups_per_batch`` is what the queue assumes of a step, if it does. ``head_timeout_s`` is how long it lets others
    wait for a group, ``head_requeues`` how often that group is then begun again; None where it waits for ever.
    """

    groups_per_batch: int | None = None
    head_timeout_s: float | None = None
    head_requeues: int = 0

    def max_policy_lag(self, push_every_k: int) -> int | None:
        """The most optimizer steps that the weights behind a trained token are old; None where no bound exists."""
        raise ConfigError(
            f"max_policy_lag: expected a number of optimizer steps for WeightSyncCallback, got none: the queue "
            f"{type(self).__name__} does not say what bounds the age of its groups (its own max_policy_lag would)"
        )

    @abstractmethod
    def admit(self) -> int | None:
        """The id of a new group, or of one to be begun anew; None while every slot is charged."""

    @abstractmethod
    def complete(self, group: RolloutGroup) -> None:
        """Hand in a finished group; ``QueueError`` if it was not admitted or has ended already."""

    @abstractmethod
    def drop(self, group_id: int, reason: str) -> None:
        """Give a group up, visibly; its slot is free at once."""

    @abstractmethod
    def take(self, num_groups: int) -> list[RolloutGroup] | None:
        """Exactly ``num_groups`` completed groups in this queue's order, or None while fewer may be taken."""

    @abstractmethod
    def release(self, group_ids: Iterable[int]) -> None:
        """The groups were trained: free their slots."""

    @abstractmethod
    def end_of(self, group_id: int) -> str | None:
        """The ledger: ``"trained"``, the reason the group was dropped for, or None while it has not ended."""

    def interrupted(self) -> list[int]:
        """Groups that nobody shall work on any longer: given up, or to be begun anew (``admit`` hands them out again).
        Each is named once; a queue that never gives up by itself has none."""
        return []

    def close(self) -> None:  # noqa: B027
        """Training has ended: let go of what the queue holds outside of this process."""

    @abstractmethod
    def stats(self) -> Mapping[str, float]:
        """Numbers to log: depth, in flight, trained, and ``dropped/<reason>``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Primitives only; what ``load_state_dict`` needs so that every group still ends exactly once."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# ---- curriculum ----------------------------------------------------------------------------------------------------


class TaskCurriculum(ABC):
    """How often each task is worth trying, from how it went. Shares of environments are not its concern."""

    @abstractmethod
    def begin(self, tasks: Sequence[Task]) -> None:
        """All tasks of the run; ``metadata["pass_rate"]`` is what calibration found."""

    @abstractmethod
    def weight(self, task_id: str) -> float:
        """Of the epochs to come, the share that the task is part of: above 0, at most 1."""

    @abstractmethod
    def observe(self, group: RolloutGroup) -> None:
        """A group was trained."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Primitives only, for ``load_state_dict`` after ``begin``."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# ---- sandbox -------------------------------------------------------------------------------------------------------


class Sandbox(ABC):
    """One isolated file system and its processes, for one attempt or one verification. Work directory: ``/work``."""

    @abstractmethod
    async def spawn(self, argv: Sequence[str]) -> Process:
        """Start a long-lived program inside, with pipes on stdin and stdout (stderr joins stdout)."""

    @abstractmethod
    async def run(self, command: str, timeout_s: float) -> CommandResult:
        """One ``bash -c`` in a fresh process; killed at the time-out with everything it started."""

    @abstractmethod
    async def snapshot(self, destination: Path) -> None:
        """End every process, then copy ``/work`` to ``destination``: links as links, special files left out.

        ``TreeTooLargeError`` if what the attempt left could not be the image of a fresh sandbox.
        """

    def check_intact(self) -> None:  # noqa: B027
        """``SandboxError`` if the machine ended a process inside for a reason that is not the sandbox's own limits."""

    @abstractmethod
    async def close(self) -> None:
        """End every process and delete everything. May be called twice."""


class SandboxProvider(ABC):
    """Makes sandboxes. Picklable: it travels to the rollout process."""

    without_effect: ClassVar[Sequence[str]] = ()
    """Settings that change no attempt's outcome: a recorded attempt is found again under others."""

    @property
    def open_limit_s(self) -> float | None:
        """Seconds that this provider itself gives what may come before a sandbox opens; None: not limited here."""
        return None

    @abstractmethod
    def check(self) -> None:
        """``SandboxUnavailableError`` with the remedy, if commands cannot be isolated here."""

    def check_root(self, root: RootFileSystem) -> None:
        """``ConfigError`` if sandboxes cannot be opened on this root file system here."""
        raise ConfigError(f"expected tasks that bring no image, got {root.image}: {type(self).__name__} has no images")

    @abstractmethod
    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> Sandbox:
        """A sandbox whose ``/work`` starts as a copy of the directory ``image``; mounts: path inside -> path here.

        ``root`` takes the place of this provider's own root file system; without an ``image``, ``/work`` starts as a
        copy of what ``root`` holds in its work directory.
        """


# ---- harness -------------------------------------------------------------------------------------------------------


class HarnessSession(ABC):
    """One attempt at one task through one harness."""

    @abstractmethod
    async def act(self, action: AssistantAction) -> Step:
        """Carry out one validated action; ``InvalidActionError`` where the harness forbids it (two calls, ...)."""

    async def reject(self, error: InvalidActionError) -> Step | None:
        """The turn was no valid action: what the model is told, or None to end the attempt with reward 0.

        The rejected turn stays in the context of a model that is trained: its tokens were sampled.
        """
        return None

    @abstractmethod
    async def close(self) -> None:
        """End what the session started (not the sandbox). May be called twice."""


class Harness(ABC):
    """Prompt, tools, observations and end of an agent loop. Picklable, stateless: sessions hold the state."""

    name: str
    forgets_rejected_turns: bool = False
    """Whether a server is not shown again a turn that was rejected (published behaviour of some agents)."""

    @property
    def attempt_limit_s(self) -> float | None:
        """Seconds that all commands of an attempt may take before the harness ends it; None: not limited here."""
        return None

    @property
    def action_limit_s(self) -> float | None:
        """Seconds that one command of an action may take before the harness itself ends it; None: not limited here."""
        return None

    @abstractmethod
    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        """The opening messages and tools; ``variation`` picks wording, so that a model reads instead of replaying."""

    @abstractmethod
    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession: ...


# ---- reward --------------------------------------------------------------------------------------------------------


class RewardVerifier(ABC):
    """Scores one finished attempt. Picklable: it travels to the rollout process.

    ``workdir`` is a snapshot of the attempt's ``/work``, every agent process gone; ``sandboxes`` opens fresh sandboxes
    to grade in. Raise to say "not graded" (an infrastructure failure, never a 0).
    """

    grading: Grading = "strict"

    def grader(self, task: Task) -> str:
        """Name and version of what decides the verdict on ``task``: recorded, shown, and graded again by another."""
        return type(self).__name__

    @property
    def reward_range(self) -> tuple[float, float]:
        """The least and the greatest value; any other is an error."""
        return (0.0, 1.0)

    def limit_s(self, task: Task) -> float | None:
        """Seconds after which this verifier itself ends the grading of ``task``; None: not limited here."""
        return None

    def check_task(self, task: Task) -> None:  # noqa: B027
        """``ConfigError`` if ``task`` asks for what this verifier does not give; called before a run."""

    @abstractmethod
    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward: ...


# ---- sampler -------------------------------------------------------------------------------------------------------


class Sampler(ABC):
    """Token ids in, token ids out."""

    @abstractmethod
    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        """``SamplerError`` when no answer can be had."""

    def for_attempt(self) -> Sampler:
        """The sampler of all turns of one attempt, never closed; of several servers, it stays with one."""
        return self

    async def close(self) -> None:  # noqa: B027
        """Release connections."""


class WeightTransport(ABC):
    """Carries the trainer's weights to a running sampler. Used from one thread of the trainer."""

    @abstractmethod
    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send HF-named tensors, in flight requests kept; return when the sampler has confirmed ``version``.

        ``WeightPushError`` otherwise: the sampler must not be used until a push succeeds.
        """
