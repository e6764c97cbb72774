"""Looks at running servers, from a thread for each, and starts those again that have died.

Comes in: started sidecars. Goes out: the same, running again whatever happened to them, or the error that no restart
mends. Nothing here pushes weights: a server that was started again serves those of its checkpoint, and nothing samples
until its user has pushed those of now.

    the watching thread                                    the user's thread
    looked at every second ─► dead ─► sampling suspended
                                      ─► killed ─► started ─► due ─► weights pushed ─► sampling resumed

A server that is slow, or paused by somebody else, is left alone: that is logged, and counted in seconds.

A push stops a server's engine for a while, and is not looked at meanwhile; it waits for the servers that are being
started. One that failed asks for a look, and so learns whether a death was the reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from north_lightning.errors import SidecarError

log = logging.getLogger(__name__)

JOIN_S = 0.1
ODD_FOR_S, REPEAT_S = 5.0, 60.0
"""How long a server must be slow or paused to be reported, and how often that is repeated."""


class Watched(Protocol):
    """What of a ``Sidecar`` is used here."""

    def start(self) -> None: ...

    def stop(self, timeout_s: float = ...) -> None: ...

    def check_alive(self) -> str | None: ...


class SidecarWatch:
    """Watches from ``start`` to ``stop``; every other method is for the one thread that pushes weights.

    Args:
        sidecars: All started, and by nobody else started again.
        max_restarts: Deaths borne, of all servers, with no ``note_progress`` between.
        interval_s: Seconds between two looks at a server.
    """

    def __init__(self, sidecars: Sequence[Watched], max_restarts: int, interval_s: float = 1.0) -> None:
        self._sidecars = sidecars
        self._max_restarts = max_restarts
        self._interval_s = interval_s
        self._users: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self._threads = [
            threading.Thread(target=self._watch, args=(index,), name=f"watch-sidecar{index}", daemon=True)
            for index in range(len(sidecars))
        ]
        self._changed = threading.Condition()  # guards everything below
        self._stopping = False
        self._pushing = False
        self._looking: set[int] = set()
        self._to_look_at: set[int] = set()  # at once
        self._down_since: dict[int, float] = {}
        self._outages: list[tuple[int, float, float]] = []
        self._odd: dict[int, tuple[float, float]] = {}  # since when a server has been slow or paused; when to say so
        self._odd_s = 0.0
        self._num_deaths = 0
        self._num_served = 0  # deaths after which weights have been pushed to all
        self._num_at_push = 0  # deaths before the last push
        self._num_in_a_row = 0
        self._up_at = 0.0  # the last one that was started again
        self._error: Exception | None = None

    def start(self) -> None:
        """Begin to look."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no more; a server that is just being started is stopped. The others are left running."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for index, (sidecar, thread) in enumerate(zip(self._sidecars, self._threads, strict=True)):
            while thread.is_alive():
                if index in self._down_since:
                    sidecar.stop()
                thread.join(JOIN_S)

    def around_outage(self, suspend: Callable[[], None], resume: Callable[[], None]) -> None:
        """Have ``suspend`` called when a server is found dead, by the watching thread, and again for every further one;
        ``resume`` when all are up and have the weights of now. After ``suspend`` has returned nothing may be sampled.
        """
        with self._changed:
            self._users.append((suspend, resume))
            is_out = self._num_deaths > self._num_served
        if is_out:
            suspend()

    def is_due(self) -> bool:
        """Whether servers have been started again, all are up, and wait for weights; raises what no restart mends."""
        with self._changed:
            self._raise_error()
            return self._num_deaths > self._num_served and not self._down_since

    @contextmanager
    def pushing(self) -> Iterator[None]:
        """Around a push to all servers: waits until all are up; if it succeeded, sampling is resumed."""
        with self._changed:
            self._wait_until_settled()
            self._pushing = True
            self._num_at_push = self._num_deaths
        try:
            yield
            if self._num_deaths > self._num_served:  # nobody looks, so nobody finds one now
                for _, resume in self._users:
                    resume()
                self._num_served = self._num_deaths
                log.warning("the vLLM sidecar samples again, %.1f s after it was up", time.monotonic() - self._up_at)
        finally:
            with self._changed:
                self._pushing = False
                self._changed.notify_all()

    def died_in_push(self) -> bool:
        """Whether a server has died since the last push began: looks at all, and waits for what has to be started."""
        with self._changed:
            self._to_look_at = set(range(len(self._sidecars)))
            self._changed.notify_all()
            self._wait_until_settled()
            return self._num_deaths > self._num_at_push

    def note_progress(self) -> None:
        """The samplers were of use: deaths before this one count no more, unless one has yet to be made good."""
        with self._changed:
            if self._num_deaths == self._num_served:
                self._num_in_a_row = 0

    def take_outages(self) -> list[tuple[int, float, float]]:
        """Index of the server, from when to when it was down, of the monotonic clock; since the last call."""
        with self._changed:
            now = time.monotonic()
            outages = [*self._outages, *((index, since, now) for index, since in self._down_since.items())]
            self._outages = []
            self._down_since = dict.fromkeys(self._down_since, now)
            return outages

    @property
    def odd_s(self) -> float:
        """Seconds, of all servers, in which one that lives was slow or paused by somebody else."""
        with self._changed:
            return self._odd_s + sum(time.monotonic() - since for since, _ in self._odd.values())

    @property
    def num_deaths(self) -> int:
        """Deaths of all servers so far."""
        return self._num_deaths

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait_until_settled(self) -> None:
        self._changed.wait_for(
            lambda: self._error is not None or not (self._looking or self._to_look_at or self._down_since)
        )
        self._raise_error()

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _watch(self, index: int) -> None:
        try:
            while self._wait_for_turn(index):
                death = self._look(index)
                if death is not None:
                    for suspend, _ in list(self._users):
                        suspend()
                    if self._num_in_a_row > self._max_restarts:
                        raise death
                    log.warning("%s; starting it again", death)
                    self._start_again(index)
        except Exception as error:
            with self._changed:
                if not self._stopping:  # which ends a start
                    self._error = error
                self._changed.notify_all()

    def _wait_for_turn(self, index: int) -> bool:
        """True when it is time to look, False when it never will be again."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or index in self._to_look_at, self._interval_s)
            self._changed.wait_for(lambda: self._stopping or not self._pushing)
            self._looking.add(index)
            return not self._stopping

    def _look(self, index: int) -> SidecarError | None:
        """What the server died of, if it is dead."""
        death, oddity = None, None
        try:
            oddity = self._sidecars[index].check_alive()
        except SidecarError as error:
            death = error
        with self._changed:
            self._note(index, oddity)
            if death is not None:
                self._num_deaths += 1
                self._num_in_a_row += 1
                self._down_since[index] = time.monotonic()
            self._looking.remove(index)
            self._to_look_at.discard(index)
            self._changed.notify_all()
        return death

    def _note(self, index: int, oddity: str | None) -> None:
        now = time.monotonic()
        if not oddity:
            since, _ = self._odd.pop(index, (now, 0.0))
            self._odd_s += now - since
            return
        since, say_at = self._odd.setdefault(index, (now, now + ODD_FOR_S))
        if now >= say_at:
            self._odd[index] = since, now + REPEAT_S
            log.warning("for %.0f s: %s", now - since, oddity)

    def _start_again(self, index: int) -> None:
        sidecar = self._sidecars[index]
        sidecar.stop(timeout_s=0.0)  # a hung one does not end by itself
        if self._stopping:
            return
        sidecar.start()
        with self._changed:
            self._up_at = time.monotonic()
            self._outages.append((index, self._down_since.pop(index), self._up_at))
            self._changed.notify_all()
