"""The conformance cases and the attacks, on every isolation level that this machine has."""

import asyncio
import os
from dataclasses import replace

import pytest
from attacks import ATTACKS, attack_all, control
from conformance import CASES, processes_with, run_cases
from hostile_attempts import ATTEMPTS, play
from late_write import graded, make_task, naively_graded, rewards

from north_lightning.sandbox import BubblewrapProvider, DockerProvider

LIMITS = {"max_work_bytes": 64 << 20, "max_file_bytes": 8 << 20, "max_files": 5000, "max_processes": 64}
LEVELS = ("bubblewrap", "docker")


@pytest.fixture(scope="session", params=LEVELS)
def level(request):
    """A provider of each isolation level; the suite prints which one was tested."""
    limits = {**LIMITS, "memory_bytes": 512 << 20}
    if request.param == "bubblewrap":
        provider = BubblewrapProvider(**{**limits, "memory_bytes": 1024 << 20})
    else:
        image = str(request.getfixturevalue("root_file_system"))
        provider = DockerProvider(image, engine=request.getfixturevalue("engine"), **limits)
    provider.check()
    described = provider.describe()
    print(f"isolation level tested: {described['isolation']} ({described['resource_control']})")
    return provider


def test_forty_cases_hold_on_every_level(level, tmp_path):
    assert len(CASES) >= 40
    failed = asyncio.run(run_cases(level, tmp_path))
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


def test_sixty_attacks_fail_on_every_level(level, tmp_path):
    assert len(ATTACKS) >= 60
    assert {attack.kind for attack in ATTACKS} == {"escape", "resource", "tampering", "timing"}
    # In containers, only the probes: every other attack starts several, and the benchmark runs those.
    kinds = ("escape", "resource", "tampering", "timing") if isinstance(level, BubblewrapProvider) else ()
    won = asyncio.run(attack_all(level, tmp_path, kinds=kinds))
    assert not won, "\n".join(f"{name}: {text}" for name, text in won.items())


@pytest.mark.skipif(os.geteuid() != 0, reason="most attacks need root to win without a sandbox")
def test_attacks_succeed_where_nothing_isolates(tmp_path):
    """The attacks are able to win: the harmless ones do, run by a plain bash on this machine."""
    won, tried = control(tmp_path)
    assert len(tried) >= 30
    assert len(won) >= 0.75 * len(tried), sorted(set(tried) - set(won))


def test_a_process_left_running_cannot_write_the_reward_late(level, tmp_path):
    for way in (graded, naively_graded):
        (tmp_path / way.__name__).mkdir()
    assert asyncio.run(rewards(graded, level, tmp_path / "graded", 5)) == [0.0] * 5
    assert 1.0 in asyncio.run(rewards(naively_graded, level, tmp_path / "naively_graded", 5))


def test_attempts_that_behave_badly_end_in_a_typed_outcome(level, tmp_path):
    """Output floods, bytes that are no text, forged prompts, daemons: none of them is an infrastructure failure."""
    task = replace(make_task(tmp_path / "task"), max_turns=60)
    names = [*ATTEMPTS] if isinstance(level, BubblewrapProvider) else [*ATTEMPTS][::3]
    gate = asyncio.Semaphore(3)

    async def one(name):
        async with gate:
            return await play(level, task, name)

    async def all_of_them():
        return await asyncio.gather(*map(one, names))

    played = dict(zip(names, asyncio.run(all_of_them()), strict=True))
    assert {name: outcome[:2] for name, outcome in played.items()} == {name: ATTEMPTS[name][1:3] for name in names}
    for name in names:
        assert ATTEMPTS[name][3] in played[name][2], name
    assert not processes_with("sleep\x009911") + processes_with("sleep\x009912")
