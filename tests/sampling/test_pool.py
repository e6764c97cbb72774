"""Several servers as one sampler: attempts are spread, stay where they are, and leave a server that fails."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence

import pytest

from north_lightning.errors import ConfigError, SamplerError
from north_lightning.interfaces import Sampler
from north_lightning.sampling.pool import SamplerPool
from north_lightning.types import Sample, SamplingParams

PARAMS = SamplingParams(max_tokens=4)


class Server(Sampler):
    """Answers when ``opened``; remembers the prompts it was asked."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.is_dead = False
        self.is_closed = False
        self.opened: asyncio.Event | None = None

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        self.prompts.append(prompt_token_ids[0])
        if self.is_dead:
            raise SamplerError("no connection")
        if self.opened is not None:
            await self.opened.wait()
        return Sample([1], [-0.5], [0], "stop")

    async def close(self) -> None:
        self.is_closed = True


def test_every_turn_of_an_attempt_goes_to_the_server_of_its_first_and_attempts_are_spread_evenly() -> None:
    servers = [Server() for _ in range(3)]
    pool = SamplerPool(servers)

    async def attempt(name: int) -> None:
        sampler = pool.for_attempt()
        for _ in range(4):
            await sampler.generate([name], PARAMS)

    async def run() -> None:
        await asyncio.gather(*(attempt(name) for name in range(12)))

    asyncio.run(run())
    served = [set(server.prompts) for server in servers]
    assert set.union(*served) == set(range(12))
    assert sum(len(names) for names in served) == 12  # none asked two servers
    assert [len(names) for names in served] == [4, 4, 4]


def test_a_new_attempt_goes_to_the_server_with_the_fewest_requests_in_flight() -> None:
    slow, fast = Server(), Server()
    pool = SamplerPool([slow, fast])

    async def run() -> None:
        slow.opened = asyncio.Event()
        held = asyncio.create_task(pool.generate([0], PARAMS))
        await asyncio.sleep(0)
        for name in (1, 2, 3):
            await pool.generate([name], PARAMS)
        slow.opened.set()
        await held

    asyncio.run(asyncio.wait_for(run(), 30))
    assert (slow.prompts, fast.prompts) == ([0], [1, 2, 3])


def test_a_server_that_fails_gets_no_new_attempts_until_it_has_rested_unless_all_have_failed() -> None:
    now = 0.0
    dead, alive = Server(), Server()
    pool = SamplerPool([dead, alive], rest_s=30.0, clock=lambda: now)
    dead.is_dead = True

    async def run() -> None:
        nonlocal now
        with pytest.raises(SamplerError):
            await pool.generate([0], PARAMS)
        for name in (1, 2):
            await pool.generate([name], PARAMS)
        now, dead.is_dead = 31.0, False
        await pool.generate([3], PARAMS)
        dead.is_dead = alive.is_dead = True
        for name in (4, 5):
            with pytest.raises(SamplerError):
                await pool.generate([name], PARAMS)
        with pytest.raises(SamplerError):
            await pool.generate([6], PARAMS)

    asyncio.run(run())
    assert dead.prompts[:2] == [0, 3]
    assert alive.prompts[:2] == [1, 2]
    assert sorted(dead.prompts + alive.prompts) == list(range(7))


def test_a_pool_is_sent_to_another_process_closes_all_and_is_not_empty() -> None:
    pool = pickle.loads(pickle.dumps(SamplerPool([Server(), Server()])))
    asyncio.run(pool.close())
    assert all(server.is_closed for server in pool.samplers)
    with pytest.raises(ConfigError, match="samplers: expected at least one"):
        SamplerPool([])
