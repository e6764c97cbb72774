"""What a ``RewardVerifier`` promises, as checks on real attempts with real sandboxes.

In: a function that makes the plug-in. Out: nothing, or ``Broken``. The attempts are at two generated tasks; none is
sampled from a model. What a reward should *be* is its author's business; here it must be one.
"""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from north_lightning.conformance.child import Broken
from north_lightning.errors import InfrastructureError, NorthError, SandboxError
from north_lightning.interfaces import RewardVerifier, Sandbox, SandboxProvider
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.sandbox.scratch import Scratch
from north_lightning.tasks import image_of, load_task, solution_steps, write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Message, Reward, Rollout, RootFileSystem, StopReason, Task, ToolCall, Turn
from north_lightning.verifiers.checked import checked_reward

T = TypeVar("T")
Make = Callable[[], RewardVerifier]

NUM_AT_ONCE = 8
MAX_BLOCKED_S = 1.0
GRACE_S = 5.0


@dataclass(frozen=True)
class Attempt:
    name: str
    task: Task
    rollout: Rollout
    workdir: Path


@contextmanager
def attempts() -> Iterator[list[Attempt]]:
    """Attempts of every kind, in a directory that is gone afterwards."""
    with Scratch("task") as root:
        software = load_task(write_task(software_task(0, 0, "train"), root / "tasks"))
        terminal = load_task(write_task(terminal_task(0, 0, "train"), root / "tasks"))
        yield [
            Attempt("a solved attempt", software, _rollout(software, 3), _solved(software, root / "solved")),
            Attempt("an unsolved attempt", software, _rollout(software, 1), _copy(software, root / "unsolved")),
            Attempt("an attempt that said nothing", terminal, _rollout(terminal, 0), _copy(terminal, root / "nothing")),
            Attempt(
                "an attempt that was cut off",
                terminal,
                _rollout(terminal, 40, "length", "not valid JSON"),
                _strange(_copy(terminal, root / "strange")),
            ),
        ]


def _rollout(task: Task, num_turns: int, stop_reason: StopReason = "finished", error: str | None = None) -> Rollout:
    rollout = Rollout(task.id, task.environment, task.family, 0, 0, 0, stop_reason=stop_reason)
    rollout.messages.append(Message("user", task.instruction))
    for number in range(num_turns):
        start = len(rollout.token_ids)
        rollout.token_ids += [number % 7] * 20
        rollout.loss_mask += [True] * 20
        rollout.rollout_logprobs += [-0.5] * 20
        rollout.policy_versions += [0] * 20
        rollout.turns.append(Turn(start, start + 20, "stop", error))
        call = ToolCall(str(number), "bash", {"command": f"echo {number}"})
        rollout.messages.append(Message("assistant", tool_calls=(call,)))
        rollout.messages.append(Message("tool", "\0\ufffd" * 1000 if error else str(number), tool_call_id=call.id))
    return rollout


def _copy(task: Task, workdir: Path) -> Path:
    shutil.copytree(image_of(task), workdir, symlinks=True)
    return workdir


def _solved(task: Task, workdir: Path) -> Path:
    edit = next(arguments for _, arguments in solution_steps(task) if "old_str" in arguments)
    file = _copy(task, workdir) / Path(edit["path"]).relative_to("/work")
    file.write_text(file.read_text().replace(edit["old_str"], edit["new_str"]))
    return workdir


def _strange(workdir: Path) -> Path:
    """Files that programs leave: names and text that are not UTF-8, links to nowhere and to outside, a FIFO."""
    (workdir / os.fsdecode(b"name-\xff")).write_bytes(b"\xff\xfe\x00")
    (workdir / "nowhere").symlink_to("missing")
    (workdir / "outside").symlink_to("/etc/hostname")
    os.mkfifo(workdir / "pipe")
    return workdir


# ---- sandboxes -----------------------------------------------------------------------------------------------------


@dataclass
class Counted(SandboxProvider):
    """Real sandboxes; remembers those that were not closed."""

    provider: SandboxProvider = field(default_factory=BubblewrapProvider)
    open_now: set[Sandbox] = field(default_factory=set)

    def check(self) -> None:
        self.provider.check()

    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> Sandbox:
        sandbox = await self.provider.open(image, read_only, writable, root)
        close = sandbox.close

        async def closing() -> None:
            self.open_now.discard(sandbox)
            await close()

        sandbox.close = closing  # type: ignore[method-assign]
        self.open_now.add(sandbox)
        return sandbox


@dataclass
class Unavailable(SandboxProvider):
    """Refuses every sandbox, or never answers."""

    hangs: bool = False
    num_asked: int = 0

    def check(self) -> None: ...

    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> Sandbox:
        self.num_asked += 1
        if self.hangs:
            await asyncio.sleep(3600)
        raise SandboxError("no sandbox for now")


# ---- checks --------------------------------------------------------------------------------------------------------


async def verdict(
    verifier: RewardVerifier, attempt: Attempt, sandboxes: SandboxProvider | None = None, raw: bool = False
) -> Reward:
    """Checked; what the verifier raises as not graded is ``Broken`` here, unless it is asked for ``raw``."""
    answer = verifier.verify(attempt.task, attempt.rollout, attempt.workdir, sandboxes or BubblewrapProvider())
    if not asyncio.iscoroutine(answer):
        raise Broken(f"verify: expected 'async def', got a function that returns {type(answer).__name__}")
    try:
        return checked_reward(await answer, verifier, "verify")
    except InfrastructureError as error:
        if raw:
            raise
        raise Broken(f"{attempt.name}: {error}") from error


def returns_a_finite_reward(make: Make) -> None:
    """Of every attempt: a ``Reward``, finite, whose details can leave the process."""
    with attempts() as all_of_them:
        for attempt in all_of_them:
            reward = asyncio.run(verdict(make(), attempt))
            if not isinstance(reward.solved, bool):
                raise Broken(f"{attempt.name}: expected true or false as solved, got {reward.solved!r}")
            try:
                pickle.dumps(reward)
            except Exception as error:
                raise Broken(f"{attempt.name}: expected details that can be pickled: {error}") from error


def reports_a_missing_sandbox(make: Make) -> None:
    """A sandbox that cannot be had is an ``InfrastructureError``, never a reward."""
    with attempts() as (attempt, *_):
        refusing = Unavailable()
        try:
            reward = asyncio.run(verdict(make(), attempt, refusing, raw=True))
        except InfrastructureError:
            return
        except NorthError as error:
            raise Broken(
                f"expected the SandboxError or a VerifierError, got {type(error).__name__}: {error}"
            ) from error
        if refusing.num_asked:
            raise Broken(f"a sandbox could not be opened; expected an error, got the reward {reward.value}")


def can_be_cancelled(make: Make) -> None:
    """A verification that is given up ends."""

    async def cancelled() -> bool:
        with attempts() as (attempt, *_):
            waiting = asyncio.ensure_future(
                make().verify(attempt.task, attempt.rollout, attempt.workdir, Unavailable(hangs=True))
            )
            await asyncio.wait({waiting}, timeout=0.2)
            waiting.cancel()
            done, _ = await asyncio.wait({waiting}, timeout=GRACE_S)
            return bool(done)

    loop = asyncio.new_event_loop()  # not asyncio.run: it would wait for what does not end
    if not loop.run_until_complete(cancelled()):
        raise Broken(f"expected an end within {GRACE_S:g} s of being cancelled")


def leaves_the_event_loop_free(make: Make) -> None:
    """Other attempts go on meanwhile: no blocking call in ``verify``."""

    async def longest_pause() -> float:
        loop = asyncio.get_running_loop()
        pauses = [0.0]

        async def beat() -> None:
            while True:
                before = loop.time()
                await asyncio.sleep(0.01)
                pauses.append(loop.time() - before)

        beating = asyncio.ensure_future(beat())
        with attempts() as all_of_them:
            await asyncio.sleep(0.05)
            pauses[:] = [0.0]
            for attempt in all_of_them:
                await verdict(verifier, attempt)
            await asyncio.sleep(0.05)
        beating.cancel()
        return max(pauses)

    verifier = make()
    with attempts() as (attempt, *_):
        asyncio.run(verdict(verifier, attempt))  # the first use may load and prepare
    pause = asyncio.run(longest_pause())
    if pause > MAX_BLOCKED_S:
        raise Broken(f"blocked the event loop for {pause:.1f} s: use asyncio.to_thread, or a sandbox")


def is_deterministic(make: Make) -> None:
    """The same attempt, the same reward; from another object of the class too."""
    with attempts() as all_of_them:
        for attempt in all_of_them:
            first, second = make(), make()
            values = [asyncio.run(verdict(verifier, attempt)).value for verifier in (first, second, first)]
            if len(set(values)) > 1:
                raise Broken(f"{attempt.name}: expected one value, got {values}")


def works_concurrently(make: Make) -> None:
    """Attempts that are verified at once do not mix."""

    async def at_once(verifier: RewardVerifier, all_of_them: list[Attempt]) -> list[float]:
        rewards = await asyncio.gather(*(verdict(verifier, attempt) for attempt in all_of_them))
        return [reward.value for reward in rewards]

    with attempts() as all_of_them:
        alone = [asyncio.run(verdict(make(), attempt)).value for attempt in all_of_them]
        repeats = -(-NUM_AT_ONCE // len(all_of_them))
        together = asyncio.run(at_once(make(), all_of_them * repeats))
    if together != alone * repeats:
        raise Broken(f"alone: {alone}; {len(together)} at once: {together}")


def changes_nothing(make: Make) -> None:
    """Task, rollout and the attempt's files stay as they are."""
    with attempts() as all_of_them:
        for attempt in all_of_them:
            rollout, files = copy.deepcopy(attempt.rollout), _digest(attempt.workdir)
            asyncio.run(verdict(make(), attempt))
            if attempt.rollout != rollout:
                raise Broken(f"{attempt.name}: changed the rollout")
            if _digest(attempt.workdir) != files:
                raise Broken(f"{attempt.name}: changed the files the attempt left; copy them, or open a sandbox")


def closes_its_sandboxes(make: Make) -> None:
    """Every sandbox that was opened is closed."""
    sandboxes = Counted()
    with attempts() as all_of_them:
        for attempt in all_of_them:
            asyncio.run(verdict(make(), attempt, sandboxes))
    if sandboxes.open_now:
        raise Broken(f"left {len(sandboxes.open_now)} sandboxes open")


def travels(make: Make) -> None:
    """To the rollout process: a pickled copy gives the same rewards."""
    verifier = make()
    copied = pickle.loads(pickle.dumps(verifier))
    with attempts() as (*some, _, _):
        for attempt in some:
            here, there = (asyncio.run(verdict(one, attempt)).value for one in (verifier, copied))
            if here != there:
                raise Broken(f"{attempt.name}: {here}, but a pickled copy says {there}")


def _digest(directory: Path) -> str:
    digest = sha256()
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        digest.update(f"{os.fsencode(path)!r} {status.st_mode} {status.st_mtime_ns if path.is_file() else 0}".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


CHECKS: dict[str, Callable[[Make], None]] = {
    "returns a finite reward": returns_a_finite_reward,
    "reports a missing sandbox": reports_a_missing_sandbox,
    "can be cancelled": can_be_cancelled,
    "leaves the event loop free": leaves_the_event_loop_free,
    "is deterministic": is_deterministic,
    "works concurrently": works_concurrently,
    "changes nothing": changes_nothing,
    "closes its sandboxes": closes_its_sandboxes,
    "travels to the rollout process": travels,
}
