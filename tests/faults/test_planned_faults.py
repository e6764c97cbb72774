"""The fakes fail as they are told, and the real system bears it."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest
from fault_trials import CAUSES, RATES, make_task, play_script, run_trial
from faulty_runner import faulty_runner
from scripted_vllm import reply

from north_lightning.errors import NonFiniteError, SamplerError, SandboxError, VerifierError
from north_lightning.faults import FakeVLLM, FaultPlan, FaultySandboxes, NoSandboxes
from north_lightning.rollout import Timeouts
from north_lightning.sampling.client import VLLMSampler
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.types import Rollout, SamplingParams


@pytest.fixture
def task_image(tmp_path: Path) -> Path:
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


def test_a_plan_is_a_pure_function_of_its_seed(tmp_path: Path) -> None:
    def draws(folder: str, seed: int, order: int) -> dict[int, str | None]:
        plan = pickle.loads(pickle.dumps(FaultPlan(tmp_path / folder, seed, {"one": 0.1, "two": 0.2})))
        return {call: plan.strike(("one", "two"), "group", call) for call in list(range(500))[::order]}

    first, again, other = draws("a", 1, 1), draws("b", 1, -1), draws("c", 2, 1)
    assert first == again != other
    shares = {kind: list(first.values()).count(kind) / 500 for kind in ("one", "two")}
    assert shares["one"] == pytest.approx(0.1, abs=0.05)
    assert shares["two"] == pytest.approx(0.2, abs=0.06)
    struck = FaultPlan(tmp_path / "a").struck()
    assert struck == {kind: round(500 * share) for kind, share in shares.items()}


def test_a_rate_of_one_strikes_always_and_of_zero_never(tmp_path: Path) -> None:
    async def opened(rate: float) -> object:
        plan = FaultPlan(tmp_path / str(rate), rates={"sandbox_cannot_start": rate})
        return await FaultySandboxes(NoSandboxes(), plan).open(tmp_path)

    assert asyncio.run(opened(0.0)) is not None
    with pytest.raises(SandboxError, match="a planned fault"):
        asyncio.run(opened(1.0))


def test_a_fault_strikes_once_unless_it_lasts(tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path, rates={"one": 1.0}, lasting=1.0)
    assert [plan.strike(("one",), 7) for _ in range(3)] == ["one", None, None]
    assert [plan.strike(("one",), 8, may_last=True) for _ in range(3)] == ["one"] * 3
    assert plan.schedule() == ["one 7", "one 8"]


EXPECTED = {
    "request_hangs": SamplerError,
    "request_refused": SamplerError,
    "logprob_nan": NonFiniteError,
    "logprob_clamped": NonFiniteError,
    "version_of_another": SamplerError,
    "answer_truncated": SamplerError,
    "answer_garbled": SamplerError,
    "sandbox_cannot_start": SandboxError,
    "sandbox_hangs": SandboxError,
    "verifier_raises": VerifierError,
    "verifier_hangs": VerifierError,
    "verifier_nan": VerifierError,
    "verifier_wrong_type": VerifierError,
}
LIMITS = {"sandbox_hangs": Timeouts(open_s=0.5), "verifier_hangs": Timeouts(verify_s=0.5)}


def attempt(kind: str, inputs: Path, plan: FaultPlan) -> Rollout:
    """One attempt, tried once, whose every call fails so; nothing else has a limit that a slow machine could reach."""
    play_script(inputs)
    task = make_task(inputs / "task0", name="task0")
    client_s = 0.5 if kind == "request_hangs" else 60.0

    async def run(url: str) -> Rollout:
        runner = faulty_runner(inputs / "tokenizer", [url], plan, client_s, LIMITS.get(kind))
        runner.max_attempts = 1
        try:
            return await runner.run(task, 0, 0, seed=0)
        finally:
            await runner.close()

    with FakeVLLM(reply, plan) as server:
        return asyncio.run(run(server.url))


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_kind_of_fault_is_an_error_of_its_own_boundary(kind: str, inputs: Path, tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path, rates={kind: 1.0})
    with pytest.raises(EXPECTED[kind]) as caught:
        attempt(kind, inputs, plan)
    assert type(caught.value) is EXPECTED[kind]
    assert plan.struck() == {kind: 1}


@pytest.mark.parametrize("kind", ["request_cut", "request_slow"])
def test_what_the_client_bears_itself_changes_no_attempt(kind: str, inputs: Path, tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path / kind, rates={kind: 1.0})
    faulty, sound = attempt(kind, inputs, plan), attempt(kind, inputs, FaultPlan(tmp_path / "none"))
    assert plan.struck()[kind] == len(sound.turns)
    assert (faulty.token_ids, faulty.reward) == (sound.token_ids, sound.reward)


@pytest.mark.parametrize("kind", ["answer_truncated", "answer_garbled"])
def test_a_client_that_cannot_read_an_answer_says_so_itself(kind: str, tmp_path: Path) -> None:
    """So that the pool leaves the server alone: it looks for errors of samplers."""

    async def ask(url: str) -> None:
        sampler = VLLMSampler(url, timeout_s=60)
        try:
            await sampler.generate([1, 2, 3], SamplingParams(max_tokens=99, stop_token_ids=(7,)))
        finally:
            await sampler.close()

    with (
        FakeVLLM(plan=FaultPlan(tmp_path, rates={kind: 1.0})) as server,
        pytest.raises(SamplerError, match=f"{server.url}: expected JSON, got an answer that cannot be read"),
    ):
        asyncio.run(ask(server.url))


def test_a_planned_hang_and_flood_are_ended_by_the_real_sandbox(task_image: Path, tmp_path: Path) -> None:
    async def run(kind: str) -> tuple[str, int, bool]:
        plan = FaultPlan(tmp_path / kind, rates={kind: 1.0})
        sandbox = await FaultySandboxes(BubblewrapProvider(), plan).open(task_image)
        try:
            result = await sandbox.run("echo fine", timeout_s=1.0)
            assert plan.struck() == {kind: 1}
            return result.output, result.exit_code, result.timed_out
        finally:
            await sandbox.close()

    assert asyncio.run(run("command_hangs")) == ("", 124, True)
    output, exit_code, _ = asyncio.run(run("command_floods"))
    assert exit_code != 0
    assert output.startswith("flood\n")
    assert len(output) < 1.1 * 2**20


def test_no_sandboxes_runs_nothing_and_refuses_an_image_that_is_not_there(task_image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        (task_image / "file").write_text("content")
        sandbox = await NoSandboxes().open(task_image)
        assert (await sandbox.run("rm file", 1.0)).exit_code == 0
        await sandbox.snapshot(tmp_path / "snapshot")
        with pytest.raises(SandboxError, match="runs no programs"):
            await sandbox.spawn(["true"])
        with pytest.raises(SandboxError, match="expected a directory"):
            await NoSandboxes().open(tmp_path / "missing")

    asyncio.run(run())
    assert (tmp_path / "snapshot" / "file").read_text() == "content"


def test_a_run_survives_planned_faults_and_its_book_adds_up(inputs: Path, tmp_path: Path) -> None:
    """A small one of those that ``bench_rl_faults.py`` makes until 1,000 faults have struck.

    Here nothing hangs, so that no limit of time has to be short, whatever else the machine does.
    """
    rates = {kind: rate for kind, rate in RATES.items() if "hangs" not in kind and "blocks" not in kind}
    rates |= {"server_killed": 0.2, "push_fails": 0.3}
    result = run_trial(inputs, tmp_path, seed=0, num_steps=10, rates=rates, patience=20.0)
    assert result["trained"] == 40
    assert result["wrong"] == {}
    assert result["torn_answers"] == 0
    assert {name.split("/")[1] for name in result["counts"]} <= CAUSES
    assert sum(result["struck"].values()) >= 15
    assert {kind.split("_")[0] for kind in result["struck"]} >= {"push", "sandbox", "verifier", "server"}
    assert result["counts"]["retried/VerifierError"] > 0
    assert result["counts"]["retried/SamplerError"] > 0
