"""Harbor's interface, in containers of this machine; against a vendor nothing was run."""

import asyncio
import os

import pytest
from conformance import CASES, run_cases
from harbor_containers import ContainerEnvironment, ContainerProvider
from late_write import make_task

from north_lightning.errors import ConfigError, SandboxError, SandboxUnavailableError, TreeTooLargeError
from north_lightning.sandbox.harbor import HarborProvider

LIMITS = {"max_work_bytes": 64 << 20, "max_file_bytes": 8 << 20, "max_files": 5000}


@pytest.fixture(scope="session")
def remote(engine, root_file_system):
    from north_lightning.sandbox.docker_engine import Engine

    return ContainerProvider(engine, Engine(engine).image(str(root_file_system)), user="1000", **LIMITS)


def test_the_conformance_cases_hold(remote, tmp_path):
    failed = asyncio.run(run_cases(remote, tmp_path, CASES, at_once=8))
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


def test_a_task_is_solved_and_graded(remote, tmp_path, solve):
    task = make_task(tmp_path / "task")
    assert solve(task, remote, "cp note answer").reward.value == 1.0
    assert solve(task, remote, "echo red >answer").reward.value == 0.0


def test_a_daemon_is_killed_with_its_command_though_it_leaves_the_session(remote):
    async def main():
        sandbox = await remote.open(None)
        try:
            await sandbox.run("((setsid sleep 4471 >/dev/null 2>&1 &) &); setsid nohup sleep 4471 & sleep 0.2", 30)
            return (await sandbox.run("ps ax -o args || ps", 30)).output
        finally:
            await sandbox.close()

    assert "4471" not in asyncio.run(main())


def test_a_closed_sandbox_leaves_no_container_and_no_file(remote, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main():
        sandbox = await remote.open(None)
        container = sandbox._environment
        await sandbox.close()
        return container

    container = asyncio.run(main())
    assert container.container not in [one["Id"] for one in container.api.containers(all=True)]
    assert os.listdir(tmp_path) == []


class Fails(ContainerEnvironment):
    """Stands where a vendor's service fails: at ``what``, after ``after`` commands."""

    def __init__(self, provider, what, after=0):
        super().__init__(provider.engine, provider.image)
        self.what, self.left = what, after

    async def start(self, force_build):
        if self.what == "start":
            raise RuntimeError("no quota")
        await super().start(force_build)

    async def exec(self, *args, **kwargs):
        self.left -= 1
        if self.what == "exec" and self.left < 0:
            raise ConnectionError("gone")
        return await super().exec(*args, **kwargs)


@pytest.mark.parametrize(("what", "after"), [("start", 0), ("exec", 0), ("exec", 2), ("exec", 4)])
def test_what_the_service_fails_at_is_a_sandbox_error_with_its_words(remote, monkeypatch, what, after):
    made = []

    def failing(scratch, root):
        made.append(Fails(remote, what, after))
        return made[0]

    monkeypatch.setattr(remote, "_environment", failing)

    async def main():
        sandbox = await remote.open(None)
        try:
            await sandbox.run("true", 20)
        finally:
            await sandbox.close()

    with pytest.raises(SandboxError, match="RuntimeError: no quota|ConnectionError: gone"):
        asyncio.run(main())
    assert made[0].container not in [one["Id"] for one in made[0].api.containers(all=True)]


def test_a_tree_that_is_too_large_is_the_attempts_failure(remote, tmp_path):
    async def main(command):
        sandbox = await remote.open(None)
        try:
            await sandbox.run(command, 60)
            await sandbox.snapshot(tmp_path / "copy")
        finally:
            await sandbox.close()

    for command in ("for i in $(seq 18); do head -c 8000000 /dev/zero >$i; done", "seq -f f%g 5100 | xargs touch"):
        with pytest.raises(TreeTooLargeError):
            asyncio.run(main(command))


def test_what_cannot_be_had_is_said(tmp_path):
    try:
        import harbor  # noqa: F401
    except ImportError:
        with pytest.raises(SandboxUnavailableError, match=r"Python 3\.12"):
            HarborProvider("daytona").check()
    else:
        with pytest.raises(ConfigError, match="expected module:Class or one of .*got 'nowhere'"):
            HarborProvider("nowhere").check()
