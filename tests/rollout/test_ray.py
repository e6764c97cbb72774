"""Queue and producers in real Ray actors: the queue's promises, dead producers, a dead queue, who may come in."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy
import psutil
import pytest
from rollout_fakes import child_runner, make_task

from north_lightning.conformance.queues import CHECKS
from north_lightning.errors import ConfigError, InfrastructureError, QueueError
from north_lightning.rollout import FailurePolicy, ProducerSpec, WindowedFIFOQueue
from north_lightning.rollout.curriculum import PassRateCurriculum
from north_lightning.rollout.ray import RayProducers, RayQueue, RayRolloutProducer
from north_lightning.rollout.ray.cluster import connect
from north_lightning.rollout.ray.queue import QueueService
from north_lightning.rollout.ray.wire import pack, unpack
from north_lightning.types import Message, Reward, Rollout, RolloutGroup, ToolCall, Turn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

FAST = FailurePolicy(max_dispatches=3, redispatch_delay_s=0.05, max_consecutive_drops=3, max_child_restarts=2)
windowed = partial(WindowedFIFOQueue, groups_per_batch=2, max_batches_ahead=1, window=2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One of this machine's own, as a run without an address starts it, where Ray has been imported before."""
    import ray  # noqa: F401

    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    connected = connect(None)
    assert signal.getsignal(signal.SIGTERM) is handler
    yield connected
    connected.shutdown()
    for name in {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"} - set(before):
        del os.environ[name]


@pytest.fixture
def queue():
    made = RayQueue(windowed, timeout_s=30)
    yield made
    made.close()


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.05)


def group(group_id, num_tokens=4):
    rollout = Rollout(
        "task", "terminal", "family", group_id, 0, 7,
        list(range(num_tokens)), [True, False] * (num_tokens // 2), [-0.1] * num_tokens, [3] * num_tokens,
        numpy.arange(2 * num_tokens, dtype=numpy.int16).reshape(num_tokens, 2, 1),
        [Turn(0, 2, "stop", None)],
        [Message("assistant", "words", tool_calls=(ToolCall("0", "bash", {"a": [1, None]}),))],
        "finished", Reward(0.5, {"output": "\u00e4"}), -0.25, 1.5,
    )  # fmt: skip
    return RolloutGroup(group_id, "task", "terminal", [rollout])


# ---- what travels --------------------------------------------------------------------------------------------------


def test_a_group_comes_back_as_it_was():
    sent = group(3, 1000)
    got = unpack(pack(sent))
    assert got == sent
    expected = sent.rollouts[0].routed_experts
    assert got.rollouts[0].routed_experts.dtype == expected.dtype
    assert numpy.array_equal(got.rollouts[0].routed_experts, expected)


def test_what_is_no_plain_data_is_refused_and_nothing_is_executed_on_reading(tmp_path):
    bad = group(0)
    bad.rollouts[0].reward = Reward(1.0, {"object": object()})
    with pytest.raises(InfrastructureError, match="group 0 cannot be sent.*object is not plain data"):
        pack(bad)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/evil",)

    import pickle

    for data in (pickle.dumps(Evil()), b"", b"\x81\xa1a", b"\xc1", pack(group(0))[:-3]):
        with pytest.raises(InfrastructureError, match="expected a group of rollouts"):
            unpack(data)
    assert not (tmp_path / "evil").exists()


# ---- the queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_it_is_a_queue(name):
    made = []

    def make():
        made.append(RayQueue(windowed, timeout_s=30))
        return made[-1]

    try:
        CHECKS[name](make)
    finally:
        for one in made:
            one.close()


def test_groups_travel_and_settings_are_known_here(queue):
    assert (queue.groups_per_batch, queue.max_policy_lag(4)) == (2, windowed().max_policy_lag(4))
    for group_id in (queue.admit(), queue.admit()):
        queue.complete(group(group_id))
    assert queue.take(2) == [group(0), group(1)]
    with pytest.raises(QueueError, match="group 0 cannot be completed"):
        queue.complete(group(0))


def test_a_lost_producers_groups_are_handed_out_again_oldest_first_and_end_once(queue):
    one, two = queue.joined_by("one"), queue.joined_by("two")
    assert [one.admit(), two.admit(), one.admit(), two.admit()] == [0, 1, 2, 3]
    one.complete(group(2))
    assert queue.lose("one") == 1
    assert queue.stats()["orphans"] == 1
    assert two.admit() == 0
    assert two.admit() is None
    one.complete(group(0))  # it was not dead after all, and is first
    with pytest.raises(QueueError):
        two.complete(group(0))
    two.complete(group(1))
    assert [one.group_id for one in queue.take(2)] == [0, 2]  # 2 had to wait for the head
    queue.release([2, 0])
    assert [queue.end_of(group_id) for group_id in range(4)] == ["trained", None, "trained", None]


def test_a_group_begun_anew_by_another_is_told_to_the_first_alone():
    now = [0.0]
    service = QueueService(WindowedFIFOQueue(1, 1, window=1, head_timeout_s=1.0, head_requeues=1, clock=lambda: now[0]))
    assert (service.admit("one"), service.admit("two")) == (0, 1)
    for now[0] in (0.0, 2.0):
        assert service.take(1) is None
    assert service.admit("two") == 0
    assert (service.interrupted("two"), service.interrupted("one"), service.interrupted("one")) == ([], [0], [])
    for now[0] in (3.0, 5.0):
        assert service.take(1) is None  # and now it is given up
    assert (service.interrupted("one"), service.interrupted("two")) == ([], [0])
    assert service.end_of(0) == "head_timeout"
    assert service.lose("two") == 1  # group 1


def test_a_producer_that_starts_its_own_group_over_is_not_told_to_leave_it():
    now = [0.0]
    service = QueueService(WindowedFIFOQueue(1, 1, window=1, head_timeout_s=1.0, head_requeues=1, clock=lambda: now[0]))
    assert service.admit("one") == 0
    for now[0] in (0.0, 2.0):
        assert service.take(1) is None
    assert service.interrupted("two") == []  # who asks first takes note for all
    assert service.admit("one") == 0
    assert service.interrupted("one") == []


def test_a_group_given_up_while_its_producer_was_lost_is_not_handed_out():
    now = [0.0]
    service = QueueService(WindowedFIFOQueue(1, 1, window=1, head_timeout_s=1.0, clock=lambda: now[0]))
    assert service.admit("one") == 0
    assert service.lose("one") == 1
    for now[0] in (0.0, 2.0):
        assert service.take(1) is None
    assert service.end_of(0) == "head_timeout"
    assert service.admit("two") == 1


def test_a_dead_queue_is_an_error_and_no_hang(queue):
    queue.admit()
    connect(None).kill(queue._actor)
    for call in (queue.admit, lambda: queue.take(1), queue.stats, queue.state_dict):
        with pytest.raises(InfrastructureError, match="the queue's actor is gone"):
            call()


def test_a_silent_queue_is_an_error_in_time(cluster):
    queue = RayQueue(windowed, timeout_s=30)
    queue.admit()
    queue.timeout_s = 0.5
    pid = cluster.get(queue._actor.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(InfrastructureError, match=r"did not answer admit in 0.5 s"):
            queue.admit()
    finally:
        os.kill(pid, signal.SIGKILL)


# ---- who may come in -----------------------------------------------------------------------------------------------


def test_who_does_not_know_the_token_is_not_let_in(cluster):
    address = cluster.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    program = f"from ray._raylet import GcsClient as C; print('inside', C({address!r}).internal_kv_keys(b'', None))"

    def ask(**more):
        done = subprocess.run([sys.executable, "-c", program], env=environment | more, capture_output=True, timeout=60)
        return (done.stdout + done.stderr).decode()

    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    assert "inside" in ask(**token)
    for wrong in ({"HOME": "/nonexistent"}, token | {"RAY_AUTH_TOKEN": "0" * 64}):
        said = ask(**wrong)
        assert "inside" not in said
        assert "InvalidAuthToken" in said


def test_a_cluster_that_asks_for_no_token_is_refused(monkeypatch, cluster):
    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConfigError, match="token authentication"):
        connect("10.0.0.1:6379")


# ---- producers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path):
    return [make_task(tmp_path / f"task{i}", name=f"task{i}") for i in range(5)]


def producers(queue, tasks, tokenizer_dir, tmp_path, sample_s=0.0, num=2, path=None):
    make_runner = partial(child_runner, tokenizer_dir, {}, tmp_path / "once", sample_s)
    spec = ProducerSpec(tasks, make_runner, group_size=2, max_concurrent_groups=2, seed=1)
    return RayRolloutProducer(RayProducers(num, num_cpus=0), queue, spec, FAST, path)


def train(queue, producer, num_batches):
    trained = []
    for _ in range(num_batches):
        groups = None

        def taken():
            nonlocal groups
            producer.check()
            groups = queue.take(2)
            return groups is not None

        wait_until(taken)
        queue.release([group.group_id for group in groups])
        trained += groups
    return trained


def test_two_producers_fill_the_queue_and_agree_on_the_tasks(queue, tasks, tokenizer_dir, tmp_path):
    producer = producers(queue, tasks, tokenizer_dir, tmp_path, path=tmp_path / "rollouts.jsonl")
    producer.start()
    try:
        trained = train(queue, producer, 6)
        wait_until(lambda: producer.stats().get("completed", 0) >= 12)
        assert producer.stats()["actors"] == 2
        producer.suspend()
        producer.resume()
        trained += train(queue, producer, 2)
    finally:
        producer.stop()
    assert sorted(group.group_id for group in trained) == list(range(16))
    assert all(group.task_id == producer.schedule.task(group.group_id).id for group in trained)
    assert all(len(group.rollouts) == 2 and group.rollouts[0].token_ids for group in trained)
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert len(lines) >= 32


def test_a_killed_producer_is_replaced_and_no_group_is_lost(queue, tasks, tokenizer_dir, tmp_path, cluster):
    producer = producers(queue, tasks, tokenizer_dir, tmp_path, sample_s=0.05)
    producer.start()
    try:
        trained = train(queue, producer, 2)
        os.kill(pid_of(cluster, producer._members[0]), signal.SIGKILL)
        wait_until(lambda: producer.stats().get("actor_restarts", 0) == 1)
        trained += train(queue, producer, 8)
        assert sorted(group.group_id for group in trained) == list(range(20))
        assert not [name for name in queue.stats() if name.startswith("dropped/")]
        pids = [pid_of(cluster, member) for member in producer._members]
        pids += [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    finally:
        producer.stop()
    wait_until(lambda: not any(psutil.pid_exists(getattr(pid, "pid", pid)) for pid in pids))


def pid_of(cluster, member):
    return cluster.get(member.actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)


def test_what_no_retry_mends_stops_the_run(queue, tasks, tmp_path):
    producer = producers(queue, tasks, tmp_path / "no tokenizer", tmp_path)
    with pytest.raises(Exception, match="tokenizer"):
        producer.start()
    assert producer.stats()["actors"] == 0


def test_what_actors_cannot_do_is_said(queue, tasks, tmp_path):
    spec = ProducerSpec(
        tasks, partial(child_runner, tmp_path, {}, tmp_path, 0.0), 2, 2, curriculum=PassRateCurriculum()
    )
    with pytest.raises(ConfigError, match=r"curriculum: expected none .*PassRateCurriculum"):
        RayRolloutProducer(RayProducers(1), queue, spec)
    with pytest.raises(ConfigError, match="TimeAccounts"):
        producers(queue, tasks, tmp_path, tmp_path).listen(print)
    with pytest.raises(ConfigError, match="num_producers"):
        RayProducers(0)


def test_calls_come_from_several_threads_at_once(queue):
    ids, lock = [], threading.Lock()

    def admit():
        for _ in range(2):
            group_id = queue.admit()
            if group_id is not None:
                with lock:
                    ids.append(group_id)

    threads = [threading.Thread(target=admit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == [0, 1, 2, 3]
