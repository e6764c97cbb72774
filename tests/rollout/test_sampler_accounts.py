"""Where the samplers' seconds went, against counting second by second; and what the attempt loop says of itself."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from rollout_fakes import (
    FakeVerifier,
    RecordingSampler,
    answer,
    by_index,
    call,
    load_chat,
    make_runner,
    make_task,
    make_tokenizer,
)

from north_lightning.errors import InfrastructureError
from north_lightning.rollout.accounts import ACCOUNTS, Began, Ended, SamplerAccounts, Told
from north_lightning.rollout.journal import STAGES, Journal, JournalledSampler, Move, busy_with, one_attempt

NUM_SERVERS, SECONDS, OUTCOMES = 2, 60, {0: "trained", 1: "head_timeout", 2: None}


def random_life(noise: random.Random) -> dict[int, str | int]:
    """Where one attempt is in each second of its life."""
    begin = noise.randrange(SECONDS - 2)
    places, at = {}, begin
    while at < SECONDS and noise.random() < 0.9:
        place = noise.choice([*STAGES, *range(NUM_SERVERS)])
        for _ in range(noise.randrange(1, 6)):
            if at < SECONDS:
                places[at] = place
            at += 1
    return places or {begin: STAGES[0]}


def moves_of(lives: list[dict[int, str | int]], failed: set[int]) -> list[Move]:
    moves = []
    for number, life in enumerate(lives):
        last = None
        for at, place in life.items():
            if place != last:
                moves.append(Move(float(at), number, number % 4, place))
            last = place
        if max(life) + 1 < SECONDS:
            moves.append(Move(float(max(life) + 1), number, number % 4, None, number in failed))
    return sorted(moves, key=lambda move: move.at_s)


@pytest.mark.parametrize("seed", range(20))
def test_every_second_is_where_counting_second_by_second_puts_it(seed: int) -> None:
    noise = random.Random(seed)
    lives = [random_life(noise) for _ in range(12)]
    failed = {number for number in range(12) if noise.random() < 0.2}
    paused, down = (10, 14), (30, 37)
    accounts = SamplerAccounts(NUM_SERVERS, 0.0)
    for server in range(NUM_SERVERS):
        accounts.away(server, *paused, "paused")
    accounts.away(1, *down, "down")
    accounts.add([Told(float(SECONDS), moves_of(lives, failed))])
    accounts.add([Ended(0, 0), Ended(1, 1), Ended(2, 2), Ended(3, None)])

    expected = [Counter[str]() for _ in range(NUM_SERVERS)]
    by_dispatch = Counter[int | str]()
    for second in range(SECONDS):
        places = {number: life[second] for number, life in enumerate(lives) if second in life}
        waiting = [place for place in places.values() if place in STAGES]
        for server in range(NUM_SERVERS):
            asking = [number for number, place in places.items() if place == server]
            if paused[0] <= second < paused[1]:
                expected[server]["paused"] += 1
            elif server == 1 and down[0] <= second < down[1]:
                expected[server]["down"] += 1
            elif asking:
                expected[server]["generating"] += 1
                for number in asking:
                    unfinished = max(lives[number]) + 1 >= SECONDS
                    by_dispatch["unended" if unfinished else "lost" if number in failed else number % 4] += 1 / len(
                        asking
                    )
            elif waiting:
                for place in waiting:
                    expected[server][place] += 1 / len(waiting)
            else:
                expected[server]["no_rollouts"] += 1
    for server in range(NUM_SERVERS):
        assert accounts.seconds[server] == pytest.approx({name: expected[server][name] for name in ACCOUNTS})
        assert sum(accounts.seconds[server].values()) == pytest.approx(SECONDS)
    assert accounts.generated_for(OUTCOMES.get) == pytest.approx(
        {
            "trained": by_dispatch[0],
            "discarded": by_dispatch[1] + by_dispatch[3] + by_dispatch["lost"],
            "pending": by_dispatch[2] + by_dispatch["unended"],
        }
    )


def test_what_a_dead_rollout_process_asked_for_is_discarded_and_no_longer_asked_for() -> None:
    accounts = SamplerAccounts(1, 100.0)
    ended, asking = Move(100.0, 0, 7, 0), Move(101.0, 1, 7, 0)
    accounts.add([Told(101.5, [ended, Move(101.0, 0, 7, None), asking]), Began(102.0)])
    accounts.add([Told(105.0, [Move(104.0, 0, 8, 0)])])
    assert accounts.seconds[0]["generating"] == 3.0
    assert accounts.seconds[0]["no_rollouts"] == 2.0
    accounts.add([Told(106.0, [Move(106.0, 0, 8, None)]), Ended(8, 1), Began(106.0)])  # what is lost is lost once
    assert accounts.generated_for({1: "trained"}.get) == {"trained": 2.0, "discarded": 2.0, "pending": 0.0}


def test_an_attempt_that_ends_after_its_dispatch_was_given_up_is_discarded() -> None:
    accounts = SamplerAccounts(1, 0.0)
    accounts.add([Told(2.0, [Move(0.0, 0, 3, 0)]), Ended(3, None), Told(3.0, [Move(3.0, 0, 3, None)])])
    assert accounts.generated_for({}.get) == {"trained": 0.0, "discarded": 3.0, "pending": 0.0}


def test_what_overlaps_is_charged_once() -> None:
    accounts = SamplerAccounts(1, 0.0)
    accounts.away(0, 2.0, 6.0, "down")
    accounts.away(0, 1.0, 8.0, "paused")  # a push that waited for the restart
    accounts.add([Told(4.0, []), Told(10.0, [])])
    assert (accounts.seconds[0]["down"], accounts.seconds[0]["paused"]) == (4.0, 2.0)
    assert sum(accounts.seconds[0].values()) == 10.0


class Steps:
    """A clock that is one second later each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def places(journal: Journal, attempt: int) -> list[str | int | None]:
    return [move.to for move in journal.take() if move.attempt == attempt]


def test_the_attempt_loop_says_what_it_waits_for(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    chat = load_chat(tmp_path)
    runner = make_runner(chat, JournalledSampler(RecordingSampler(chat, [call("one"), answer()]), 1))
    journal = Journal(Steps())

    async def run() -> None:
        with journal.of_dispatch(5):
            await runner.run(make_task(tmp_path / "task"), 0, 0, 0)

    asyncio.run(run())
    turn = [1, "sandbox", "harness", "sandbox"]
    moves = journal.take()
    assert [move.to for move in moves] == ["sandbox", *turn, *turn, "verifier", "sandbox", None]
    assert [move.at_s for move in moves] == list(range(1, len(moves) + 1))
    assert {(move.dispatch, move.failed) for move in moves} == {(5, False)}


def test_a_failed_attempt_says_so_and_one_outside_of_a_dispatch_nothing(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    chat = load_chat(tmp_path)
    sampler = JournalledSampler(RecordingSampler(chat, [answer()]), 0)
    task, journal = make_task(tmp_path / "task"), Journal()

    async def no_verdict(rollout: object) -> object:
        raise RuntimeError("no verdict")

    async def fail() -> None:
        runner = make_runner(chat, sampler, verifier=FakeVerifier(no_verdict), max_attempts=2)
        with journal.of_dispatch(0), pytest.raises(InfrastructureError):
            await runner.run(task, 0, 0, 0)
        with busy_with("harness"):
            await make_runner(chat, sampler, verifier=FakeVerifier(by_index)).run(task, 0, 0, 0)

    asyncio.run(fail())
    moves = journal.take()
    assert [(move.attempt, move.failed) for move in moves if move.to is None] == [(0, True), (1, True)]
    assert {move.attempt for move in moves} == {0, 1}


def test_work_that_ignores_its_cancellation_moves_no_attempt_that_has_ended(tmp_path: Path) -> None:
    journal = Journal()

    async def run() -> None:
        goes_on = asyncio.Event()

        async def stubborn() -> None:
            with busy_with(0):
                await goes_on.wait()

        with journal.of_dispatch(0), one_attempt():
            left_behind = asyncio.ensure_future(stubborn())
            await asyncio.sleep(0)
        goes_on.set()
        await left_behind

    asyncio.run(run())
    assert places(journal, 0) == ["sandbox", 0, None]
