"""What the README shows is what runs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from north_lightning.harnesses import ReActTerminalHarness
from north_lightning.rollout.attempt import record_scripted, script_of_calls
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_task, solution_steps, write_task
from north_lightning.tasks.terminal import terminal_task

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_reward_scales_a_verdict_and_leaves_the_task_solved(tmp_path):
    (program,) = re.findall(r"```python\n(# plugins/verifiers/.*?)```", README.read_text(), flags=re.S)
    names: dict = {}
    exec(program, names)
    task = load_task(write_task(terminal_task(0, 0, "train"), tmp_path))
    rollout = asyncio.run(
        record_scripted(
            task,
            ReActTerminalHarness(),
            script_of_calls(solution_steps(task)),
            sandboxes=BubblewrapProvider(),
            verifier=names["ShortIsBetter"](),
            image_of=image_of,
        )
    )
    assert rollout.reward.solved
    assert rollout.reward.value == pytest.approx(0.99 ** len(rollout.turns))
