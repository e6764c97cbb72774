"""Where every second of the samplers went: each server is in exactly one account at every instant.

In: the moves of all attempts (``journal``), what became of each dispatch, when servers stood still or were down. Out:
seconds by account, which add up to the time that went by. Nothing is measured here, and it knows no thread.

    down         being started again
    paused       for a push of weights
    generating   at least one request is with the server; shared equally among the requests that are with it
    sandbox, harness, verifier
                 idle: no request, and the attempts there are wait for these; shared equally among them
    no_rollouts  idle without any attempt that waits: the queue is full, or the rollout process is starting
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from north_lightning.rollout.journal import STAGES, Move

AWAY = ("paused", "down")
ACCOUNTS = ("generating", *STAGES, "no_rollouts", *AWAY)
PURPOSES = ("trained", "discarded", "pending")
"""What was generated for: groups that were trained; that were dropped, or tries that failed; that have not ended."""


class Told(NamedTuple):
    """All that happened in the rollout process before."""

    at_s: float
    moves: Sequence[Move]


class Ended(NamedTuple):
    """What became of a dispatch: the group that it completed, or None."""

    dispatch: int
    group_id: int | None


class Began(NamedTuple):
    """A rollout process; whatever one before it was doing is lost."""

    at_s: float


Event = Told | Ended | Began


class SamplerAccounts:
    """Adds up what it is told, in order.

    Args:
        num_servers: Their accounts are kept apart.
        started_at_s: From when on, of the clock of the moves.
    """

    def __init__(self, num_servers: int, started_at_s: float) -> None:
        self.seconds = [dict.fromkeys(ACCOUNTS, 0.0) for _ in range(num_servers)]
        """Of each server, by account, up to ``until_s``."""
        self.until_s = started_at_s
        self._away: list[list[tuple[float, float, str]]] = [[] for _ in range(num_servers)]
        self._attempts: dict[int, _Attempt] = {}  # that there are
        self._num_at = Counter[str | int]()  # stage or server -> attempts there
        self._share = [0.0] * num_servers  # seconds that a request has had which was always there
        self._of_dispatch = defaultdict[int, float](float)  # seconds of generating, as are the following
        self._of_group = defaultdict[int, float](float)
        self._of_lost = 0.0
        self._lost: set[int] = set()  # dispatches

    def away(self, server: int, since_s: float, until_s: float, account: str) -> None:
        """The server was ``paused`` or ``down``, whatever was asked of it. Told before what happened after it."""
        since_s = max([since_s, *(until for _, until, _ in self._away[server])])
        if since_s < until_s:
            self._away[server].append((since_s, until_s, account))

    def add(self, events: Iterable[Event]) -> None:
        """What happened next."""
        for event in events:
            if isinstance(event, Told):
                for move in event.moves:
                    self._advance(move.at_s)
                    self._make(move)
                self._advance(event.at_s)
            elif isinstance(event, Ended):
                self._end(event)
            else:
                self._advance(event.at_s)
                self._of_lost += sum(self._leave(number).spent_s for number in list(self._attempts))
                self._of_lost += sum(self._of_dispatch.values())
                self._of_dispatch.clear()

    def generated_for(self, end_of: Callable[[int], str | None]) -> dict[str, float]:
        """Seconds of generating, of all servers, by ``PURPOSES``; ``end_of`` is the queue's ledger."""
        purposes = dict.fromkeys(PURPOSES, 0.0)
        purposes["discarded"] = self._of_lost
        for group_id, seconds in self._of_group.items():
            end = end_of(group_id)
            if end is not None:
                purposes["trained" if end == "trained" else "discarded"] += seconds
        generating = sum(seconds["generating"] for seconds in self.seconds)
        purposes["pending"] = generating - purposes["trained"] - purposes["discarded"]
        return purposes

    def _advance(self, to_s: float) -> None:
        """Charge the time until then, in which nothing changed."""
        elapsed_s = to_s - self.until_s
        if elapsed_s <= 0:
            return
        for server, seconds in enumerate(self.seconds):
            left_s = elapsed_s
            for since_s, until_s, account in self._away[server]:
                overlap_s = max(0.0, min(to_s, until_s) - max(self.until_s, since_s))
                seconds[account] += overlap_s
                left_s -= overlap_s
            self._away[server] = [one for one in self._away[server] if one[1] > to_s]
            self._charge(server, left_s)
        self.until_s = to_s

    def _charge(self, server: int, elapsed_s: float) -> None:
        seconds, num_asking = self.seconds[server], self._num_at[server]
        if num_asking:
            seconds["generating"] += elapsed_s
            self._share[server] += elapsed_s / num_asking
            return
        num_waiting = sum(self._num_at[stage] for stage in STAGES)
        for stage in STAGES:
            seconds[stage] += elapsed_s * self._num_at[stage] / max(num_waiting, 1)
        if not num_waiting:
            seconds["no_rollouts"] += elapsed_s

    def _make(self, move: Move) -> None:
        known = move.attempt in self._attempts
        attempt = self._leave(move.attempt) if known else _Attempt(move.dispatch)
        if move.to is not None:
            attempt.at, attempt.since = move.to, self._share[move.to] if isinstance(move.to, int) else 0.0
            self._attempts[move.attempt] = attempt
            self._num_at[move.to] += 1
        elif move.failed or attempt.dispatch in self._lost:
            self._of_lost += attempt.spent_s
        else:
            self._of_dispatch[attempt.dispatch] += attempt.spent_s

    def _leave(self, number: int) -> _Attempt:
        """The attempt, no longer where it was, and charged for its time there."""
        attempt = self._attempts.pop(number)
        self._num_at[attempt.at] -= 1
        if isinstance(attempt.at, int):
            attempt.spent_s += self._share[attempt.at] - attempt.since
        return attempt

    def _end(self, ended: Ended) -> None:
        spent_s = self._of_dispatch.pop(ended.dispatch, 0.0)
        if ended.group_id is None:
            self._lost.add(ended.dispatch)
            self._of_lost += spent_s
        else:
            self._of_group[ended.group_id] += spent_s


@dataclass(slots=True)
class _Attempt:
    dispatch: int
    at: str | int = ""
    since: float = 0.0  # what the server's share was when it began to ask
    spent_s: float = 0.0
