"""The nouns every part shares: conversations, tasks, rollouts, rewards, batches.

Plain data; nothing here imports another part of the package. Everything except the tensor batches is picklable and
free of torch at run time, because rollouts are produced in a child process that never imports it.

Alignment, once and for all: every per-token list is aligned with ``token_ids``. ``loss_mask[t]`` says that token ``t``
is trained, ``rollout_logprobs[t]`` is the sampler's log-probability *of* token ``t`` given the tokens before it, and
``policy_versions[t]`` the policy that produced it. ``routed_experts[t]`` are the experts that the sampler visited when
it *read* token ``t``, so the last tokens may have none. The first token of a document is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan, Strict

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

NOT_SAMPLED = -1
"""``policy_versions`` entry of a token that no policy produced (prompt, observation)."""

Count = Annotated[int, Strict(), Ge(1)]
"""A whole number of at least 1; like the four below, checked where a config gives it."""
Whole = Annotated[int, Strict(), Ge(0)]
Positive = Annotated[float, Strict(), AllowInfNan(False), Gt(0)]
NotNegative = Annotated[float, Strict(), AllowInfNan(False), Ge(0)]
Fraction = Annotated[float, Strict(), Ge(0), Le(1)]

Grading = Literal["official", "strict"]
"""Whether a benchmark's verdict is its own grader's, or fails what no honest attempt does, too."""
Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort"]
StopReason = Literal["finished", "invalid_action", "max_turns", "length", "context", "loop", "timeout", "model_error"]


# ---- conversations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the model sees it; ``parameters`` is a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. ``id`` is a digit string, counted from "0" over the whole conversation."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResult:
    tool_call_id: str
    content: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. An assistant's has content or tool calls, not both; a tool's answers ``tool_call_id``."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    trained: bool = True  # whether an assistant's turn is learned


@dataclass(frozen=True, slots=True)
class AssistantAction:
    """What a model said in one turn, parsed and validated: either ``tool_calls`` or ``content``."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a harness puts before the model for a task."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A harness's answer to one turn: what to show the model, and whether the attempt is over.

    ``results`` answer the calls of the turn; ``message`` is said as the user (a harness without tools, or a turn that
    was no valid action). One of them, unless ``done``; both where the next step of a task begins.
    """

    results: tuple[ToolResult, ...] = ()
    message: str = ""
    done: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sample for SFT; the labels say where it came from and are empty where unknown."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    source: str = ""
    harness: str = ""
    environment: str = ""
    repo: str = ""  # "owner/name"
    task_id: str = ""
    verified: bool | None = None  # a verifier's verdict on the result; None where nobody checked


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A conversation as ids, for SFT."""

    token_ids: list[int]  # [T]
    loss_mask: list[bool]  # [T]
    source: str = ""


# ---- tasks and sandboxes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a verifier in an environment of its own sees of an attempt: ``path`` is relative to ``/work``, and "." all
    of it; ``exclude`` are patterns of GNU tar."""

    path: str
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RootFileSystem:
    """What a task wants its sandboxes to see beside ``/work``: an image by its name, or a Dockerfile by its path.

    ``/work`` is seen at ``workdir`` too, and begins with what the image holds there; None is the image's own WORKDIR.
    """

    image: str | Path
    workdir: str | None = None


@dataclass(frozen=True, slots=True)
class VerifierEnvironment:
    """The environment of a verifier that does not share the attempt's: its ``/work`` is as the task gives it, with the
    ``artifacts`` of the attempt put in place. ``brings_tests`` says that ``root`` holds ``/tests`` already."""

    artifacts: tuple[Artifact, ...] = ()
    root: RootFileSystem | None = None
    brings_tests: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a task's own, run in the attempt's sandbox; its failure counts only where it is said to."""

    command: str
    timeout_s: float
    retries: int = 0
    interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TaskStep:
    """One step of a task that has several, in the sandbox that the step before left.

    ``task`` is the step as a task of its own: instruction, tests, limits. ``directory`` may hold ``workdir/``, which is
    laid over ``/work`` before the step, and whose ``setup.sh`` is run; ``healthcheck`` must succeed after that. An
    attempt ends after a step that the tests give less than ``min_reward`` (one number: of ``reward``).
    """

    name: str
    directory: Path
    task: Task
    min_reward: float | Mapping[str, float] | None = None
    healthcheck: Command | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One Harbor task directory, read.

    ``environment`` names the kind of work (``terminal``, ``swe``) and so the harness; ``family`` the generator or
    benchmark it came from; ``max_turns`` is the step budget of an attempt; ``verifier_timeout_s`` limits one run of its
    tests (None: the verifier's own limit), ``agent_timeout_s`` the commands of an attempt together (what the sampler
    takes is not the model's doing and does not count). ``verifier_env`` is set for ``test.sh``;
    ``${NAME}`` and ``${NAME:-default}`` are not filled in yet. ``root`` is the root
    file system that the task asks for (None: any). ``collect`` runs after the attempt, whether it succeeds or not.
    ``own_verifier`` is set where the tests do not run in the attempt's environment. ``reward_strategy`` makes one
    reward of those of the ``steps``; ``step_tests`` are a step's own, laid over ``tests/``. ``unsupported`` names what
    the directory asks for and nothing here can give: such a task loads, and is refused before it runs.
    """

    id: str
    environment: str
    family: str
    instruction: str
    directory: Path
    max_turns: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    verifier_timeout_s: float | None = None
    agent_timeout_s: float | None = None
    verifier_env: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[TaskStep, ...] = ()
    reward_strategy: Literal["mean", "final"] = "mean"
    step_tests: Path | None = None
    collect: tuple[Command, ...] = ()
    own_verifier: VerifierEnvironment | None = None
    root: RootFileSystem | None = None
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandResult:
    output: str  # stdout and stderr, interleaved, capped by the sandbox
    exit_code: int
    timed_out: bool = False


# ---- sampling and rollouts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    routed_experts_from: int | None = None  # also return the experts of all tokens from this one on; None: of none


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation, token by token; the stop token is included."""

    token_ids: list[int]  # [T]
    logprobs: list[float]  # [T], of the sampled tokens, after temperature and top-p
    policy_versions: list[int]  # [T]
    finish_reason: FinishReason
    routed_experts: ndarray | None = field(default=None, compare=False)
    """[R, L, K] integers where asked for: of the prompt's tokens from ``routed_experts_from`` on and of the generated
    ones, without the very last, which the model has not read. L counts all layers; dense ones have no meaning."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One sampled turn: tokens ``start:end`` of the rollout; ``error`` says why it was not a valid action."""

    start: int
    end: int
    finish_reason: FinishReason
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """A verifier's verdict: ``value`` is trained on, ``solved`` is counted in pass rates; ``details`` is for people.

    Left out, ``solved`` is whether the value is full marks (1 or more). A verifier that scales another's verdict uses
    ``dataclasses.replace(verdict, value=...)``, which keeps ``solved`` as it was. ``numbers`` is what the tests said,
    by name, where they say more than pass or fail; a task of several steps compares them with its ``min_reward``.
    ``unended`` says that the tests did not end, which is the attempt's doing unless they never end.
    """

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)
    solved: bool | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    unended: bool = False

    def __post_init__(self) -> None:
        if self.solved is None:
            is_number = isinstance(self.value, int | float)  # anything else is refused where it is used
            object.__setattr__(self, "solved", is_number and self.value >= 1.0)


@dataclass(slots=True)
class Rollout:
    """One attempt at one task. Every token with ``loss_mask`` true is exactly the token that was sampled."""

    task_id: str
    environment: str
    family: str
    group_id: int
    index: int  # within the group
    seed: int
    token_ids: list[int] = field(default_factory=list)  # [T]
    loss_mask: list[bool] = field(default_factory=list)  # [T]
    rollout_logprobs: list[float] = field(default_factory=list)  # [T], 0.0 where not sampled
    policy_versions: list[int] = field(default_factory=list)  # [T], NOT_SAMPLED where not sampled
    routed_experts: ndarray | None = field(default=None, compare=False)  # [R <= T, L, K], of the first R tokens
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # for people; never re-encoded
    stop_reason: StopReason = "finished"
    reward: Reward | None = None
    advantage: float = 0.0
    duration_s: float = 0.0

    @property
    def num_sampled_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(slots=True)
class RolloutGroup:
    """All attempts at one task that share a baseline; ``num_lost`` more failed by infrastructure."""

    group_id: int
    task_id: str
    environment: str
    rollouts: list[Rollout]
    num_lost: int = 0

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward.value for rollout in self.rollouts if rollout.reward is not None]


# ---- tensors for the trainer ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class PackedBatch:
    """Documents laid end to end in one row; attention never crosses ``cu_seqlens`` boundaries."""

    token_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [N + 1] int32, from 0 to T
    loss_mask: Tensor  # [T] bool, False at the first token of every document
    num_trained_tokens: int  # of the whole optimizer step's batch: the denominator of the loss
    sources: list[str] = field(default_factory=list)  # [N]
    num_documents: int = 0  # of the whole optimizer step's batch: the denominator of a mean over conversations
    trained_per_document: Tensor | None = None  # [N] int64, wherever the document's tokens are computed


@dataclass(slots=True)
class RolloutBatch(PackedBatch):
    """A packed batch of rollouts. Rollouts with zero advantage may be left out of the tensors; they count in
    ``num_trained_tokens``."""

    rollout_logprobs: Tensor = None  # type: ignore[assignment]  # [T] float32
    advantages: Tensor = None  # type: ignore[assignment]  # [T] float32
    policy_versions: Tensor = None  # type: ignore[assignment]  # [T] int64
    routed_experts: Tensor | None = None  # [T, L, K] int16, -1 where the sampler's choice is not known
    groups: list[RolloutGroup] = field(default_factory=list)  # everything the batch consumed, for metrics
