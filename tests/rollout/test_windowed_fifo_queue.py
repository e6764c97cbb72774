"""The queue against a list model and a simulated learner: every group ends once, and the lag bound holds and is
reached."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time

import pytest
from hypothesis import settings
from queue_machine import FakeClock, Learner, ProducersOfOneQueue, QueueAgainstListModel, complete, filled, ids

from north_lightning.errors import ConfigError, QueueError
from north_lightning.rollout.queue import WindowedFIFOQueue

# ---- order ---------------------------------------------------------------------------------------------------------


def test_the_window_is_trained_in_completion_order_and_nothing_beyond_it() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=4, window=3)
    filled(queue)
    complete(queue, 3, 2, 1)
    assert ids(queue.take(2)) == [2, 1]  # 3 finished first but lies beyond [0, 2]


def test_the_window_stays_anchored_at_the_oldest_group_when_younger_ones_are_taken() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=9, window=3)
    filled(queue)
    complete(queue, 1, 2, 3, 4)
    assert ids(queue.take(1)) == [1]
    assert ids(queue.take(1)) == [2]
    assert queue.take(1) is None  # 3 and 4 are finished, 0 is not
    complete(queue, 0)
    assert ids(queue.take(1)) == [0]
    assert ids(queue.take(2)) == [3, 4]


def test_a_window_of_one_is_a_strict_fifo() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=4, max_batches_ahead=0, window=1)
    filled(queue)
    complete(queue, 3, 1, 0, 2)
    assert ids(queue.take(4)) == [0, 1, 2, 3]


def test_a_window_as_wide_as_the_queue_is_completion_order() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=4, max_batches_ahead=0, window=4)
    filled(queue)
    complete(queue, 3, 1, 0, 2)
    assert ids(queue.take(4)) == [3, 1, 0, 2]


def test_an_unbounded_window_is_completion_order_for_ever_and_has_no_bound() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=1, window="unbounded")
    for newest in range(1, 20):
        filled(queue)
        complete(queue, newest)
        assert ids(queue.take(1)) == [newest]  # 0 is never finished
        queue.release([newest])
    assert queue.max_policy_lag(push_every_k=1) is None


def test_a_dropped_head_lets_the_window_slide() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=3, window=1)
    filled(queue)
    complete(queue, 1)
    assert queue.take(1) is None
    queue.drop(0, "SandboxError")
    assert ids(queue.take(1)) == [1]
    assert queue.stats()["dropped/SandboxError"] == 1.0


def test_take_is_all_or_nothing() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=3, max_batches_ahead=0, window=3)
    filled(queue)
    complete(queue, 0, 2)
    assert queue.take(3) is None
    complete(queue, 1)
    assert ids(queue.take(3)) == [0, 2, 1]


def test_slots_are_charged_until_release_and_freed_at_once_by_a_drop() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1)
    assert filled(queue) == [0, 1, 2, 3]
    complete(queue, 0, 1)
    assert ids(queue.take(2)) == [0, 1]
    assert queue.admit() is None  # taken, but not trained yet
    queue.release([0, 1])
    assert filled(queue) == [4, 5]
    queue.drop(3, "VerifierError")
    assert filled(queue) == [6]


@pytest.mark.parametrize(("num_groups", "ahead", "window"), [(64, 4, 96), (16, 1, 9), (1, 0, 1), (2, 0, 1)])
def test_the_default_window_is_three_tenths_of_the_slots(num_groups: int, ahead: int, window: int) -> None:
    assert WindowedFIFOQueue(num_groups, ahead).window == window


# ---- misuse --------------------------------------------------------------------------------------------------------


def test_a_group_ends_only_once() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1)
    filled(queue)
    complete(queue, 0)
    queue.drop(1, "SamplerError")
    for group_id in (0, 1, 17):
        with pytest.raises(QueueError, match=f"group {group_id} cannot be completed"):
            complete(queue, group_id)
        with pytest.raises(QueueError, match=f"group {group_id} cannot be dropped"):
            queue.drop(group_id, "again")
    assert queue.stats()["completed"] == 1.0
    assert "dropped/again" not in queue.stats()


def test_only_taken_groups_can_be_released_and_only_once() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=1)
    filled(queue)
    complete(queue, 0)
    for wrong in ([0], [5], [0, 0]):
        with pytest.raises(QueueError, match="release"):
            queue.release(wrong)
    queue.take(1)
    queue.release([0])
    with pytest.raises(QueueError, match="release"):
        queue.release([0])


@pytest.mark.parametrize("num_groups", [0, 3])
def test_take_refuses_what_can_never_be_there(num_groups: int) -> None:
    with pytest.raises(QueueError, match="between 1 and 2"):
        WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=1).take(num_groups)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("groups_per_batch", 0),
        ("max_batches_ahead", -1),
        ("window", 0),
        ("head_timeout_s", 0.0),
        ("head_requeues", -1),
        ("head_requeues", 1),  # of a head that may wait for ever
    ],
)
def test_wrong_settings_are_named(key: str, wrong: float) -> None:
    arguments = {"groups_per_batch": 2, "max_batches_ahead": 1, key: wrong}
    with pytest.raises(ConfigError, match=key):
        WindowedFIFOQueue(**arguments)  # type: ignore[arg-type]


# ---- head time-out -------------------------------------------------------------------------------------------------


def stuck_queue(clock: FakeClock) -> WindowedFIFOQueue:
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=3, window=2, head_timeout_s=10.0, clock=clock)
    filled(queue)
    complete(queue, 1, 2, 3)
    assert ids(queue.take(1)) == [1]
    assert queue.take(1) is None  # from now on 0 makes the trainer wait
    return queue


def test_a_head_that_makes_the_trainer_wait_too_long_is_dropped_visibly() -> None:
    clock = FakeClock()
    queue = stuck_queue(clock)
    clock.now += 9.9
    assert queue.take(1) is None
    assert queue.stats()["head_wait_s"] == pytest.approx(9.9)
    clock.now += 0.2
    queue.take(1)
    assert queue.stats()["dropped/head_timeout"] == 1.0
    assert queue.stats()["head_wait_s"] == 0.0
    assert ids(queue.take(1)) == [2]
    with pytest.raises(QueueError):
        complete(queue, 0)  # it comes in late


def test_a_stuck_head_is_begun_anew_in_its_place_before_it_is_dropped() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(1, max_batches_ahead=1, window=1, head_timeout_s=10.0, head_requeues=1, clock=clock)
    filled(queue)
    complete(queue, 1)
    for expected in ([0], None):  # the first time it is handed out once more, the second time it is not
        assert queue.take(1) is None
        clock.now += 10.0
        assert queue.take(1) is None
        assert queue.stats()["depth"] == (2.0 if expected else 1.0)
        if expected:
            assert queue.interrupted() == [0]
            assert filled(queue) == [0]
    assert (queue.interrupted(), queue.interrupted()) == ([0], [])
    assert queue.end_of(0) == "head_timeout"
    assert queue.stats()["requeued"] == queue.stats()["dropped/head_timeout"] == 1.0
    assert ids(queue.take(1)) == [1]


def test_a_group_that_comes_in_before_it_is_begun_anew_counts() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(1, max_batches_ahead=1, window=1, head_timeout_s=10.0, head_requeues=1, clock=clock)
    filled(queue)
    queue.take(1)
    clock.now += 10.0
    queue.take(1)
    complete(queue, 0)
    assert queue.admit() is None
    assert ids(queue.take(1)) == [0]


def test_a_group_handed_out_anew_is_not_called_interrupted_afterwards() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(1, max_batches_ahead=0, window=1, head_timeout_s=10.0, head_requeues=1, clock=clock)
    filled(queue)
    queue.take(1)
    clock.now += 10.0
    queue.take(1)
    assert queue.admit() == 0
    assert queue.interrupted() == []  # or the work that has just begun would be thrown away


def test_a_head_that_nobody_has_taken_up_again_is_not_timed_out_again() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(1, max_batches_ahead=0, window=1, head_timeout_s=10.0, head_requeues=1, clock=clock)
    filled(queue)
    for _ in range(6):
        assert queue.take(1) is None
        clock.now += 10.0
    assert queue.stats()["requeued"] == 1.0
    assert (queue.interrupted(), queue.interrupted()) == ([0], [])
    assert (queue.admit(), queue.admit()) == (0, None)
    complete(queue, 0)
    assert ids(queue.take(1)) == [0]
    queue.release([0])
    assert queue.admit() == 1  # not 0 once more, which has ended


def test_time_counts_only_while_the_trainer_waits() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=3, window=2, head_timeout_s=10.0, clock=clock)
    filled(queue)
    clock.now += 500.0  # nobody asked: the trainer is busy
    assert queue.take(1) is None
    assert "dropped/head_timeout" not in queue.stats()


def test_every_head_has_its_own_time() -> None:
    clock = FakeClock()
    queue = stuck_queue(clock)
    clock.now += 9.0
    complete(queue, 0)
    assert ids(queue.take(3)) == [0, 2, 3]
    assert filled(queue) == []
    queue.release([0, 1, 2, 3])
    filled(queue)
    assert queue.take(1) is None
    clock.now += 9.0  # 18 s of waiting in all, but for different heads
    assert queue.take(1) is None
    assert "dropped/head_timeout" not in queue.stats()


def test_a_new_head_gets_its_own_time_when_the_old_one_is_given_up() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=0, window=1, head_timeout_s=10.0, clock=clock)
    filled(queue)
    assert queue.take(2) is None
    clock.now += 9.0
    queue.drop(0, "SandboxError")
    assert queue.take(2) is None
    clock.now += 9.0
    assert queue.take(2) is None
    assert "dropped/head_timeout" not in queue.stats()


def test_a_finished_group_is_never_dropped_but_the_unfinished_one_behind_it_is() -> None:
    clock = FakeClock()
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=0, window=1, head_timeout_s=10.0, clock=clock)
    filled(queue)
    complete(queue, 0)
    assert queue.take(2) is None
    clock.now += 10.0
    assert queue.take(2) is None
    assert queue.stats()["dropped/head_timeout"] == 1.0
    complete(queue, *filled(queue))
    assert ids(queue.take(2)) == [0, 2]


def test_no_stuck_group_stops_training_forever() -> None:
    for num_groups, ahead, window in itertools.product((1, 2, 3), range(3), (1, 2, 5)):
        clock = FakeClock()
        queue = WindowedFIFOQueue(num_groups, ahead, window, head_timeout_s=10.0, clock=clock)
        trained = 0
        for _ in range(60):
            complete(queue, *[group_id for group_id in filled(queue) if group_id % 3])  # a third never finishes
            batch = ids(queue.take(num_groups))
            if batch is not None:
                trained += len(batch)
                queue.release(batch)
            clock.now += 6.0
        assert trained >= 2 * num_groups, (num_groups, ahead, window)


# ---- resume --------------------------------------------------------------------------------------------------------


def resumed(queue: WindowedFIFOQueue) -> WindowedFIFOQueue:
    state = json.loads(json.dumps(queue.state_dict()))
    other = WindowedFIFOQueue(queue.groups_per_batch, queue.max_batches_ahead, queue.window)
    other.load_state_dict(state)
    return other


def test_a_resumed_queue_hands_out_every_unended_group_again_oldest_first() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=2, window=4)
    filled(queue)
    complete(queue, 1, 2, 3)
    assert ids(queue.take(2)) == [1, 2]
    queue.release([1, 2])
    assert filled(queue) == [6, 7]
    queue.drop(4, "SandboxError")
    complete(queue, 0)
    assert ids(queue.take(2)) == [3, 0]  # taken, not released: not trained when the checkpoint is written
    after = resumed(queue)
    assert filled(after) == [0, 3, 5, 6, 7, 8]
    assert after.stats()["trained"] == 2.0
    assert after.stats()["dropped/SandboxError"] == 1.0


def test_groups_not_handed_out_again_yet_still_hold_the_window() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=3, window=2)
    filled(queue)
    after = resumed(queue)
    assert [after.admit(), after.admit()] == [0, 1]
    again = resumed(after)
    assert filled(again) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"next_id": 9},
        {"num_trained": 3},
        {"pending": [0, 0, 1, 2]},
        {"dropped": {"x": [7]}},
        {"dropped": {"x": [0]}, "num_trained": 1},
    ],
)
def test_a_ledger_that_does_not_add_up_is_refused(wrong: dict[str, object]) -> None:
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1)
    filled(queue)
    state = {**queue.state_dict(), **wrong}
    with pytest.raises(QueueError, match="every one of"):
        WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1).load_state_dict(state)


def test_a_used_queue_cannot_be_loaded_into() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1)
    queue.admit()
    with pytest.raises(QueueError, match="unused"):
        queue.load_state_dict(queue.state_dict())


# ---- policy lag ----------------------------------------------------------------------------------------------------


def lag_when_one_group_is_slowest(learner: Learner, slow: int) -> int:
    """Everything but ``slow`` finishes at once; it finishes when the trainer cannot go on without it."""
    queue = learner.queue
    while slow not in learner.trained:
        complete(queue, *[group_id for group_id in learner.admit_all() if group_id != slow])
        batch = ids(queue.take(queue.groups_per_batch))
        if batch is None:
            complete(queue, slow)
            batch = ids(queue.take(queue.groups_per_batch))
            assert batch is not None
        learner.train(batch)
    return learner.max_lag


SHAPES = [
    (num_groups, ahead, window, push_every_k)
    for num_groups, ahead, window, push_every_k in itertools.product((1, 2, 3, 4), range(4), range(1, 11), (1, 2, 3))
]


def test_the_lag_bound_is_reached_by_some_schedule_for_every_setting() -> None:
    for num_groups, ahead, window, push_every_k in SHAPES:
        observed, bound = 0, 0
        for slow in range(num_groups * (ahead + 2 + push_every_k)):
            queue = WindowedFIFOQueue(num_groups, ahead, window)
            bound = queue.max_policy_lag(push_every_k)
            observed = max(observed, lag_when_one_group_is_slowest(Learner(queue, push_every_k), slow))
        assert observed == bound, (num_groups, ahead, window, push_every_k)


def test_the_bound_of_the_published_setting_is_nine_steps() -> None:
    assert WindowedFIFOQueue(groups_per_batch=64, max_batches_ahead=4).max_policy_lag(push_every_k=4) == 9


def test_releasing_before_the_push_exceeds_the_bound_by_one() -> None:
    worst = 0
    for slow in range(20):
        queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1, window=3)
        learner = Learner(queue, push_every_k=2, releases_after_push=False)
        pending = learner.admit_all()
        while slow not in learner.trained:
            complete(queue, *[i for i in pending if i != slow])
            before = set(learner.sampled_at)
            batch = ids(queue.take(2))
            if batch is None:
                complete(queue, slow)
                batch = ids(queue.take(2))
                assert batch is not None
            learner.train(batch)
            pending = sorted(set(learner.sampled_at) - before)
        worst = max(worst, learner.max_lag)
    assert worst == queue.max_policy_lag(push_every_k=2) + 1


# ---- fairness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_slow_environment_keeps_its_share_of_every_prefix_to_within_the_window(window: int) -> None:
    """Even ids belong to the slow environment: they finish only when nothing else could be trained."""
    queue = WindowedFIFOQueue(groups_per_batch=1, max_batches_ahead=11, window=window)
    trained: list[int] = []
    worst = 0
    while len(trained) < 100:
        complete(queue, *[group_id for group_id in filled(queue) if group_id % 2])
        batch = ids(queue.take(1))
        if batch is None:
            slow = min(i for i in range(0, 1000, 2) if i not in trained)
            complete(queue, slow)
            continue
        queue.release(batch)
        trained += batch
        worst = max(worst, abs(sum(i % 2 for i in trained) - len(trained) // 2))
    assert worst <= window - 1
    assert window == 1 or worst >= (window - 1) // 2  # the schedule is as unfair as it can be


# ---- state machine -------------------------------------------------------------------------------------------------


QueueAgainstListModel.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestQueueAgainstListModel = QueueAgainstListModel.TestCase
ProducersOfOneQueue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestProducersOfOneQueue = ProducersOfOneQueue.TestCase


def test_threads_train_every_group_exactly_once() -> None:
    queue = WindowedFIFOQueue(groups_per_batch=3, max_batches_ahead=2, window=4)
    trained: list[int] = []
    stop = threading.Event()

    def produce(worker: int) -> None:
        shuffler = random.Random(worker)
        held: list[int] = []
        while not stop.is_set():
            group_id = queue.admit()
            if group_id is not None:
                held.append(group_id)
            else:
                time.sleep(0.001)
            if held and (group_id is None or shuffler.random() < 0.5):
                complete(queue, held.pop(shuffler.randrange(len(held))))

    producers = [threading.Thread(target=produce, args=(worker,)) for worker in range(3)]
    for thread in producers:
        thread.start()
    while len(trained) < 300:
        batch = ids(queue.take(3))
        if batch is None:
            time.sleep(0.001)
            continue
        trained += batch
        queue.release(batch)
    stop.set()
    for thread in producers:
        thread.join()
    assert len(set(trained)) == len(trained)
    assert max(trained) < len(trained) + queue.num_slots + queue.window
