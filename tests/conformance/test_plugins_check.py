"""The conformance suite: plug-ins that are sound pass, and each kind of broken one fails the check it should."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

from north_lightning.conformance import losses, queues, rewards
from north_lightning.conformance.child import Broken
from north_lightning.conformance.command import run_checks
from north_lightning.errors import QueueError
from north_lightning.verifiers import UnitTestVerifier

ROOT = Path(__file__).parents[2]

REWARD = """
import asyncio, math, os, time
from north_lightning.errors import ConfigError
from north_lightning.interfaces import RewardVerifier
from north_lightning.types import Reward

class Mine(RewardVerifier):
    seen = 0

    async def verify(self, task, rollout, workdir, sandboxes):
{body}
"""

LOSS = """
import torch
from north_lightning.interfaces import PolicyLoss, PolicyLossOutputs

class Mine(PolicyLoss):
    is_zero_without_advantage = True

    def __call__(self, inputs):
        mask = inputs.loss_mask
        kept = [getattr(inputs, name)[mask] for name in ("trainer_logprobs", "rollout_logprobs", "advantages")]
        if not all(torch.isfinite(values).all() for values in kept):
            raise ValueError("not finite")
        trainer, rollout, advantages = kept
        loss = -(trainer * advantages).sum() / inputs.num_trained_tokens
{body}
        return PolicyLossOutputs(loss, {{}})
"""

SOUND = 'return Reward(min(len(rollout.turns), 1), {"turns": len(rollout.turns)})'

BROKEN_REWARDS = {
    "return Reward(math.nan)": "returns a finite reward",
    "return Reward(1.0 / len(rollout.turns))": "returns a finite reward",
    "return 1.0": "returns a finite reward",
    "return Reward(1.0, {'f': lambda: 0})": "returns a finite reward",
    """
    try:
        await sandboxes.open(workdir)
    except Exception:
        return Reward(0.0)
    return Reward(1.0)
    """: "reports a missing sandbox",
    """
    sandbox = await sandboxes.open(workdir / "nothing" if not workdir.exists() else task.directory / "tests")
    return Reward(1.0)
    """: "closes its sandboxes",
    """
    while True:
        try:
            sandbox = await sandboxes.open(task.directory / "tests")
            break
        except asyncio.CancelledError:
            continue
    await sandbox.close()
    return Reward(1.0)
    """: "can be cancelled",
    """
    time.sleep(0.5 if task.environment == "swe" else 0)
    return Reward(1.0)
    """: "leaves the event loop free",
    """
    self.seen += 1
    return Reward(float(self.seen))
    """: "is deterministic",
    """
    self.turns = len(rollout.turns)
    await asyncio.sleep(0.01)
    return Reward(float(self.turns))
    """: "works concurrently",
    """
    rollout.messages.clear()
    return Reward(1.0)
    """: "changes nothing",
    """
    (workdir / "report").write_text("graded")
    return Reward(1.0)
    """: "changes nothing",
}

BROKEN_LOSSES = {
    "loss = loss * float('nan')": "returns a finite scalar",
    "loss = loss.detach() + 0 * inputs.trainer_logprobs[mask].sum()": "has a gradient",
    "loss = loss + 0 * inputs.trainer_logprobs.sum()": "ignores what is masked",
    "loss = loss + inputs.trainer_logprobs.nan_to_num().sum() / inputs.num_trained_tokens": "has a gradient",
    "loss = loss * inputs.num_trained_tokens / mask.sum().clamp(min=1)": "divides by the whole step",
    "loss = loss + trainer.sum()": "keeps its word on advantages",
    "loss = loss * torch.rand(()) ": "is deterministic",
    "loss = loss if mask.any() else torch.tensor(0.0)": "takes an empty batch",
}


def first_broken(file: Path, text: str) -> tuple[str, str] | None:
    """The first check that is broken; a sound plug-in passes every one."""
    file.write_text(text)
    return next(((name, problem) for name, problem in run_checks(file, None, {}, 30.0) if problem is not None), None)


def with_body(template: str, body: str) -> str:
    return template.format(body=textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8))


def make_mine(text: str, monkeypatch: pytest.MonkeyPatch, name: str = "Mine") -> Any:
    """The class that ``text`` defines, importable under the name ``mine``."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(text, module.__dict__)
    return getattr(module, name)


@pytest.mark.parametrize(("body", "check"), BROKEN_REWARDS.items())
def test_a_broken_reward_fails_the_check_it_should(body: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "MAX_BLOCKED_S", 0.3)
    monkeypatch.setattr(rewards, "GRACE_S", 0.3)
    make = make_mine(with_body(REWARD, body), monkeypatch)
    with pytest.raises((Broken, ArithmeticError)):
        rewards.CHECKS[check](make)


@pytest.mark.parametrize("check", rewards.CHECKS)
def test_a_sound_reward_passes(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards.CHECKS[check](make_mine(with_body(REWARD, SOUND), monkeypatch))


@pytest.mark.parametrize(("body", "check"), BROKEN_LOSSES.items())
def test_a_broken_loss_fails_the_check_it_should(body: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = make_mine(with_body(LOSS, body), monkeypatch)
    with pytest.raises((Broken, RuntimeError)):
        losses.CHECKS[check](make)


@pytest.mark.parametrize("check", losses.CHECKS)
def test_a_sound_loss_passes(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses.CHECKS[check](make_mine(with_body(LOSS, ""), monkeypatch))


def test_a_loss_that_takes_what_is_not_finite_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    make = make_mine(with_body(LOSS, "").replace("not all(", "False and all("), monkeypatch)
    with pytest.raises(Broken, match="trainer_logprobs: expected a ValueError for nan under the mask, got a loss"):
        losses.CHECKS["refuses what is not finite"](make)


def test_a_plugin_that_hangs_or_ends_its_process_is_replaced_for_the_other_checks(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    kinds = "from north_lightning.conformance.rewards import Counted, Unavailable\n"
    faults = "time.sleep(60 * isinstance(sandboxes, Counted))\nisinstance(sandboxes, Unavailable) and os._exit(7)\n"
    file.write_text(kinds + with_body(REWARD, faults + SOUND))
    results = dict(run_checks(file, None, {}, 2.5))
    assert len(results) == 10
    assert {name: problem for name, problem in results.items() if problem} == {
        "reports a missing sandbox": "ended its process (exit code 7)",
        "can be cancelled": "ended its process (exit code 7)",
        "closes its sandboxes": "hangs: expected an end within 2.5 s, got none",
    }


def test_the_command_prints_a_line_per_check_and_the_exit_code_tells(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(with_body(REWARD, SOUND))
    bad.write_text(with_body(REWARD, "return Reward(math.inf)"))
    command = [sys.executable, "-m", "north_lightning", "plugins", "check", str(good), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[:10] == [f"{good}: {name}: ok" for name in ("loads", *rewards.CHECKS)]
    problem = "a solved attempt: verify: expected a finite number from 0 to 1 as value, got inf; "
    problem += "reward_range declares another range"
    assert f"{bad}: returns a finite reward: {problem}" in lines
    assert "checks failed" in done.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1", "expected one class below RewardVerifier, PolicyLoss, RolloutQueue, got none"),
        ("import nowhere", "raised ModuleNotFoundError: No module named 'nowhere'"),
        (
            "from north_lightning.interfaces import RewardVerifier\nclass Mine(RewardVerifier): ...",
            "Mine lacks verify",
        ),
    ],
)
def test_a_file_without_a_plugin_says_what_it_lacks(text: str, problem: str, tmp_path: Path) -> None:
    assert first_broken(tmp_path / "mine.py", text) == ("loads", problem)


def test_the_example_of_a_loss_keeps_its_promises() -> None:
    results = dict(run_checks(ROOT / "plugins" / "losses" / "clipped_ratio.py", None, {}, 60))
    assert len(results) == 9
    assert not any(results.values()), results


def test_the_reward_that_ships_keeps_its_promises() -> None:
    for name in ("returns a finite reward", "reports a missing sandbox", "closes its sandboxes"):
        rewards.CHECKS[name](UnitTestVerifier)


QUEUE = (ROOT / "plugins" / "queues" / "completion_order.py").read_text()
BROKEN_QUEUES = [
    (", self._completed[num_groups:]", ", []", "gives back what was completed"),
    ("self._dropped[group_id] = reason", "pass", "frees the slot of what is dropped"),
    ('"again": sorted(', '"again": sorted([]) and sorted(', "resumes"),
    ("if group_id not in self._in_flight", "if False", "lets a group end once"),
    ("            if len(self._completed) < num_groups:\n                return None\n", "", "does not block"),
    ("float(len(self._in_flight))", "float('nan')", "counts in numbers"),
    ("self._next_id = 0", "self._next_id = 1", "counts from zero"),
    ("self._taken -= ids", "pass", "works from several threads"),
    ('list(state["again"])', 'list(state["again"]) * 2', "keeps its ledger in any order"),
]


@pytest.mark.parametrize(("old", "new", "check"), BROKEN_QUEUES)
def test_a_broken_queue_fails_the_check_it_should(
    old: str, new: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in QUEUE
    cls = make_mine(QUEUE.replace(old, new), monkeypatch, "CompletionOrderQueue")
    monkeypatch.setattr(queues, "MAX_WAIT_S", 0.5)
    with pytest.raises((Broken, KeyError, QueueError)):
        queues.CHECKS[check](lambda: cls(3))


@pytest.mark.parametrize("check", queues.CHECKS)
def test_a_sound_queue_passes(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = make_mine(QUEUE, monkeypatch, "CompletionOrderQueue")
    queues.CHECKS[check](lambda: cls(3))
