"""Harbor task directories: what is one, and what is said of those that are not.

The verdicts expected here are Harbor's own (0.25.0, ``Task.is_valid_dir`` and ``Task``), recorded by
``record_harbor_verdicts.py`` for the same directories.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harbor_directories import DIRECTORIES, write_directory

from north_lightning.errors import TaskError
from north_lightning.tasks import image_of, load_task
from north_lightning.tasks.check import check_task, read_config
from north_lightning.types import Artifact, RootFileSystem, VerifierEnvironment
from north_lightning.verifiers.unit_tests import declared

VERDICTS = json.loads((Path(__file__).parent / "harbor_verdicts.json").read_text())


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_verdict_on_a_directory_is_harbors(name, tmp_path):
    directory = write_directory(name, tmp_path)
    if VERDICTS[name]:
        check_task(directory)
    else:
        with pytest.raises(TaskError, match=r"\w"):
            check_task(directory)


def test_older_spellings_mean_what_harbor_takes_them_for(tmp_path):
    environment = read_config(write_directory("older spellings", tmp_path)).environment
    assert (environment.memory_mb, environment.storage_mb, environment.network_mode) == (2048, 512, "no-network")
    assert read_config(write_directory("version 1.0", tmp_path / "b")).schema_version == "1.0"


def test_the_command_says_per_directory_ok_or_the_reason(tmp_path):
    good = write_directory("version 1.0", tmp_path / "good")
    bad = write_directory("no instruction", tmp_path / "bad")
    command = [sys.executable, "-m", "north_lightning", "tasks", "check", str(good), str(bad), str(tmp_path / "gone")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"{good}: ok",
        f"{bad}: instruction.md: not found",
        f"{tmp_path / 'gone'}: task.toml: not found",
        "1 of 3 ok",
    ]
    assert done.returncode == 1
    assert "2 of 3" in done.stderr


def test_a_field_that_is_wrong_is_named(tmp_path):
    directory = write_directory("version 1.0", tmp_path)
    (directory / "task.toml").write_text("[verifier]\ntimeout_sec = 'soon'\n[environment]\ncpus = nan\n")
    with pytest.raises(TaskError, match=r"verifier.timeout_sec: .*number.*environment.cpus: .*finite"):
        check_task(directory)


@pytest.mark.parametrize("name", [name for name in DIRECTORIES if VERDICTS[name]])
def test_whatever_harbor_takes_loads(name, tmp_path):
    directory = write_directory(name, tmp_path)
    task = load_task(directory)
    assert (task.environment, task.max_turns) == ("terminal", 100)
    assert task.instruction == ("" if task.steps else "Do it.")
    assert (task.own_verifier is not None) == name.startswith(("separate", "all fields"))
    assert task.root is not None
    with pytest.raises(TaskError, match="environment is an image"):
        image_of(task)


def test_every_field_that_an_attempt_needs_is_read(tmp_path):
    task = load_task(write_directory("all fields", tmp_path))
    assert (task.agent_timeout_s, task.verifier_timeout_s, task.family) == (60.0, 30.5, "somewhere")
    assert task.verifier_env == {"KEY": "${VAR:-default}"}


def test_the_steps_of_a_task_are_read_in_order(tmp_path):
    task = load_task(write_directory("version 1.3", tmp_path / "a"))
    assert [(step.name, step.task.instruction) for step in task.steps] == [("one", "One."), ("two", "Two.")]
    assert load_task(write_directory("reward per key", tmp_path / "b")).steps[0].min_reward == {"a": 0.5}


def test_root_file_systems_and_artifacts_are_read(tmp_path):
    named = load_task(write_directory("image instead of environment", tmp_path / "a"))
    assert named.root == RootFileSystem("debian")
    built = load_task(write_directory("version 1.0", tmp_path / "b"))
    assert built.root == RootFileSystem(built.directory / "environment" / "Dockerfile")
    (built.directory / "environment" / "Dockerfile").write_text("FROM debian:12\nWORKDIR /a\nRUN true\nworkdir /app\n")
    assert load_task(built.directory).root.workdir == "/app"
    (built.directory / "task.toml").write_text(
        'artifacts = ["/app/x", "y", {source = "/work/z", exclude = ["*.o"]}, "/etc/passwd", {source = "/app", service '
        '= "db"}]\n[environment]\ndocker_image = "i:1"\n[verifier.environment]\ndocker_image = "v:1"\n'
        '[[verifier.collect]]\ncommand = "a"\n[[verifier.collect]]\ncommand = "b"\nservice = "db"\n'
    )
    task = load_task(built.directory)
    assert task.root == RootFileSystem("i:1", "/app")
    artifacts = (Artifact("x"), Artifact("y"), Artifact("z", ("*.o",)))
    assert task.own_verifier == VerifierEnvironment(artifacts, RootFileSystem("v:1", "/app"), brings_tests=True)
    assert [hook.command for hook in task.collect] == ["a"]
    assert task.unsupported == (
        "a collect command in service 'db'",
        "the artifact /etc/passwd of main (expected one in /work)",
        "the artifact /app of db (expected one in /work)",
    )


def test_a_step_says_first_where_its_tests_run(tmp_path):
    directory = write_directory("version 1.3", tmp_path)
    own = '[verifier.environment]\ndocker_image = "v:1"\n'
    one = '[[steps]]\nname = "one"\nverifier = {environment = {docker_image = "v:2"}}\n'
    two = '[[steps]]\nname = "two"\nverifier = {environment_mode = "shared"}\n'
    (directory / "task.toml").write_text(f"{own}{one}{two}")
    first, second = load_task(directory).steps
    assert first.task.own_verifier.root.image == "v:2"
    assert second.task.own_verifier is None


def test_an_artifact_is_not_looked_for_through_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    work = tmp_path / "work"
    (work / "a").mkdir(parents=True)
    (work / "a" / "b").write_text("b")
    (work / "out").symlink_to(outside)
    assert declared(work, "a/b") == work / "a" / "b"
    assert declared(work, ".") == work
    assert declared(work, "out") == work / "out"  # the link itself
    assert declared(work, "out/secret") is None
    assert declared(work, "a/b/c") is None
    assert declared(work, "gone") is None
