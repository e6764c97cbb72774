"""The agent loop: which tokens a rollout holds, how attempts end, and what a failing part does to them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import pytest
from rollout_fakes import (
    FAST,
    EchoHarness,
    FakeSandboxes,
    FakeVerifier,
    RecordingSampler,
    answer,
    by_index,
    call,
    full_marks,
    hang,
    image_of,
    make_runner,
    make_task,
    numbered,
    raise_sandbox_error,
    spelled,
)

from north_lightning.chat import ChatFormat
from north_lightning.errors import (
    AttemptError,
    ConfigError,
    InfrastructureError,
    InvalidActionError,
    SamplerError,
    SandboxError,
    SandboxUnavailableError,
    VerifierError,
)
from north_lightning.interfaces import Sampler
from north_lightning.rollout import Timeouts, record_scripted, script_of_calls
from north_lightning.rollout.metrics import group_metrics
from north_lightning.types import (
    NOT_SAMPLED,
    AssistantAction,
    Message,
    Reward,
    Rollout,
    Sample,
    SamplingParams,
    Task,
    TaskStep,
    ToolCall,
    ToolResult,
)

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task(tmp_path / "task")


# ---- tokens --------------------------------------------------------------------------------------------------------


def expected_rollout(
    chat: ChatFormat, prompt: list[int], samples: list[Sample], observations: list[str]
) -> list[tuple[int, bool, float, int]]:
    """Token by token (id, trained, log-probability, version): the prompt, then samples and observations in turn."""
    rows = [(token, False, 0.0, NOT_SAMPLED) for token in prompt]
    for turn, sample in enumerate(samples):
        rows += [
            (token, True, logprob, version)
            for token, logprob, version in zip(sample.token_ids, sample.logprobs, sample.policy_versions, strict=True)
        ]
        if turn + 1 < len(samples):
            observed = chat.encode_tool_results([ToolResult(str(turn), observations[turn])])
            rows += [(token, False, 0.0, NOT_SAMPLED) for token in observed]
    return rows


def rows_of(rollout: Rollout) -> list[tuple[int, bool, float, int]]:
    columns = (rollout.token_ids, rollout.loss_mask, rollout.rollout_logprobs, rollout.policy_versions)
    return list(zip(*columns, strict=True))


def samples_of(sampler: RecordingSampler, rollout: Rollout) -> list[Sample]:
    """What was given to this rollout: its requests are told apart by their prompts and samples, turn by turn."""
    return [
        sample
        for prompt, _, sample in sampler.requests
        if rollout.token_ids[: len(prompt)] == prompt
        and rollout.rollout_logprobs[len(prompt) : len(prompt) + len(sample.logprobs)] == sample.logprobs
    ]


@pytest.mark.parametrize(
    ("actions", "agent_timeout_s", "stop_reason"),
    [
        ([call("one"), answer(), answer()], None, "finished"),
        ([call("one"), call("two")], 0.01, "timeout"),  # the next instruction comes behind a call's result
    ],
)
def test_steps_are_one_record_that_reads_like_their_conversation(
    chat: ChatFormat, task: Task, actions: list[Any], agent_timeout_s: float | None, stop_reason: str
) -> None:
    part = replace(task, agent_timeout_s=agent_timeout_s)
    steps = tuple(TaskStep(name, task.directory, replace(part, instruction=f"Do {name}.")) for name in ("a", "b"))

    async def a_moment() -> None:
        await asyncio.sleep(0.02)

    harness = EchoHarness(on_act=a_moment)
    runner = make_runner(chat, RecordingSampler(chat, actions), harness=harness, vary_prompts=False)
    rollout = run(runner.run(replace(task, steps=steps), 0, 0, seed=1))
    assert (rollout.stop_reason, rollout.reward and rollout.reward.value) == (stop_reason, 1.0)
    assert [message.content for message in rollout.messages if message.role == "user"] == ["Do a.", "Do b."]
    last = max(i for i, message in enumerate(rollout.messages) if message.role == "assistant")
    tools = harness.prompt(task).tools
    whole = chat.encode_conversation(rollout.messages[: last + 1], tools)
    assert chat.tokenizer.decode(rollout.token_ids) == chat.tokenizer.decode(whole.token_ids)


@pytest.mark.parametrize("reasoning", [False, True])
def test_every_trained_token_was_sampled(tokenizer_dir: Path, task: Task, reasoning: bool) -> None:
    from rollout_fakes import load_chat

    chat = load_chat(tokenizer_dir, reasoning)
    sampler = RecordingSampler(chat, [call("one"), call("two"), call("three"), answer()], delay_s=0.001)
    runner = make_runner(chat, sampler, verifier=FakeVerifier(by_index))
    group = run(runner.run_group(task, group_id=3, group_size=4, seed=0))
    observations = ["you said one", "you said two", "you said three"]
    for rollout in group.rollouts:
        samples = samples_of(sampler, rollout)
        assert len(samples) == 4
        prompt = chat.encode_prompt(rollout.messages[:2], EchoHarness().prompt(task).tools)
        assert rows_of(rollout) == expected_rollout(chat, prompt, samples, observations)
        assert [(turn.end - turn.start) for turn in rollout.turns] == [len(sample.token_ids) for sample in samples]
        for turn, sample in zip(rollout.turns, samples, strict=True):
            assert rollout.token_ids[turn.start : turn.end] == sample.token_ids
    assert len(sampler.requests) == 16


class RoutingSampler(RecordingSampler):
    """Says of every token that it read: (its position, the turn it was read in)."""

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        sample = await super().generate(prompt_token_ids, params)
        assert params.routed_experts_from is not None
        read = range(params.routed_experts_from, len(prompt_token_ids) + len(sample.token_ids) - 1)
        turn = self._turn(prompt_token_ids)
        return replace(sample, routed_experts=np.array([[[position, turn]] for position in read]))


def test_every_token_keeps_the_experts_of_the_turn_that_read_it_first(chat: ChatFormat, task: Task) -> None:
    sampler = RoutingSampler(chat, [call("one"), call("two"), answer()])
    runner = make_runner(chat, sampler)
    runner.record_routing = True
    rollout = run(runner.run(task, group_id=0, index=0, seed=0))
    assert rollout.routed_experts is not None
    positions, turns = rollout.routed_experts[:, 0].T.tolist()
    assert positions == list(range(len(rollout.token_ids) - 1))
    ends = [turn.end for turn in rollout.turns]  # a turn's last token is read by the next turn
    assert turns == [sum(position >= end - 1 for end in ends) for position in positions]


def test_the_sampled_ids_are_ones_the_tokenizer_would_not_choose(chat: ChatFormat) -> None:
    action = numbered(call("hello goodbye"), 0)
    assert spelled(chat, action) != chat.encode_action(action)
    assert (
        chat.parse(spelled(chat, action), EchoHarness().prompt(make_task(Path("/tmp/north-none"))).tools, 0) == action
    )


def test_every_prompt_is_the_exact_history(chat: ChatFormat, task: Task) -> None:
    sampler = RecordingSampler(chat, [call("one"), call("two"), answer()])
    rollout = run(make_runner(chat, sampler).run(task, 0, 0, seed=0))
    for prompt, _, sample in sampler.requests:
        assert rollout.token_ids[: len(prompt)] == prompt
        assert rollout.token_ids[len(prompt) : len(prompt) + len(sample.token_ids)] == sample.token_ids


def test_a_rollout_ends_with_its_last_sampled_token(chat: ChatFormat, task: Task) -> None:
    for actions in ([call("one"), call("stop")], [call("on")], [answer()]):
        rollout = run(make_runner(chat, RecordingSampler(chat, actions)).run(task, 0, 0, seed=0))
        assert rollout.loss_mask[-1]


def test_messages_tell_the_whole_conversation(chat: ChatFormat, task: Task) -> None:
    rollout = run(make_runner(chat, RecordingSampler(chat, [call("one"), answer()])).run(task, 0, 0, seed=0))
    assert rollout.messages[2:] == [
        Message("assistant", tool_calls=(ToolCall("0", "echo", {"text": "one"}),)),
        Message("tool", "you said one", tool_call_id="0"),
        Message("assistant", "done"),
    ]


# ---- how attempts end ----------------------------------------------------------------------------------------------


def test_an_answer_without_a_call_finishes_and_is_verified(chat: ChatFormat, task: Task) -> None:
    rollout = run(make_runner(chat, RecordingSampler(chat, [call("one"), answer()])).run(task, 0, 0, seed=0))
    assert (rollout.stop_reason, rollout.reward) == ("finished", Reward(1.0))
    assert rollout.duration_s > 0


def test_a_used_up_turn_budget_is_verified_all_the_same(chat: ChatFormat, task: Task) -> None:
    rollout = run(make_runner(chat, RecordingSampler(chat, [call("again")])).run(task, 0, 0, seed=0))
    assert (rollout.stop_reason, rollout.reward) == ("max_turns", Reward(1.0))
    assert len(rollout.turns) == task.max_turns


def test_a_cut_off_turn_ends_the_attempt_unparsed_and_is_verified(chat: ChatFormat, task: Task) -> None:
    sampler = RecordingSampler(chat, [call("one"), call("x" * 300)])
    rollout = run(make_runner(chat, sampler, max_turn_tokens=100).run(task, 0, 0, seed=0))
    assert (rollout.stop_reason, rollout.reward) == ("length", Reward(1.0))
    assert [turn.finish_reason for turn in rollout.turns] == ["stop", "length"]
    assert rollout.num_sampled_tokens == len(sampler.requests[0][2].token_ids) + 100


def test_a_rollout_never_exceeds_the_context(chat: ChatFormat, task: Task) -> None:
    prompt = len(chat.encode_prompt(*_opening(task)))
    actions = [call("one"), call("two"), answer()]
    unlimited = RecordingSampler(chat, actions)
    whole = len(run(make_runner(chat, unlimited, vary_prompts=False).run(task, 0, 0, seed=0)).token_ids)
    edges = [
        len(asked) + i for asked, _, _ in unlimited.requests for i in range(-4, 5)
    ]  # where an observation just fits
    seen = set()
    for limit in [*range(prompt + 1, whole, 97), *edges, whole]:
        if limit <= prompt:
            continue
        sampler = RecordingSampler(chat, actions)
        runner = make_runner(chat, sampler, max_context_tokens=limit, vary_prompts=False)
        rollout = run(runner.run(task, 0, 0, seed=0))
        assert len(rollout.token_ids) <= limit
        assert rollout.loss_mask[-1]
        assert rollout.reward == Reward(1.0)
        for asked, params, _ in sampler.requests:
            assert len(asked) + params.max_tokens <= limit
        seen.add((rollout.stop_reason, len(rollout.turns)))
    assert seen == {("context", 1), ("context", 2), ("context", 3), ("finished", 3)}


def _opening(task: Task) -> tuple[tuple[Message, ...], Any]:
    prompt = EchoHarness().prompt(task)
    return prompt.messages, prompt.tools


def test_a_prompt_beyond_the_context_is_a_mistake_of_the_configuration(chat: ChatFormat, task: Task) -> None:
    with pytest.raises(ConfigError, match="max_context_tokens"):
        run(make_runner(chat, RecordingSampler(chat, [answer()]), max_context_tokens=20).run(task, 0, 0, seed=0))


def test_an_environment_without_a_harness_is_named(chat: ChatFormat, tmp_path: Path) -> None:
    other = make_task(tmp_path, environment="swe")
    with pytest.raises(ConfigError, match="'swe'"):
        run(make_runner(chat, RecordingSampler(chat, [answer()])).run(other, 0, 0, seed=0))


def unparseable(chat: ChatFormat) -> list[int]:
    return [*chat.tokenizer.encode_text("no markers at all"), chat.stop_token_ids[0]]


def two_calls() -> AssistantAction:
    return AssistantAction(tool_calls=(*call("one").tool_calls, *call("two").tool_calls))


def unknown_tool() -> AssistantAction:
    return AssistantAction(tool_calls=(ToolCall("", "shout", {"text": "one"}),))


@pytest.mark.parametrize("bad", [unparseable, two_calls, unknown_tool])
def test_an_invalid_action_scores_zero_without_verification(
    chat: ChatFormat, task: Task, bad: Callable[..., Any]
) -> None:
    action = bad(chat) if bad is unparseable else bad()
    verifier, sandboxes = FakeVerifier(full_marks), FakeSandboxes()
    sampler = RecordingSampler(chat, [call("one"), action])
    rollout = run(make_runner(chat, sampler, sandboxes=sandboxes, verifier=verifier).run(task, 0, 0, seed=0))
    assert rollout.stop_reason == "invalid_action"
    assert rollout.reward is not None
    assert rollout.reward.value == 0.0
    assert verifier.num_calls == 0
    assert sandboxes.num_snapshots == 0
    assert [turn.error is not None for turn in rollout.turns] == [False, True]
    assert rollout.messages[-1].role == "assistant"
    assert rollout.loss_mask[-1]  # the model's failure is trained on
    assert rollout.token_ids[rollout.turns[-1].start :] == sampler.requests[-1][2].token_ids
    if bad is unparseable:
        assert "no markers at all" in rollout.messages[-1].content


# ---- groups and seeds ----------------------------------------------------------------------------------------------


def test_a_group_has_leave_one_out_advantages(chat: ChatFormat, task: Task) -> None:
    runner = make_runner(chat, RecordingSampler(chat, [answer()]), verifier=FakeVerifier(by_index))
    group = run(runner.run_group(task, group_id=7, group_size=4, seed=0))
    assert group.rewards == [0.0, 1.0, 0.0, 1.0]
    assert [rollout.advantage for rollout in group.rollouts] == pytest.approx([-2 / 3, 2 / 3, -2 / 3, 2 / 3])
    assert [(rollout.group_id, rollout.index) for rollout in group.rollouts] == [(7, i) for i in range(4)]


def test_a_group_without_a_reward_is_a_typed_failure(chat: ChatFormat, task: Task, monkeypatch) -> None:
    runner = make_runner(chat, RecordingSampler(chat, [answer()]))
    made = runner.run

    async def run_without_the_second_reward(task: Task, group_id: int, index: int, seed: int) -> Rollout:
        rollout = await made(task, group_id, index, seed)
        return replace(rollout, reward=None) if index == 1 else rollout

    monkeypatch.setattr(runner, "run", run_without_the_second_reward)
    with pytest.raises(VerifierError, match=r"group 3 \(task task0\): attempts \[1\] have no reward"):
        run(runner.run_group(task, group_id=3, group_size=2, seed=0))


@pytest.mark.parametrize("where", ["parse", "encode_tool_results", "act"])
def test_an_exception_that_an_attempt_causes_is_its_own(chat: ChatFormat, task: Task, monkeypatch, where: str) -> None:
    """Whatever its type: the run goes on."""

    def break_down(*_: object) -> NoReturn:
        raise RecursionError("maximum recursion depth exceeded")

    async def break_down_later() -> None:
        break_down()

    harness = EchoHarness(on_act=break_down_later) if where == "act" else EchoHarness()
    if where != "act":
        monkeypatch.setattr(chat, where, break_down)
    runner = make_runner(chat, RecordingSampler(chat, [call("one"), answer()]), harness=harness, max_attempts=5)
    rollout = run(runner.run(task, 0, 0, 0))
    assert runner.retried == {"AttemptError": 1}  # not all five: it would come again
    assert (rollout.reward.value, rollout.stop_reason, len(rollout.turns)) == (0.0, "model_error", 1)
    assert rollout.reward.details["reason"].startswith("model_error/AttemptError: ")
    assert "RecursionError: maximum recursion depth" in rollout.reward.details["reason"]
    with pytest.raises(AttemptError, match="every attempt of group 0"):
        run(runner.run_group(task, 0, 2, seed=0))


def test_what_an_attempt_makes_fail_once_is_no_verdict(chat: ChatFormat, task: Task) -> None:
    failures = [RecursionError("once")]

    async def fail_once() -> None:
        if failures:
            raise failures.pop()

    runner = make_runner(
        chat, RecordingSampler(chat, [call("one"), answer()]), harness=EchoHarness(on_act=fail_once), max_attempts=5
    )
    assert run(runner.run(task, 0, 0, 0)).reward.value == 1.0


def test_a_group_of_one_is_refused_before_anything_is_sampled(chat: ChatFormat, task: Task) -> None:
    sampler = RecordingSampler(chat, [answer()])
    with pytest.raises(ConfigError, match="group_size"):
        run(make_runner(chat, sampler).run_group(task, 0, 1, seed=0))
    assert sampler.requests == []


def seeds(chat: ChatFormat, task: Task, seed: int, group_id: int = 0) -> list[int | None]:
    sampler = RecordingSampler(chat, [call("one"), call("two"), answer()])
    run(make_runner(chat, sampler).run_group(task, group_id, 3, seed))
    return [params.seed for _, params, _ in sampler.requests]


def test_seeds_depend_on_seed_group_attempt_and_turn_and_nothing_else(chat: ChatFormat, task: Task) -> None:
    first = seeds(chat, task, seed=0)
    assert len(first) == len(set(first)) == 9
    assert sorted(map(str, seeds(chat, task, seed=0))) == sorted(map(str, first))
    assert set(first).isdisjoint(seeds(chat, task, seed=1))
    assert set(first).isdisjoint(seeds(chat, task, seed=0, group_id=1))
    assert all(seed is not None and 0 <= seed < 2**31 for seed in first)


def test_attempts_of_a_group_share_their_wording_and_groups_differ(chat: ChatFormat, task: Task) -> None:
    runner = make_runner(chat, RecordingSampler(chat, [answer()]))
    wordings = []
    for group_id in range(12):
        group = run(runner.run_group(task, group_id, 2, seed=0))
        assert group.rollouts[0].messages[0] == group.rollouts[1].messages[0]
        wordings.append(group.rollouts[0].messages[0].content)
    assert set(wordings) == {"Hello.", "Good day.", "Hi."}


# ---- failures ------------------------------------------------------------------------------------------------------


class BrokenSampler(Sampler):
    def __init__(self, respond: Callable[[], Awaitable[Sample]]) -> None:
        self.respond = respond

    async def generate(self, prompt_token_ids: object, params: SamplingParams) -> Sample:
        return await self.respond()


def sample(**changes: Any) -> Callable[[], Awaitable[Sample]]:
    fields = {"token_ids": [1, 7], "logprobs": [-0.1, -0.2], "policy_versions": [0, 0], "finish_reason": "stop"}

    async def respond() -> Sample:
        return Sample(**{**fields, **changes})

    return respond


async def raise_runtime_error(*_: object) -> Any:
    raise RuntimeError("a bug in a plug-in")


async def raise_invalid(*_: object) -> Any:
    raise InvalidActionError("not yours to raise")


async def hang_forever(*_: object) -> Any:
    await hang()


def limits(fault: object) -> Timeouts:
    return FAST if fault is hang_forever else Timeouts()


def judged(value: object) -> Callable[[Rollout], Awaitable[object]]:
    async def judge(rollout: Rollout) -> object:
        return value

    return judge


SAMPLER_FAULTS = {
    "non-finite": sample(logprobs=[-0.1, math.nan]),
    "infinite": sample(logprobs=[-0.1, -math.inf]),
    "lengths": sample(logprobs=[-0.1]),
    "versions": sample(policy_versions=[0]),
    "empty": sample(token_ids=[], logprobs=[], policy_versions=[]),
    "aborted": sample(finish_reason="abort"),
    "raises": raise_runtime_error,
    "hangs": hang_forever,
}


@pytest.mark.parametrize("fault", SAMPLER_FAULTS)
def test_a_broken_sampler_is_never_a_reward(chat: ChatFormat, task: Task, fault: str) -> None:
    sandboxes = FakeSandboxes()
    sampler = BrokenSampler(SAMPLER_FAULTS[fault])
    runner = make_runner(chat, sampler, sandboxes=sandboxes, max_attempts=2, timeouts=limits(SAMPLER_FAULTS[fault]))
    with pytest.raises(SamplerError):
        run(runner.run(task, 0, 0, seed=0))
    assert sandboxes.num_opened == 2
    assert sandboxes.open_now == set()


VERIFIER_FAULTS = {
    "raises": raise_runtime_error,
    "hangs": hang_forever,
    "raises invalid action": raise_invalid,
    "NaN": judged(Reward(math.nan)),
    "infinite": judged(Reward(math.inf)),
    "a bare number": judged(1.0),
    "nothing": judged(None),
    "text": judged(Reward("1.0")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("fault", VERIFIER_FAULTS)
def test_a_broken_verifier_is_never_a_reward(chat: ChatFormat, task: Task, fault: str) -> None:
    verifier = FakeVerifier(VERIFIER_FAULTS[fault])
    timeouts = limits(VERIFIER_FAULTS[fault])
    sampler = RecordingSampler(chat, [answer()])
    runner = make_runner(chat, sampler, verifier=verifier, max_attempts=3, timeouts=timeouts)
    with pytest.raises(VerifierError):
        run(runner.run(task, 0, 0, seed=0))
    assert verifier.num_calls == 3


@pytest.mark.parametrize("stage", ["on_open", "on_snapshot"])
@pytest.mark.parametrize("fault", [raise_sandbox_error, raise_runtime_error, hang_forever])
def test_a_broken_sandbox_is_never_a_reward(
    chat: ChatFormat, task: Task, stage: str, fault: Callable[[], Awaitable[None]]
) -> None:
    sandboxes = FakeSandboxes(**{stage: fault})
    runner = make_runner(chat, RecordingSampler(chat, [answer()]), sandboxes=sandboxes, timeouts=limits(fault))
    with pytest.raises(SandboxError):
        run(runner.run(task, 0, 0, seed=0))
    assert sandboxes.open_now == set()


@pytest.mark.parametrize("fault", [raise_sandbox_error, raise_runtime_error, hang_forever])
def test_a_broken_harness_is_never_a_reward(chat: ChatFormat, task: Task, fault: Callable[[], Awaitable[None]]) -> None:
    harness, sandboxes = EchoHarness(on_act=fault), FakeSandboxes()
    sampler = RecordingSampler(chat, [call("one")])
    runner = make_runner(chat, sampler, sandboxes=sandboxes, harness=harness, timeouts=limits(fault))
    with pytest.raises(InfrastructureError):
        run(runner.run(task, 0, 0, seed=0))
    assert harness.num_closed == 1
    assert sandboxes.open_now == set()


def failing_first(times: int) -> Callable[[], Awaitable[None]]:
    left = [times]

    async def fault() -> None:
        if left[0]:
            left[0] -= 1
            raise SandboxError("not yet")

    return fault


def test_a_passing_failure_is_tried_again_from_the_start(chat: ChatFormat, task: Task) -> None:
    sandboxes = FakeSandboxes(on_snapshot=failing_first(2))
    sampler = RecordingSampler(chat, [call("one"), answer()])
    rollout = run(make_runner(chat, sampler, sandboxes=sandboxes, max_attempts=3).run(task, 0, 0, seed=0))
    assert rollout.reward == Reward(1.0)
    assert len(rollout.turns) == 2  # nothing of the failed tries is left in it
    tries = [sampler.requests[i : i + 2] for i in (0, 2, 4)]
    assert [[params.seed for _, params, _ in one] for one in tries] == 3 * [[p.seed for _, p, _ in tries[0]]]


def test_a_machine_that_cannot_isolate_is_not_tried_again(chat: ChatFormat, task: Task) -> None:
    async def unavailable() -> None:
        raise SandboxUnavailableError("install bubblewrap")

    sandboxes = FakeSandboxes(on_open=unavailable)
    with pytest.raises(SandboxUnavailableError):
        run(
            make_runner(chat, RecordingSampler(chat, [answer()]), sandboxes=sandboxes, max_attempts=3).run(
                task, 0, 0, 0
            )
        )
    assert sandboxes.num_opened == 1


@pytest.mark.parametrize("num_failing", [1, 2, 3])
def test_a_lost_attempt_does_not_cost_its_group(chat: ChatFormat, task: Task, num_failing: int) -> None:
    async def judge(rollout: Rollout) -> object:
        if rollout.index < num_failing:
            raise RuntimeError("broken")
        return Reward(float(rollout.index == 3))

    sandboxes = FakeSandboxes()
    runner = make_runner(chat, RecordingSampler(chat, [answer()]), sandboxes=sandboxes, verifier=FakeVerifier(judge))
    if num_failing == 3:
        with pytest.raises(VerifierError, match="broken"):
            run(runner.run_group(task, 0, 4, seed=0))
    else:
        group = run(runner.run_group(task, 0, 4, seed=0))
        assert [rollout.index for rollout in group.rollouts] == list(range(num_failing, 4))
        baseline = 1 / (3 - num_failing)
        assert [one.advantage for one in group.rollouts] == pytest.approx([-baseline] * (3 - num_failing) + [1.0])
        assert group_metrics([group])["lost_rollouts"] == num_failing
    assert sandboxes.open_now == set()


@pytest.mark.parametrize("stage", ["sampling", "acting", "opening", "opened late"])
def test_a_cancelled_attempt_closes_its_sandbox(chat: ChatFormat, task: Task, stage: str) -> None:
    async def stubborn() -> None:
        try:
            await hang()
        except asyncio.CancelledError:
            return  # opens all the same

    sampler: Sampler = RecordingSampler(chat, [call("one"), answer()])
    harness, sandboxes = EchoHarness(), FakeSandboxes()
    if stage == "sampling":
        sampler = BrokenSampler(hang_forever)
    elif stage == "acting":
        harness.on_act = hang
    elif stage == "opening":
        sandboxes.on_open = hang
    else:
        sandboxes.on_opened = stubborn

    async def cancelled() -> None:
        attempt = asyncio.create_task(
            make_runner(chat, sampler, sandboxes=sandboxes, harness=harness).run(task, 0, 0, seed=0)
        )
        await asyncio.sleep(0.05)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        await asyncio.sleep(0.01)

    run(cancelled())
    assert sandboxes.num_opened == 1
    assert sandboxes.open_now == set()


def test_a_sandbox_that_opens_too_late_is_closed(chat: ChatFormat, task: Task) -> None:
    async def stubborn() -> None:
        try:
            await hang()
        except asyncio.CancelledError:
            return

    sandboxes = FakeSandboxes(on_opened=stubborn)

    async def attempt() -> None:
        sampler = RecordingSampler(chat, [answer()])
        with pytest.raises(SandboxError, match="within"):
            await make_runner(chat, sampler, sandboxes=sandboxes, timeouts=FAST).run(task, 0, 0, seed=0)
        await asyncio.sleep(0.01)

    run(attempt())
    assert sandboxes.open_now == set()


def test_a_scaled_reward_still_counts_as_solved(chat: ChatFormat, task: Task) -> None:
    async def judge(rollout: Rollout) -> Reward:
        return replace(Reward(1.0), value=0.98)

    rollout = run(
        make_runner(chat, RecordingSampler(chat, [answer()]), verifier=FakeVerifier(judge)).run(task, 0, 0, 0)
    )
    assert rollout.reward is not None
    assert (rollout.reward.value, rollout.reward.solved) == (0.98, True)


def test_a_verifier_has_the_limit_of_its_task_beside_its_own(chat: ChatFormat, task: Task) -> None:
    async def judge(rollout: Rollout) -> Reward:
        await asyncio.sleep(FAST.verify_s + 0.2)
        return Reward(1.0)

    for limit_s, is_graded in ((None, False), (30.0, True)):
        runner = make_runner(chat, RecordingSampler(chat, [answer()]), verifier=FakeVerifier(judge), timeouts=FAST)
        attempt = runner.run(replace(task, verifier_timeout_s=limit_s), 0, 0, seed=0)
        if is_graded:
            assert run(attempt).reward == Reward(1.0)
        else:
            with pytest.raises(VerifierError, match="expected an end within 0.4 s"):
                run(attempt)


def test_an_attempt_has_a_limit_of_its_own_beside_what_its_task_allows(chat: ChatFormat, task: Task) -> None:
    timeouts = replace(FAST, attempt_s=0.5)
    turns = [call(f"turn {number}") for number in range(3)]
    for allowed_s, is_ended in ((None, True), (30.0, False)):
        sampler = RecordingSampler(chat, [*turns, answer()], delay_s=0.2)
        runner = make_runner(chat, sampler, timeouts=timeouts, max_attempts=1)
        attempt = runner.run(replace(task, agent_timeout_s=allowed_s), 0, 0, seed=0)
        if is_ended:
            with pytest.raises(InfrastructureError, match=r"an end within 0.5 s \(timeouts.attempt_s.*after 2 turns"):
                run(attempt)
        else:
            assert run(attempt).reward == Reward(1.0)


def test_a_verifier_that_ignores_its_cancellation_holds_nothing(
    chat: ChatFormat, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("north_lightning.rollout.stages.CANCEL_GRACE_S", 0.05)
    ended = asyncio.Event()

    async def deaf(rollout: Rollout) -> object:
        for _ in range(100):
            try:
                await asyncio.wait_for(ended.wait(), 0.02)
            except (asyncio.CancelledError, TimeoutError):
                continue
            break
        return Reward(1.0)

    async def attempt() -> None:
        sampler = RecordingSampler(chat, [answer()])
        with pytest.raises(VerifierError, match="within"):
            await make_runner(chat, sampler, verifier=FakeVerifier(deaf), timeouts=FAST).run(task, 0, 0, 0)
        ended.set()

    run(attempt())


# ---- scripted ------------------------------------------------------------------------------------------------------


def test_a_scripted_solver_goes_through_the_same_loop(task: Task) -> None:
    sandboxes, harness = FakeSandboxes(), EchoHarness()
    seen: list[int] = []

    async def script(messages: Any) -> AssistantAction:
        seen.append(len(messages))
        observed = [message.content for message in messages if message.role == "tool"]
        return answer("bye") if "you said two" in observed else call("two" if observed else "one")

    rollout = run(
        record_scripted(
            task,
            harness,
            script,
            sandboxes=sandboxes,
            verifier=FakeVerifier(full_marks),
            image_of=image_of,
            variation=1,
        )
    )
    assert seen == [2, 4, 6]
    assert rollout.messages[0] == Message("system", "Good day.")
    assert [message.tool_calls[0].id for message in rollout.messages if message.tool_calls] == ["0", "1"]
    assert [message.content for message in rollout.messages if message.role == "tool"] == [
        "you said one",
        "you said two",
    ]
    assert (rollout.stop_reason, rollout.reward, rollout.token_ids) == ("finished", Reward(1.0), [])
    assert (sandboxes.num_snapshots, sandboxes.open_now, harness.num_closed) == (1, set(), 1)


def test_a_script_of_calls_makes_them_in_order_and_answers(task: Task) -> None:
    script = script_of_calls([("echo", {"text": "one"}), ("echo", {"text": "two"})], answer="bye")
    rollout = run(
        record_scripted(
            task, EchoHarness(), script, sandboxes=FakeSandboxes(), verifier=FakeVerifier(full_marks), image_of=image_of
        )
    )
    assert [m.tool_calls[0].arguments["text"] for m in rollout.messages if m.tool_calls] == ["one", "two"]
    assert rollout.messages[-1] == Message("assistant", "bye")


def test_a_recorded_trajectory_encodes_to_what_a_rollout_samples(chat: ChatFormat, task: Task) -> None:
    script = script_of_calls([("echo", {"text": "one"})], answer="done")
    recorded = run(
        record_scripted(
            task, EchoHarness(), script, sandboxes=FakeSandboxes(), verifier=FakeVerifier(full_marks), image_of=image_of
        )
    )
    ids = [chat.encode_action(numbered(action, 0)) for action in (call("one"), answer("done"))]
    sampler = RecordingSampler(chat, ids)
    rollout = run(make_runner(chat, sampler, vary_prompts=False).run(task, 0, 0, seed=0))
    sample = chat.encode_conversation(recorded.messages, EchoHarness().prompt(task).tools)
    assert (rollout.token_ids, rollout.loss_mask) == (sample.token_ids, sample.loss_mask)


def test_what_a_scaled_verdict_says_of_solved_is_kept(chat: ChatFormat, task: Task) -> None:
    async def scaled(rollout: Rollout) -> Reward:
        return replace(Reward(1.0), value=0.5)

    rollout = run(
        make_runner(chat, RecordingSampler(chat, [answer()]), verifier=FakeVerifier(scaled)).run(task, 0, 0, 0)
    )
    assert (rollout.reward.value, rollout.reward.solved) == (0.5, True)


def test_commands_that_use_up_the_agents_time_end_the_attempt_and_it_is_verified(chat: ChatFormat, task: Task) -> None:
    async def work() -> None:
        await asyncio.sleep(0.05)

    timed = replace(task, agent_timeout_s=0.08, max_turns=9)
    sampler = RecordingSampler(chat, [call("one"), call("two"), call("three"), call("four")], delay_s=0.1)
    runner = make_runner(chat, sampler, harness=EchoHarness(on_act=work), max_context_tokens=5000)
    rollout = run(runner.run(timed, 0, 0, seed=0))
    assert (rollout.stop_reason, len(rollout.turns), rollout.reward) == ("timeout", 2, Reward(1.0))
