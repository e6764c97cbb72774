"""Several servers of the same model as one sampler: an attempt stays with a server, whose prefix cache knows its turns.

Comes in: a sampler for each server. Goes out: one sampler, whose attempts are spread over them. It starts no server and
pushes no weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from north_lightning.errors import ConfigError, SamplerError
from north_lightning.interfaces import Sampler
from north_lightning.types import Sample, SamplingParams

REST_S = 30.0


class SamplerPool(Sampler):
    """Gives each attempt, at its first turn, the server with the fewest requests in flight, and keeps it there.

    A server that fails is left alone for a while, unless all have failed; its attempts fail with it, and are begun anew
    elsewhere. Picklable as its samplers are. Used from one event loop.

    Args:
        samplers: one for each server, all of the same model.
        rest_s: seconds that a server which has failed gets no new attempts.
        clock: monotonic seconds.
    """

    def __init__(
        self, samplers: Sequence[Sampler], rest_s: float = REST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not samplers:
            raise ConfigError("samplers: expected at least one, got none")
        self.samplers = list(samplers)
        self.rest_s = rest_s
        self._clock = clock
        self._num_in_flight = [0] * len(samplers)
        self._num_attempts = [0] * len(samplers)
        self._rests_until = [-float("inf")] * len(samplers)

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        """An attempt of one turn."""
        return await self.for_attempt().generate(prompt_token_ids, params)

    def for_attempt(self) -> Sampler:
        return _StaysWithOne(self)

    async def close(self) -> None:
        """Close the connections to all."""
        for sampler in self.samplers:
            await sampler.close()

    def choose(self) -> int:
        """The index of the server for a new attempt: not resting, least loaded, least used."""
        now = self._clock()
        index = min(
            range(len(self.samplers)),
            key=lambda i: (self._rests_until[i] > now, self._num_in_flight[i], self._num_attempts[i]),
        )
        self._num_attempts[index] += 1
        return index

    async def ask(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        """One request to one server."""
        self._num_in_flight[index] += 1
        try:
            return await self.samplers[index].generate(prompt_token_ids, params)
        except SamplerError:
            self._rests_until[index] = self._clock() + self.rest_s
            raise
        finally:
            self._num_in_flight[index] -= 1


class _StaysWithOne(Sampler):
    """One attempt's sampler; the server is chosen when it is first asked, because until then nothing loads it."""

    def __init__(self, pool: SamplerPool) -> None:
        self._pool = pool
        self._index: int | None = None

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        if self._index is None:
            self._index = self._pool.choose()
        return await self._pool.ask(self._index, prompt_token_ids, params)
