import asyncio

import pytest
from container_engine import container_engine
from root_file_system import make_root_file_system

from north_lightning.harnesses import MiniSWEAgentHarness
from north_lightning.rollout.attempt import record_scripted, script_of_calls
from north_lightning.sandbox import BubblewrapProvider, Shell, Terminal
from north_lightning.tasks import image_of
from north_lightning.verifiers import UnitTestVerifier


@pytest.fixture(scope="session")
def provider():
    return BubblewrapProvider(max_work_bytes=64 << 20, max_file_bytes=8 << 20, max_files=5000, max_processes=64)


@pytest.fixture
def image(tmp_path):
    directory = tmp_path / "image"
    directory.mkdir()
    return directory


@pytest.fixture
def in_sandbox(provider, image):
    """Runs ``scenario(sandbox)`` in a sandbox whose /work is a copy of ``image``; nothing may be left running."""

    def run(scenario):
        async def main():
            sandbox = await provider.open(image)
            try:
                return await scenario(sandbox)
            finally:
                await sandbox.close()

        return asyncio.run(main())

    return run


@pytest.fixture
def in_terminal(in_sandbox):
    def run(scenario):
        async def main(sandbox):
            terminal = Terminal(sandbox)
            await terminal.start()
            try:
                return await scenario(terminal)
            finally:
                await terminal.close()

        return in_sandbox(main)

    return run


@pytest.fixture
def in_shell(in_sandbox):
    def run(scenario):
        async def main(sandbox):
            shell = Shell(sandbox)
            try:
                return await scenario(shell)
            finally:
                await shell.close()

        return in_sandbox(main)

    return run


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    pytest.importorskip("docker", reason="the docker package is not installed")
    try:
        with container_engine(tmp_path_factory.mktemp("engine")) as address:
            yield address
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def root_file_system(tmp_path_factory):
    return make_root_file_system(tmp_path_factory.mktemp("root") / "root")


@pytest.fixture
def solve():
    """The rollout of an attempt at a task that runs one command and hands in."""

    def attempt(task, provider, command):
        commands = (command, "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
        return asyncio.run(
            record_scripted(
                task,
                MiniSWEAgentHarness(),
                script_of_calls([("bash", {"command": one}) for one in commands]),
                sandboxes=provider,
                verifier=UnitTestVerifier(timeout_s=60),
                image_of=image_of,
            )
        )

    return attempt
