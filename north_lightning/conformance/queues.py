"""What a ``RolloutQueue`` promises, whatever its order: every group ends once, and a resume loses none."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable

from north_lightning.conformance.child import Broken
from north_lightning.errors import QueueError
from north_lightning.interfaces import RolloutQueue
from north_lightning.types import RolloutGroup

Make = Callable[[], RolloutQueue]

MAX_SLOTS = 10_000
MAX_WAIT_S = 20.0


def group(group_id: int) -> RolloutGroup:
    return RolloutGroup(group_id, f"task{group_id}", "terminal", [])


def filled(queue: RolloutQueue) -> list[int]:
    """Admit until the queue says no."""
    ids = []
    while (group_id := queue.admit()) is not None:
        ids.append(group_id)
        if len(ids) > MAX_SLOTS:
            raise Broken(f"admitted more than {MAX_SLOTS} groups and never said no")
    return ids


def drained(queue: RolloutQueue) -> list[int]:
    """Take and release one group at a time until there is none."""
    taken: list[int] = []
    while (batch := queue.take(1)) is not None:
        if len(batch) != 1:
            raise Broken(f"take(1): expected one group, got {len(batch)}")
        taken.append(batch[0].group_id)
        queue.release([batch[0].group_id])
        if len(taken) > MAX_SLOTS:
            raise Broken("take gives the same groups for ever")
    return taken


def counts_from_zero(make: Make) -> None:
    """Ids count up from 0 until every slot is charged."""
    ids = filled(make())
    if not ids or ids != list(range(len(ids))):
        raise Broken(f"expected ids 0, 1, 2, ..., got {ids[:10]}")


def gives_back_what_was_completed(make: Make) -> None:
    """Every completed group comes out once, and its slot is free again."""
    queue = make()
    ids = filled(queue)
    for group_id in reversed(ids):
        queue.complete(group(group_id))
    taken = drained(queue)
    if sorted(taken) != ids:
        raise Broken(f"completed {len(ids)} groups; expected each once, got {sorted(taken)[:10]}...")
    if not filled(queue):
        raise Broken("released groups did not free their slots")


def frees_the_slot_of_what_is_dropped(make: Make) -> None:
    """At once, visibly."""
    queue = make()
    first, *_ = filled(queue)
    queue.drop(first, "SandboxError")
    if queue.admit() is None:
        raise Broken("a dropped group did not free its slot")
    if queue.stats().get("dropped/SandboxError") != 1:
        raise Broken(f"stats: expected dropped/SandboxError of 1, got {dict(queue.stats())}")


def lets_a_group_end_once(make: Make) -> None:
    """``QueueError`` for a group that is unknown or has ended."""
    queue = make()
    ids = filled(queue)
    queue.complete(group(ids[0]))
    for name, call in (
        ("completed twice", lambda: queue.complete(group(ids[0]))),
        ("dropped when complete", lambda: queue.drop(ids[0], "late")),
        ("completed, never admitted", lambda: queue.complete(group(MAX_SLOTS * 2))),
    ):
        try:
            call()
        except QueueError:
            continue
        raise Broken(f"a group was {name}: expected a QueueError, got none")


def does_not_block(make: Make) -> None:
    """``take`` answers None while there is nothing to take."""
    queue = make()
    if queue.take(1) is not None:
        raise Broken("take(1) of an empty queue: expected None, got groups")


def resumes(make: Make) -> None:
    """From primitives: what was not trained comes again, what was trained does not."""
    queue = make()
    ids = filled(queue)
    for group_id in ids:
        queue.complete(group(group_id))
    batch = queue.take(1)
    if batch is None:
        raise Broken("take(1): expected a group, as all were completed, got None")
    trained = batch[0].group_id
    queue.release([trained])
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(queue.state_dict())))
    again = filled(resumed)
    for group_id in again:
        resumed.complete(group(group_id))
    ended = drained(resumed)
    if trained in ended or not set(ids) - {trained} <= set(ended):
        raise Broken(f"of {ids}, {trained} was trained; after a resume came {sorted(ended)}")


def counts_in_numbers(make: Make) -> None:
    """``stats`` are finite numbers by name."""
    queue = make()
    filled(queue)
    bad = {
        key: value
        for key, value in queue.stats().items()
        if not isinstance(value, int | float) or not math.isfinite(value)
    }
    if bad:
        raise Broken(f"stats: expected finite numbers, got {bad}")


def works_from_several_threads(make: Make) -> None:
    """Groups admitted and completed by four threads come out once each."""
    queue = make()
    lock, admitted, taken, failures = threading.Lock(), [0], [], []
    wanted = 4 * len(filled(make())) + 50
    deadline = time.monotonic() + MAX_WAIT_S

    def produce() -> None:
        try:
            while time.monotonic() < deadline:
                with lock:
                    if admitted[0] >= wanted:
                        return
                    group_id = queue.admit()
                    admitted[0] += group_id is not None
                if group_id is not None:
                    queue.complete(group(group_id))
        except Exception as error:
            failures.append(error)

    producers = [threading.Thread(target=produce, daemon=True) for _ in range(4)]
    for producer in producers:
        producer.start()
    while any(producer.is_alive() for producer in producers):
        taken += drained(queue)
    taken += drained(queue)
    if failures:
        raise Broken(f"a thread failed: {type(failures[0]).__name__}: {failures[0]}")
    if sorted(taken) != list(range(wanted)):
        raise Broken(f"expected {wanted} groups once each, got {len(taken)}, {len(set(taken))} different")


def keeps_its_ledger_in_any_order(make: Make) -> None:
    """Random calls, resumes among them: every group ends once, and whatever does not fit its state is refused."""
    chance, queue = random.Random(0), make()
    states: dict[int, str] = {}  # of every group that was admitted
    for _ in range(600):
        group_id = chance.randrange(max(0, len(states) - 9), len(states) + 1)
        state = states.get(group_id, "not admitted")
        name, arguments, fits, becomes = chance.choice(
            [
                ("complete", (group(group_id),), "in flight", "completed"),
                ("drop", (group_id, "SandboxError"), "in flight", "ended"),
                ("release", ([group_id],), "taken", "ended"),
            ]
        )
        try:
            getattr(queue, name)(*arguments)
            states[group_id], refused = becomes, False
        except QueueError:
            refused = True
        if refused is (state == fits):
            raise Broken(f"{name} of a group that is {state}: {'refused' if refused else 'expected a QueueError'}")
        if (queue.end_of(group_id) is None) is (states.get(group_id) == "ended"):
            raise Broken(f"end_of({group_id}): got {queue.end_of(group_id)!r}, but it is {states.get(group_id)}")
        given = queue.admit()
        if given is not None and states.get(given, "pending") not in ("pending", "in flight"):
            raise Broken(f"admit: group {given} is handed out, but is {states[given]}")
        states |= {} if given is None else {given: "in flight"}
        for taken in queue.take(1) or [] if chance.random() < 0.5 else []:
            if states.get(taken.group_id) != "completed":
                raise Broken(f"take: got group {taken.group_id}, which is {states.get(taken.group_id)}")
            states[taken.group_id] = "taken"
        if chance.random() < 0.01:
            saved, queue = json.loads(json.dumps(queue.state_dict())), make()
            queue.load_state_dict(saved)
            states = {i: was if was == "ended" else "pending" for i, was in states.items()}


CHECKS: dict[str, Callable[[Make], None]] = {
    "counts from zero": counts_from_zero,
    "gives back what was completed": gives_back_what_was_completed,
    "frees the slot of what is dropped": frees_the_slot_of_what_is_dropped,
    "lets a group end once": lets_a_group_end_once,
    "does not block": does_not_block,
    "resumes": resumes,
    "counts in numbers": counts_in_numbers,
    "keeps its ledger in any order": keeps_its_ledger_in_any_order,
    "works from several threads": works_from_several_threads,
}
