"""Rollout times replayed on a virtual clock through a real ``RolloutQueue``: what the trainer waits, what gets trained.

In: seconds per rollout, a queue, the length of an optimizer step. Out: waiting, order, ages. Only the durations are
made up: admission, window, release and the age bound are the package's own.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean

from north_lightning.interfaces import RolloutQueue
from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.types import RolloutGroup

Trace = Callable[[int], Sequence[float]]
"""Group id -> seconds of each of its rollouts."""


def heavy_tailed_trace(seed: int, group_size: int, median_s: float, task_sigma: float, attempt_sigma: float) -> Trace:
    """Log-normal times: some tasks are long, and some attempts at any task. The same for the same seed and id."""

    @cache
    def durations(group_id: int) -> tuple[float, ...]:
        noise = random.Random(seed * 1_000_003 + group_id)
        task = median_s * noise.lognormvariate(0.0, task_sigma)
        return tuple(task * noise.lognormvariate(0.0, attempt_sigma) for _ in range(group_size))

    return durations


@dataclass
class Replay:
    """What happened. Times in virtual seconds."""

    waits_s: list[float] = field(default_factory=list)  # before every step
    trained: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)  # learner steps, of every trained group
    dropped: float = 0.0
    seconds: float = 0.0
    busy_s: float = 0.0  # of all samplers together

    def short_bias(self, trace: Trace, num_groups: int) -> float:
        """Mean time of the first ``num_groups`` dispatched over that of the first trained: 1 for a strict FIFO."""
        dispatched = fmean(max(trace(i)) for i in range(num_groups))
        return dispatched / fmean(max(trace(i)) for i in self.trained[:num_groups])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Simulation:
    """A trainer that takes ``step_s`` a step and samplers that work on one rollout each, in dispatch order.

    Args:
        num_samplers: rollouts at a time; None for as many as the queue admits.
        push_s: sampling and training stand still so long every ``push_every_k`` steps.
    """

    def __init__(
        self,
        queue: WindowedFIFOQueue,
        clock: Clock,
        trace: Trace,
        step_s: float,
        push_every_k: int,
        num_samplers: int | None = None,
        push_s: float = 0.0,
    ) -> None:
        self.queue: RolloutQueue = queue
        self.num_groups = queue.groups_per_batch
        self.clock = clock
        self.trace = trace
        self.step_s, self.push_every_k, self.push_s = step_s, push_every_k, push_s
        self.free = num_samplers
        self.backlog: deque[tuple[int, float]] = deque()
        self.ends: list[tuple[float, int]] = []  # heap of (time, group id), one per running rollout
        self.missing: dict[int, int] = {}
        self.served_step = 0
        self.sampled_at: dict[int, int] = {}
        self.result = Replay()

    def run(self, num_steps: int) -> Replay:
        for step in range(num_steps):
            self.dispatch()
            started = self.clock.now
            while (groups := self.queue.take(self.num_groups)) is None:
                self.advance_to_next_group()
            self.result.waits_s.append(self.clock.now - started)
            self.result.trained += [group.group_id for group in groups]
            self.result.ages += [step - self.sampled_at[group.group_id] for group in groups]
            self.advance(self.clock.now + self.step_s)
            if (step + 1) % self.push_every_k == 0:
                self.pause()
                self.served_step = step + 1
            self.queue.release([group.group_id for group in groups])
        self.result.seconds = self.clock.now
        self.result.dropped = sum(n for name, n in self.queue.stats().items() if name.startswith("dropped/"))
        return self.result

    def dispatch(self) -> None:
        while (group_id := self.queue.admit()) is not None:
            self.sampled_at[group_id] = self.served_step
            durations = self.trace(group_id)
            self.missing[group_id] = len(durations)
            self.backlog.extend((group_id, seconds) for seconds in durations)
        self.start_waiting()

    def start_waiting(self) -> None:
        while self.backlog and self.free != 0:
            group_id, seconds = self.backlog.popleft()
            heapq.heappush(self.ends, (self.clock.now + seconds, group_id))
            self.result.busy_s += seconds
            if self.free is not None:
                self.free -= 1

    def advance_to_next_group(self) -> None:
        unfinished = len(self.missing)
        while len(self.missing) == unfinished:
            self.advance(self.ends[0][0])

    def advance(self, until: float) -> None:
        while self.ends and self.ends[0][0] <= until:
            self.clock.now, group_id = heapq.heappop(self.ends)
            if self.free is not None:
                self.free += 1
            self.start_waiting()
            self.missing[group_id] -= 1
            if self.missing[group_id] == 0:
                del self.missing[group_id]
                self.queue.complete(RolloutGroup(group_id, "", "", []))
        self.clock.now = until

    def pause(self) -> None:
        """Requests in flight are kept, and go on after the push."""
        self.ends = [(end + self.push_s, group_id) for end, group_id in self.ends]
        self.clock.now += self.push_s
