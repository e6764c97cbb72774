"""Task directories of strangers: nothing outside of them is read, and no secret reaches them unasked."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hostile_world import SECRET_VARIABLE, World

from north_lightning.errors import ConfigError, TaskError
from north_lightning.interfaces import Sandbox, SandboxProvider
from north_lightning.rollout.records import rollout_record
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.sandbox.dockerfile import read_dockerfile
from north_lightning.sandbox.dockerfile_build import _found, _StepFailed, expanded
from north_lightning.sandbox.layers import ImageSettings
from north_lightning.tasks.check import check_tasks
from north_lightning.tasks.harbor import load_task, load_tasks, solution_steps
from north_lightning.types import CommandResult, Rollout, RootFileSystem
from north_lightning.verifiers import UnitTestVerifier

FILES = {
    "task.toml": "",
    "instruction.md": "Do it.\n",
    "environment/Dockerfile": "FROM debian:12\n",
    "environment/files/a.txt": "a\n",
    "tests/test.sh": "#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n",
    "solution/solve.sh": "#!/bin/bash\n",
}


def task(world: World, **files: str) -> Path:
    root = world.root / "input" / "task"
    for path, text in {**FILES, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def replaced(world: World, path: str, target: str | Path, **files: str) -> Path:
    root = task(world, **files)
    place = root / path
    if place.is_dir():
        os.rename(place, world.root / "input" / "aside")
    else:
        place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    return root


def steps(world: World, path: str, target: str | Path) -> Path:
    parts = {"task.toml": '[[steps]]\nname = "one"\n', "steps/one/instruction.md": "x", "steps/one/tests/test.sh": "x"}
    return replaced(world, path, target, **parts)


def with_fifo(world: World, path: str) -> Path:
    root = task(world)
    (root / path).unlink()
    os.mkfifo(root / path)
    return root


def chained(world: World) -> Path:
    root = replaced(world, "instruction.md", "environment/files/b.txt")
    (root / "environment" / "files" / "b.txt").symlink_to(world.private)
    return root


TOML: dict[str, str] = {
    "large": 'a = "' + "x" * (2 << 20) + '"\n',
    "deep": "a = " + "[" * 3000 + "]" * 3000 + "\n",
    "deep in tables": "[" + ".".join("a" * 400) + "]\n",
    "a number of thousands of digits": "a = " + "9" * 5000 + "\n",
    "a family that is a control sequence": '[metadata]\nfamily = "\\u001b]0;x\\u0007"\n',
    "a family of 3,000 letters": f'[metadata]\nfamily = "{"f" * 3000}"\n',
    "an environment with a new line": '[metadata]\nenvironment = "a\\nb"\n',
    "a step that leads out": '[[steps]]\nname = "../../outside"\n',
    "a step that is the folder above": '[[steps]]\nname = ".."\n',
    "an artifact that leads out": 'artifacts = ["../../outside"]\n[verifier.environment]\ndocker_image = "i"\n',
    "a variable that is a command": '[verifier]\nenv = {"A=1; touch x; B" = "v"}\n',
    "a variable without a name": '[verifier]\nenv = {"" = "v"}\n',
    "a NUL in a variable": '[verifier]\nenv = {A = "a\\u0000b"}\n',
    "not UTF-8": "\udcff",
    "a pass rate that is none": '[metadata]\npass_rate = "high"\n',
    "a pass rate that is not a number": "[metadata]\npass_rate = nan\n",
    "turns without end": "[metadata]\nmax_turns = inf\n",
}

DIRECTORIES: dict[str, Callable[[World], Path]] = {
    "environment/files": lambda world: replaced(world, "environment/files", world.outside / "private"),
    "environment/files, relative": lambda world: replaced(world, "environment/files", "../../../outside/private"),
    "environment": lambda world: replaced(world, "environment", world.outside / "private"),
    "environment/Dockerfile": lambda world: replaced(world, "environment/Dockerfile", world.private),
    "instruction.md": lambda world: replaced(world, "instruction.md", world.private),
    "instruction.md by a chain": chained,
    "task.toml": lambda world: replaced(world, "task.toml", world.private),
    "tests": lambda world: replaced(world, "tests", world.outside / "private"),
    "tests/test.sh": lambda world: replaced(world, "tests/test.sh", world.private),
    "a file beside test.sh": lambda world: replaced(world, "tests/data.txt", world.private),
    "a folder beside test.sh": lambda world: replaced(world, "tests/data", world.outside),
    "solution": lambda world: replaced(world, "solution", world.outside / "private"),
    "solution/steps.json": lambda world: replaced(world, "solution/steps.json", world.private),
    "a step": lambda world: steps(world, "steps/one", world.outside / "private"),
    "a step's instruction": lambda world: steps(world, "steps/one/instruction.md", world.private),
    "a step's tests": lambda world: steps(world, "steps/one/tests", world.outside / "private"),
    "a link to itself": lambda world: replaced(world, "instruction.md", "instruction.md"),
    "a device": lambda world: replaced(world, "instruction.md", "/dev/zero"),
    "a FIFO as instruction": lambda world: with_fifo(world, "instruction.md"),
    "a FIFO as configuration": lambda world: with_fifo(world, "task.toml"),
    "a FIFO as script": lambda world: with_fifo(world, "tests/test.sh"),
}


def config(world: World, name: str) -> Path:
    root = task(world)
    (root / "task.toml").write_bytes(TOML[name].encode("utf-8", "surrogateescape"))
    return root


@pytest.mark.usefixtures("reads_are_noticed")
@pytest.mark.parametrize("name", [*DIRECTORIES, *TOML])
def test_a_task_directory_leads_nowhere_and_its_mistake_is_named(name: str, world: World) -> None:
    root = DIRECTORIES[name](world) if name in DIRECTORIES else config(world, name)
    with pytest.raises(TaskError) as raised:
        load_task(root)
    world.said += str(raised.value)
    assert len(str(raised.value).splitlines()) <= 8
    assert "\x1b" not in str(raised.value)
    if "[metadata]" not in TOML.get(name, ""):  # which Harbor does not look at
        with pytest.raises(TaskError):
            check_tasks([root])


def test_links_within_a_task_are_followed_and_those_in_its_files_are_kept(world: World) -> None:
    root = replaced(world, "instruction.md", "environment/files/a.txt")
    (root / "environment" / "files" / "out").symlink_to(world.outside / "private")
    assert load_task(root).instruction == "a"


@pytest.mark.parametrize(
    "line",
    ["[]", "3", '{"directory": 3}', '{"directory": "x", "max_turns": []}', "[" * 3000, '{"directory": "a\\u0000b"}'],
)
def test_a_listing_names_its_line(line: str, world: World) -> None:
    listing = world.root / "input" / "tasks.jsonl"
    listing.write_text(line + "\n")
    with pytest.raises(TaskError):
        load_tasks(listing)
    listing.write_bytes(b"\xff\n")
    with pytest.raises(TaskError):
        load_tasks(listing)


@pytest.mark.parametrize("steps", ["{", "[3]", '[["bash"]]', '[["bash", 3]]', "[" * 3000, "3", '{"a": 1}'])
def test_the_steps_of_a_solver_are_tools_and_arguments(steps: str, world: World) -> None:
    with pytest.raises(TaskError, match="steps.json: expected a list"):
        solution_steps(load_task(task(world, **{"solution/steps.json": steps})))


# ---- secrets -------------------------------------------------------------------------------------------------------


class Recorded(Sandbox):
    """Prints the value of ``$A``, as a test might; keeps what it was told to run."""

    def __init__(self, commands: list[str], logs: Path) -> None:
        self.commands = commands
        self.logs = logs

    async def spawn(self, argv: object) -> object:  # type: ignore[override]
        raise NotImplementedError

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        self.commands.append(command)
        before = command.partition("cd /work")[0].replace("/logs/verifier", str(self.logs))
        words = ["bash", "-c", f'{before}echo "A=$A, B=$B"']
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]}
        )
        output, _ = await process.communicate()
        assert os.listdir(self.logs) == []  # nothing is left for the tests to read a second time
        (self.logs / "reward.txt").write_text("1")
        return CommandResult(output.decode(), 0, False)

    async def snapshot(self, destination: Path) -> None: ...

    async def close(self) -> None: ...


class Recording(SandboxProvider):
    def __init__(self) -> None:
        self.commands: list[str] = []

    def check(self) -> None: ...

    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> Recorded:
        return Recorded(self.commands, (writable or {})["/logs/verifier"])


ASKS = f'[verifier]\nenv = {{A = "${{{SECRET_VARIABLE}}}", B = "it\'s; touch x"}}\n'


def test_a_secret_is_given_by_name_only(world: World) -> None:
    asking = load_task(task(world, **{"task.toml": ASKS}))
    assert asking.verifier_env["A"] == f"${{{SECRET_VARIABLE}}}"
    for names in (None, [], ["PATH"]):
        with pytest.raises(ConfigError, match=f"asks for this process's {SECRET_VARIABLE}, which is not given"):
            UnitTestVerifier(variables=names).check_task(asking)
    with_default = ASKS.replace(SECRET_VARIABLE, f"{SECRET_VARIABLE}:-nothing")
    UnitTestVerifier().check_task(load_task(task(world, **{"task.toml": with_default})))


@pytest.mark.parametrize("given", [True, False])
def test_a_secret_is_on_no_command_line_and_in_no_record(given: bool, world: World) -> None:
    asking = load_task(task(world, **{"task.toml": ASKS.replace(SECRET_VARIABLE, f"{SECRET_VARIABLE}:-nothing")}))
    provider = Recording()
    rollout = Rollout(asking.id, "terminal", "f", 0, 0, 0)
    verifier = UnitTestVerifier(variables=[SECRET_VARIABLE] if given else None)
    rollout.reward = asyncio.run(verifier.verify(asking, rollout, world.target, provider))
    assert rollout.reward.details["output"] == f"A={'[secret]' if given else 'nothing'}, B=it's; touch x\n"
    assert world.secret not in json.dumps(rollout_record(rollout)) + "".join(provider.commands)


def test_tests_in_a_real_sandbox_have_the_variables(world: World, tmp_path: Path) -> None:
    checks = '[ "$B" = "it\'s; touch x" ] && [ "${#A}" = 31 ]'
    script = f"{checks} && echo 1 > /logs/verifier/reward.txt"
    root = task(world, **{"task.toml": ASKS, "tests/test.sh": script})
    verifier = UnitTestVerifier(variables=[SECRET_VARIABLE])
    rollout = Rollout("task", "terminal", "f", 0, 0, 0)
    image = root / "environment" / "files"
    assert asyncio.run(verifier.verify(load_task(root), rollout, image, BubblewrapProvider())).value == 1.0


# ---- Dockerfiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "FROM d\nADD https://a/b /x\n",
        "FROM d\nADD ht\\\ntps://a/b /x\n",
        "FROM d\nARG U=https://169.254.169.254/x\nADD $U /x\n",
        "FROM d\nADD ${U:-https://a} /x\n",
        'FROM d\nADD ["https://a/b", "/x"]\n',
        "FROM d\nADD git@github.com:a/b.git /x\n",
        "FROM d\nADD 'ftp://a/b' /x\n",
        "# escape=`\nFROM d\nADD ht`\ntps://a/b /x\n",
        "FROM d\nCOPY --from=other /etc/passwd /x\n",
        "FROM d\nCOPY --fr\\\nom=other /etc/passwd /x\n",
        "FROM d\nRUN --mount=type=bind,source=/,target=/host cat /host/etc/shadow\n",
        "FROM d\nRUN --net\\\nwork=host true\n",
        "FROM $X\n",
        "\udcff",
        "FROM d\n" + "RUN true\n" * 3_000_000,
    ],
)
def test_a_dockerfile_asks_for_nothing_from_outside(text: str, world: World) -> None:
    path = world.root / "input" / "Dockerfile"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError):
        read_dockerfile(path)
    path.unlink()
    path.symlink_to(world.private)
    with pytest.raises(ConfigError, match="leads out"):
        read_dockerfile(path)


@pytest.mark.usefixtures("reads_are_noticed")
def test_sources_are_of_the_build_context(world: World) -> None:
    context = world.root / "input" / "context"
    (context / "real").mkdir(parents=True)
    (context / "real" / "a.txt").write_text("a")
    (context / "link").symlink_to(world.outside)
    for pattern in ("../outside/*", "link/*", "link/private/key.txt", "*/private/*", "/link/private", "real/../../x"):
        with pytest.raises(_StepFailed):
            _found(context, pattern)
    assert _found(context, "*/*.txt") == [context / "real" / "a.txt"]
    assert _found(context, "link") == [context / "link"]  # the link itself


def test_variables_do_not_grow_without_end(world: World) -> None:
    def doubled(times: int) -> str:
        value = "x"
        for _ in range(times):
            value = expanded("$A$A", ImageSettings(variables={"A": value}), {})
        return value

    assert len(doubled(10)) == 1024
    with pytest.raises(_StepFailed, match="expected at most"):
        doubled(60)
