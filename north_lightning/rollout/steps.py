"""The steps of a task that has several: made ready in the sandbox, and put together to one reward.

Follows Harbor's multi-step trials: a step's files and its ``setup.sh``, then its healthcheck; after a step whose reward
falls short of ``min_reward`` the others are not begun; the mean, per number, is over the steps that were verified, or
the last of these counts alone. A step that cannot be made ready ends the attempt and is left out of the mean, which an
attempt could use that breaks the next step on purpose: strict grading counts it 0.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

from north_lightning.errors import UploadRefusedError
from north_lightning.interfaces import Sandbox
from north_lightning.sandbox.upload import upload
from north_lightning.types import Reward, Task, TaskStep


async def prepare_step(step: TaskStep, sandbox: Sandbox, timeout_s: float) -> str:
    """Lay the step's files over ``/work``, run its ``setup.sh``, wait for its healthcheck.

    Args:
        timeout_s: Of ``setup.sh``.

    Returns:
        Why the step cannot begin; empty if it can.
    """
    files = step.directory / "workdir"
    if files.is_dir():
        try:
            await upload(sandbox, files, "/work")
        except UploadRefusedError as error:
            return f"the files of step {step.name}: {error}"
    if (files / "setup.sh").is_file():
        done = await sandbox.run("bash /work/setup.sh", timeout_s)
        if done.exit_code != 0:
            return f"setup.sh of step {step.name} ended with exit code {done.exit_code}: {done.output[-300:]}"
    check = step.healthcheck
    for tries_left in reversed(range(check.retries + 1 if check else 0)):
        assert check is not None
        if (await sandbox.run(check.command, check.timeout_s)).exit_code == 0:
            break
        if not tries_left:
            return f"the healthcheck of step {step.name} fails"
        await asyncio.sleep(check.interval_s)
    return ""


def numbers_of(verdict: Reward) -> Mapping[str, float]:
    """What the tests of a step said, by name."""
    return verdict.numbers or {"reward": verdict.value}


def ends_attempt(verdict: Reward, min_reward: float | Mapping[str, float] | None) -> bool:
    """Whether a step's verdict falls short; a number that the tests do not say falls short of any."""
    if min_reward is None:
        return False
    least = min_reward if isinstance(min_reward, Mapping) else {"reward": min_reward}
    numbers = numbers_of(verdict)
    return any(numbers.get(name, -math.inf) < threshold for name, threshold in least.items())


def reward_of_steps(task: Task, verdicts: Sequence[Reward]) -> Reward:
    """One reward of those of the steps that were verified, at least one, by the task's strategy.

    It is solved where every step was verified and solved (``final``: the last one).
    """
    names = [step.name for step in task.steps]
    verified = zip(names, verdicts, strict=False)
    details = {"steps": {name: {"reward": one.value, **one.details} for name, one in verified}}
    is_whole = len(verdicts) == len(names)
    last = verdicts[-1]
    if task.reward_strategy == "final":
        return Reward(last.value, details, is_whole and bool(last.solved), numbers_of(last))
    all_numbers = [numbers_of(verdict) for verdict in verdicts]
    count = len(verdicts)
    keys = sorted({key for numbers in all_numbers for key in numbers})
    means = {key: sum(numbers.get(key, 0.0) for numbers in all_numbers) / count for key in keys}
    value = sum(verdict.value for verdict in verdicts) / count
    return Reward(value, details, is_whole and all(verdict.solved for verdict in verdicts), means)
