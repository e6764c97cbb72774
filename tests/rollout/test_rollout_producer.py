"""The rollout process and the thread that feeds it: nothing is lost, whatever fails, and nothing survives the
trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from rollout_fakes import child_runner, make_task, no_runner

from north_lightning.errors import ConfigError, InfrastructureError, SandboxUnavailableError
from north_lightning.rollout import FailurePolicy, ProducerSpec, RolloutProducer, TaskSchedule, WindowedFIFOQueue
from north_lightning.rollout.accounts import Began, Ended, Event, SamplerAccounts
from north_lightning.types import RolloutGroup, Task

FAST = FailurePolicy(max_dispatches=2, redispatch_delay_s=0.05, max_consecutive_drops=3, max_child_restarts=2)
HERE = Path(__file__).parent


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    return [make_task(tmp_path / f"task{i}", name=f"task{i}") for i in range(5)]


@pytest.fixture
def queue() -> WindowedFIFOQueue:
    return WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1, window=1)


@contextmanager
def producing(
    queue: WindowedFIFOQueue,
    tasks: list[Task],
    tokenizer_dir: Path,
    once: Path,
    plan: dict[int, str] | None = None,
    failures: FailurePolicy = FAST,
    rollouts_path: Path | None = None,
    sample_s: float = 0.0,
) -> Iterator[RolloutProducer]:
    make_runner = partial(child_runner, tokenizer_dir, plan or {}, once, sample_s)
    spec = ProducerSpec(tasks, make_runner, group_size=2, max_concurrent_groups=3, seed=1)
    producer = RolloutProducer(queue, spec, failures, rollouts_path)
    producer.start()
    try:
        yield producer
    finally:
        producer.stop()


def train(queue: WindowedFIFOQueue, producer: RolloutProducer, num_batches: int) -> list[RolloutGroup]:
    trained = []
    for _ in range(num_batches):
        wait_for(lambda: bool(trained_one(queue, trained)), producer)
    return trained


def trained_one(queue: WindowedFIFOQueue, trained: list[RolloutGroup]) -> bool:
    batch = queue.take(queue.groups_per_batch)
    if batch is None:
        return False
    queue.release([group.group_id for group in batch])
    trained += batch
    return True


def wait_for(happened: Callable[[], bool], producer: RolloutProducer, timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        producer.check()
        assert time.monotonic() < deadline, (producer.stats(), "waited too long")
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- the normal course ---------------------------------------------------------------------------------------------


def test_groups_flow_from_the_process_to_the_trainer(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "rollouts.jsonl"
    with producing(queue, tasks, tokenizer_dir, tmp_path, rollouts_path=path) as producer:
        assert producer.heavy_modules == ()  # no torch, no lightning
        trained = train(queue, producer, 6)
        pid = producer.child_pid
        assert pid is not None
        assert is_running(pid)
    assert not is_running(pid)
    assert sorted(group.group_id for group in trained) == list(range(12))
    schedule = TaskSchedule(tasks, seed=1)
    for group in trained:
        assert group.task_id == schedule.task(group.group_id).id
        assert group.rewards == [0.0, 1.0]
        assert [rollout.advantage for rollout in group.rollouts] == [-1.0, 1.0]
        assert all(rollout.num_sampled_tokens > 0 for rollout in group.rollouts)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(record["group_id"], record["index"]) for record in records} >= {
        (i, j) for i in range(12) for j in range(2)
    }


def test_what_the_process_does_is_told_to_who_listens(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Group 1 fails for good; the process is killed once. Every dispatch that counted comes to an end that is told."""
    started = time.monotonic()
    events: list[Event] = []
    with producing(queue, tasks, tokenizer_dir, tmp_path, {1: "raise"}, sample_s=0.05) as producer:
        producer.listen(events.append)
        trained = train(queue, producer, 2)
        assert producer.child_pid is not None
        os.kill(producer.child_pid, signal.SIGKILL)
        trained += train(queue, producer, 2)
    accounts = SamplerAccounts(1, started)
    accounts.add(events)
    assert started < accounts.until_s <= time.monotonic()
    assert sum(accounts.seconds[0].values()) == pytest.approx(accounts.until_s - started)
    handed = [event.group_id for event in events if isinstance(event, Ended) and event.group_id is not None]
    assert {group.group_id for group in trained} <= set(handed)
    assert 1 not in handed
    assert [type(event) for event in events].count(Began) == 1
    generated_for = accounts.generated_for(queue.end_of)
    assert generated_for["trained"] >= 8 * 0.05 / 3  # that many groups, at most three of them at a time
    assert generated_for["discarded"] > 0
    assert sum(generated_for.values()) == pytest.approx(accounts.seconds[0]["generating"])


def test_a_stopped_producer_goes_on_where_it_was(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, sample_s=0.1) as producer:
        wait_for(lambda: producer.stats()["running"] == 3.0, producer)
        producer.stop()
        in_flight = queue.stats()["in_flight"]
        producer.start()
        trained = train(queue, producer, 3)
    assert in_flight > 0
    assert sorted(group.group_id for group in trained) == list(range(6))


def test_suspended_work_is_done_again_and_failures_before_are_forgiven(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    plan = {0: "once raise", 1: "once slow"}
    with producing(queue, tasks, tokenizer_dir, tmp_path, plan, sample_s=0.1) as producer:
        wait_for(lambda: producer.stats().get("redispatched", 0.0) == 1.0, producer)
        wait_for((tmp_path / "1").exists, producer)
        producer.suspend()
        wait_for(lambda: producer.stats()["running"] == 0.0, producer)
        completed = queue.stats()["completed"]
        time.sleep(0.3)
        assert queue.stats()["completed"] == completed
        wait_for((tmp_path / "cancelled").exists, producer)
        (tmp_path / "0").unlink()  # group 0 fails once more: with two dispatches it would be dropped
        producer.resume()
        trained = train(queue, producer, 3)
    assert sorted(group.group_id for group in trained) == list(range(6))


def test_a_group_the_queue_has_given_up_comes_in_late(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, sample_s=0.2) as producer:
        wait_for(lambda: queue.stats()["in_flight"] > 0, producer)
        queue.drop(0, "head_timeout")
        trained = train(queue, producer, 2)
        assert producer.stats()["late"] == 1.0
    assert 0 not in [group.group_id for group in trained]


def test_a_stuck_head_is_cancelled_and_begun_anew(tasks: list[Task], tokenizer_dir: Path, tmp_path: Path) -> None:
    queue = WindowedFIFOQueue(2, max_batches_ahead=1, window=1, head_timeout_s=1.0, head_requeues=1)
    with producing(queue, tasks, tokenizer_dir, tmp_path, {0: "once slow", 2: "slow"}) as producer:
        trained = train(queue, producer, 2)
        assert producer.stats()["interrupted"] >= 2.0
    assert (tmp_path / "cancelled").exists()
    assert [group.group_id for group in trained] == [0, 1, 3, 4]
    assert (queue.end_of(0), queue.end_of(2)) == ("trained", "head_timeout")


# ---- failing groups ------------------------------------------------------------------------------------------------


def test_a_failed_group_is_tried_again_then_dropped_with_its_reason(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    plan = {0: "once raise", 1: "raise", 3: "lambda"}
    with producing(queue, tasks, tokenizer_dir, tmp_path, plan) as producer:
        trained = train(queue, producer, 3)
        stats = producer.stats()
    assert sorted(group.group_id for group in trained) == [0, 2, 4, 5, 6, 7]
    assert queue.stats()["dropped/VerifierError"] == 1.0
    assert queue.stats()["dropped/InfrastructureError"] == 1.0
    assert stats["failures/VerifierError"] == 3.0
    assert stats["failures/InfrastructureError"] == 2.0
    assert stats["redispatched"] == 3.0


def test_too_many_drops_in_a_row_stop_the_run_with_the_reason(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, {-1: "raise"}) as producer:
        with pytest.raises(InfrastructureError, match=r"3 groups in a row.*VerifierError.*no verdict"):
            wait_for(lambda: False, producer)
        pid = producer.child_pid
        wait_for_end = time.monotonic() + 100
        while pid is not None and is_running(pid) and time.monotonic() < wait_for_end:
            time.sleep(0.05)
        assert producer.child_pid is None


def test_what_repeats_with_the_seed_is_dropped_at_once_and_stops_no_run(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four groups in a row, where three of another kind would stop the run; a fifth task can be tried."""
    with producing(queue, tasks, tokenizer_dir, tmp_path, {0: "own", 1: "long", 2: "own", 3: "own"}) as producer:
        trained = train(queue, producer, 2)
        stats = producer.stats()
    assert [group.group_id for group in trained] == [4, 5, 6, 7]
    assert queue.stats()["dropped/AttemptError"] == stats["failures/AttemptError"] == 3.0
    assert queue.stats()["dropped/PromptTooLongError"] == stats["failures/PromptTooLongError"] == 1.0
    assert "redispatched" not in stats
    task_id = TaskSchedule(tasks, seed=1).task(1).id
    assert f"group 1 (task {task_id}) dropped after 1 dispatches: PromptTooLongError: max_context" in caplog.text


@pytest.mark.parametrize("fault", ["own", "long"])
def test_a_run_in_which_no_task_can_be_tried_stops(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path, fault: str
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, {-1: fault}) as producer:
        with pytest.raises(
            InfrastructureError, match=r"\d groups in a row failed .*the last: (Attempt|PromptTooLong)Err"
        ):
            wait_for(lambda: False, producer)
        assert producer.stats()[f"failures/{'AttemptError' if fault == 'own' else 'PromptTooLongError'}"] >= 5.0


def test_a_mistake_in_the_process_is_raised_in_the_trainer_with_its_type(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, {1: "config"}) as producer:
        with pytest.raises(ConfigError, match="expected a key") as caught:
            wait_for(lambda: False, producer)
        assert "rollout_fakes.py" in "".join(caught.value.__notes__)


def test_a_runner_that_cannot_be_built_fails_the_start(queue: WindowedFIFOQueue, tasks: list[Task]) -> None:
    producer = RolloutProducer(queue, ProducerSpec(tasks, no_runner, group_size=2, max_concurrent_groups=1))
    with pytest.raises(SandboxUnavailableError, match="apt-get install bubblewrap"):
        producer.start()
    producer.stop()


# ---- a failing process ---------------------------------------------------------------------------------------------


def test_a_killed_process_is_restarted_and_loses_no_group(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, sample_s=0.1) as producer:
        trained = train(queue, producer, 1)
        pid = producer.child_pid
        assert pid is not None
        wait_for(lambda: producer.stats()["running"] > 0, producer)
        os.kill(pid, signal.SIGKILL)
        trained += train(queue, producer, 3)
        assert producer.child_pid != pid
        assert producer.stats()["child_restarts"] == 1.0
    assert sorted(group.group_id for group in trained) == list(range(8))


def test_a_blocked_process_is_noticed_and_replaced(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    impatient = FailurePolicy(max_dispatches=3, redispatch_delay_s=0.05, heartbeat_timeout_s=4.0)
    with producing(queue, tasks, tokenizer_dir, tmp_path, {1: "once block"}, impatient) as producer:
        trained = train(queue, producer, 2)
        assert producer.stats()["child_restarts"] >= 1.0
    assert sorted(group.group_id for group in trained) == list(range(4))


def test_a_busy_process_is_reported_and_not_replaced(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It works for 5 s without a word, where 2 are allowed."""
    impatient = FailurePolicy(max_dispatches=3, redispatch_delay_s=0.05, heartbeat_timeout_s=2.0)
    with producing(queue, tasks, tokenizer_dir, tmp_path, {1: "once spin"}, impatient) as producer:
        trained = train(queue, producer, 2)
        stats = producer.stats()
    assert "child_restarts" not in stats
    assert stats["slow"] >= 1.0
    assert "said nothing for 2 s, but works: in 1 s it ran" in caplog.text
    assert sorted(group.group_id for group in trained) == list(range(4))


def test_a_process_that_works_for_ever_without_a_word_is_replaced(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("north_lightning.rollout.producer.MAX_SILENT_WORK_S", 0.5)
    impatient = FailurePolicy(max_dispatches=3, redispatch_delay_s=0.05, heartbeat_timeout_s=2.0)
    with producing(queue, tasks, tokenizer_dir, tmp_path, {1: "once spin"}, impatient) as producer:
        train(queue, producer, 2)
        assert producer.stats()["child_restarts"] == 1.0


def test_a_process_that_keeps_dying_stops_the_run(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    patient = FailurePolicy(max_dispatches=99, redispatch_delay_s=0.01, max_child_restarts=1)
    message = r"exit code 3.*2 times with no group completed"
    with (
        producing(queue, tasks, tokenizer_dir, tmp_path, {-1: "exit"}, patient) as producer,
        pytest.raises(InfrastructureError, match=message),
    ):
        wait_for(lambda: False, producer)


# ---- signals -------------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_the_process_running_and_its_programs_interruptible(
    queue: WindowedFIFOQueue, tasks: list[Task], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with producing(queue, tasks, tokenizer_dir, tmp_path, {-1: "signals"}) as producer:
        pid = producer.child_pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        trained = train(queue, producer, 2)
        assert producer.child_pid == pid
    for rollout in trained[-1].rollouts:
        assert rollout.reward is not None
        for mask in ("SigIgn", "SigBlk"):
            assert not int(rollout.reward.details[mask], 16) & (1 << (signal.SIGINT - 1)), mask


TRAINER = """
import signal, sys, time
from functools import partial
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
sys.path.insert(0, {here!r})
from rollout_fakes import child_runner, make_task
from north_lightning.rollout import ProducerSpec, RolloutProducer, WindowedFIFOQueue

if __name__ == "__main__":
    scratch = Path({scratch!r})
    runner = partial(child_runner, Path({tokenizer!r}), {{-1: {fault!r}}}, scratch)
    spec = ProducerSpec([make_task(scratch / "task")], runner, group_size=2, max_concurrent_groups=2)
    producer = RolloutProducer(WindowedFIFOQueue(2, 1), spec)
    producer.start()
    while not producer.stats()["running"]:
        time.sleep(0.01)
    time.sleep(0.5)
    print(producer.child_pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "fault"),
    [(signal.SIGTERM, "slow"), (signal.SIGINT, "slow"), (signal.SIGKILL, "slow"), (signal.SIGKILL, "block")],
)
def test_no_process_outlives_the_trainer(
    tokenizer_dir: Path, tmp_path: Path, number: signal.Signals, fault: str
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(here=str(HERE), scratch=str(tmp_path), tokenizer=str(tokenizer_dir), fault=fault))
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent)
    assert trainer.stdout is not None
    child = int(trainer.stdout.readline())
    assert is_running(child)
    trainer.send_signal(number)
    trainer.wait(100)
    deadline = time.monotonic() + 100
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_package_imports_neither_torch_nor_lightning() -> None:
    program = (
        "import sys, north_lightning.rollout, north_lightning.rollout.metrics, north_lightning.rollout.child;"
        "print([name for name in ('torch', 'lightning', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
