"""A real container engine's sandboxes: root file systems, refusals, and what an engine does behind our back."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import yaml
from oci_images import tar_of, write_oci_archive
from root_file_system import make_root_file_system

from north_lightning.errors import ConfigError, NorthError, SandboxError, SandboxUnavailableError
from north_lightning.harnesses import MiniSWEAgentHarness
from north_lightning.interfaces import SandboxProvider
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.sandbox import DockerProvider
from north_lightning.sandbox.dockerfile import base_of, read_dockerfile
from north_lightning.tasks import load_task
from north_lightning.types import RootFileSystem
from north_lightning.verifiers import UnitTestVerifier

LIMITS = {"max_work_bytes": 16 << 20, "memory_bytes": 256 << 20}


def output_of(provider, image, command):
    async def scenario():
        sandbox = await provider.open(image)
        try:
            return (await sandbox.run(command, 60)).output
        finally:
            await sandbox.close()

    return asyncio.run(scenario())


@pytest.fixture(scope="session")
def root_file_system(tmp_path_factory):
    return make_root_file_system(tmp_path_factory.mktemp("root") / "root", with_python=False)


@pytest.fixture(scope="session")
def containers(engine, root_file_system):
    return DockerProvider(str(root_file_system), engine=engine, **LIMITS)


# ---- root file systems


def test_an_oci_archive_is_a_root_file_system(engine, root_file_system, image, tmp_path):
    path = write_oci_archive(tmp_path / "image.tar", [tar_of(root_file_system)], name="localhost/north-archive:1")
    provider = DockerProvider(str(path), engine=engine, **LIMITS)
    assert output_of(provider, image, "echo $FROM_ARCHIVE; pwd; ls /home") == "yes\n/work\nagent\n"


def test_a_dockerfile_is_a_root_file_system(engine, containers, image, tmp_path):
    containers.check()
    (tmp_path / "greeting").write_text("hello\n")
    (tmp_path / "Dockerfile").write_text(
        f"# base\nFROM {containers._image_id.removeprefix('sha256:')}\nENV COLOUR=blue\nWORKDIR /opt/app\n"
        "COPY greeting .\nRUN cat greeting \\\n  >copied && id -u >>copied\nCMD true\n"
    )
    provider = DockerProvider(str(tmp_path / "Dockerfile"), engine=engine, **LIMITS)
    assert output_of(provider, image, "echo $COLOUR; cat /opt/app/copied; pwd") == "blue\nhello\n0\n/work\n"


def test_a_dockerfile_from_scratch_takes_local_files(engine, root_file_system, image):
    (root_file_system / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    try:
        provider = DockerProvider(str(root_file_system / "Dockerfile"), engine=engine, **LIMITS)
        assert output_of(provider, image, "echo ${BASH_VERSION:0:1}") == "5\n"
    finally:
        (root_file_system / "Dockerfile").unlink()


def test_the_same_directory_is_sent_once(engine, containers, root_file_system):
    containers.check()
    twin = DockerProvider(str(root_file_system), engine=engine, **LIMITS)
    twin.check()
    assert twin._image_id == containers._image_id


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("RUN true\n", "expected FROM as the first"),
        ("", "expected FROM as the first"),
        ("FROM a AS b\nFROM c\n", "without options, stages"),
        ("FROM a\nFROM c\n", "Dockerfile:2: FROM c: only one FROM"),
        ("FROM a\nCOPY --from=b /x /y\n", "files of other stages"),
        ("FROM a\nADD https://example.org/x /x\n", "there is no network"),
        ("FROM a\nRUN <<END\ntrue\nEND\n", "here-documents"),
        ("FROM a\nRUN --mount=type=cache,target=/x true\n", "options of RUN"),
        ("FROM a\nUSER root\n", "USER root: not supported; expected one of FROM, COPY"),
        ("FROM a\nVOLUME /x\n", "VOLUME /x: not supported"),
        ("FROM a\nRUN true \\\n", "expected another line"),
        ("FROM ${BASE}\n", "variables"),
    ],
)
def test_what_is_beyond_the_subset_is_refused_by_line(text, complaint, tmp_path):
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_dockerfile(tmp_path / "Dockerfile")


def test_the_subset_is_read_as_written(tmp_path):
    (tmp_path / "Dockerfile").write_text("ARG A=1\nfrom debian:12\nRUN a && \\\n # no\n  b\nADD x /x\n")
    steps = read_dockerfile(tmp_path / "Dockerfile")
    assert [(step.line, step.name) for step in steps] == [(1, "ARG"), (2, "FROM"), (3, "RUN"), (6, "ADD")]
    assert steps[2].arguments.split() == ["a", "&&", "b"]
    assert base_of(steps) == "debian:12"


def test_nothing_is_pulled(engine, tmp_path):
    with pytest.raises(SandboxUnavailableError, match="nothing is pulled"):
        DockerProvider("no-such-image:1", engine=engine).check()
    (tmp_path / "Dockerfile").write_text("FROM no-such-image:1\n")
    with pytest.raises(ConfigError, match="FROM no-such-image:1: .* has no such image"):
        DockerProvider(str(tmp_path / "Dockerfile"), engine=engine).check()


def test_a_build_that_fails_says_why(engine, containers, tmp_path):
    containers.check()
    base = containers._image_id.removeprefix("sha256:")
    (tmp_path / "Dockerfile").write_text(f"FROM {base}\nRUN echo because; exit 3\n")
    with pytest.raises(NorthError, match="exit status 3|returned a non-zero code: 3"):
        DockerProvider(str(tmp_path / "Dockerfile"), engine=engine).check()


# ---- the engine


def test_no_engine_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(SandboxUnavailableError, match="no Docker API at unix:///.*podman system service"):
        DockerProvider("x", engine=f"unix://{tmp_path}/none.sock").check()
    with pytest.raises(SandboxUnavailableError, match="expected an engine of this machine"):
        DockerProvider("x", engine="tcp://192.0.2.1:2375").check()


def test_a_container_killed_from_outside_is_an_infrastructure_error(engine, containers, image):
    import docker

    api = docker.APIClient(base_url=engine)

    async def scenario():
        sandbox = await containers.open(image)
        try:
            running = asyncio.ensure_future(sandbox.run("sleep 100", 60))
            while not (found := api.containers()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            api.kill(found[0]["Id"])
            with pytest.raises(SandboxError, match="ended from outside"):
                await running
        finally:
            await sandbox.close()

    asyncio.run(scenario())
    assert api.containers(all=True) == []


def test_containers_of_a_killed_process_end_with_the_next(engine, containers, root_file_system, image):
    import docker

    script = textwrap.dedent(f"""
        import asyncio, os, pathlib, signal
        from north_lightning.sandbox import DockerProvider
        async def main():
            provider = DockerProvider({str(root_file_system)!r}, engine={engine!r})
            sandbox = await provider.open(pathlib.Path({str(image)!r}))
            await sandbox.spawn(["sleep", "9990"])
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    api = docker.APIClient(base_url=engine)
    assert len(api.containers()) == 1
    DockerProvider(str(root_file_system), engine=engine, **LIMITS).check()
    assert api.containers(all=True) == []


def test_an_engine_whose_profile_lets_user_namespaces_through_is_refused(engine, root_file_system, monkeypatch):
    from north_lightning.sandbox import docker

    monkeypatch.setattr(docker, "container_profile", lambda: {"defaultAction": "SCMP_ACT_ALLOW"})
    with pytest.raises(SandboxUnavailableError, match="user namespaces can be nested"):
        DockerProvider(str(root_file_system), engine=engine, **LIMITS).check()


def test_it_is_chosen_in_yaml_like_every_sandbox():
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sandboxes", type=SandboxProvider)
    settings = {"image": "debian:12", "max_slots": 8}
    chosen = {"class_path": "north_lightning.sandbox.DockerProvider", "init_args": settings}
    parsed = parser.parse_string(yaml.safe_dump({"sandboxes": chosen}))
    provider = parser.instantiate(parsed)
    assert isinstance(provider.sandboxes, DockerProvider)
    assert (provider.sandboxes.image, provider.sandboxes.max_slots) == ("debian:12", 8)
    settings["no_such_limit"] = 1
    with pytest.raises(ArgumentError, match="no_such_limit"):
        parser.parse_string(yaml.safe_dump({"sandboxes": chosen}))


# ---- tasks that bring an image


@pytest.fixture(scope="session")
def task_image(engine, containers, tmp_path_factory):
    """An image as tasks name one: with files in its WORKDIR, a variable, and tests of its own."""
    import docker

    containers.check()
    folder = tmp_path_factory.mktemp("built")
    (folder / "Dockerfile").write_text(
        f"FROM {containers._image_id.removeprefix('sha256:')}\nENV COLOUR=blue\nWORKDIR /srv/app\n"
        "RUN echo given >given && ln -s given link && mkdir deep && echo x >deep/x && mkfifo pipe && mkdir /tests\n"
        "RUN echo '[ -e answer -a ! -e note ] && [ -e here ] && echo 1 >/logs/verifier/reward.txt' >/tests/test.sh\n"
    )
    docker.APIClient(base_url=engine).tag(containers._engine.built(folder / "Dockerfile"), "localhost/north-task", "1")
    return "localhost/north-task:1"


def write_image_task(parent, toml, test, **files):
    files = {"task.toml": toml, "instruction.md": "Do it.\n", "tests/test.sh": test, **files}
    for path, text in files.items():
        (parent / path).parent.mkdir(parents=True, exist_ok=True)
        (parent / path).write_text(text)
    return load_task(parent)


def test_a_task_runs_and_is_graded_on_the_image_it_names(containers, task_image, tmp_path, solve):
    seen, expected = "$(cat answer /srv/app/answer link deep/x)", "$(printf 'blue\\nblue\\ngiven\\nx')"
    test = f'[ "{seen}" = "{expected}" ] && echo 1 >/logs/verifier/reward.txt\n'
    task = write_image_task(tmp_path, f'[environment]\ndocker_image = "{task_image}"\n', test)
    rollout = solve(task, containers, "pwd; echo $COLOUR >answer; cat /srv/app/given")
    assert rollout.reward.value == 1.0, rollout.reward.details
    shown = next(message.content for message in rollout.messages if message.role == "tool")
    assert json.loads(shown)["output"] == "/srv/app\ngiven\n"


def test_a_verifier_of_its_own_image_sees_the_artifacts_only(containers, task_image, tmp_path, solve):
    dockerfile = f"FROM {task_image}\nRUN touch here\n"
    toml = f'artifacts = ["/srv/app/answer"]\n[environment]\ndocker_image = "{task_image}"\nworkdir = "/srv/app"\n'
    toml += '[verifier]\nenvironment_mode = "separate"\n'
    task = write_image_task(tmp_path, toml, "exit 1\n", **{"tests/Dockerfile": dockerfile})
    assert task.own_verifier.brings_tests
    rollout = solve(task, containers, "touch answer note; rm -f here")
    assert rollout.reward.value == 1.0, rollout.reward.details


def test_images_that_there_are_not_are_named_before_anything_runs(containers, tmp_path):
    settings = AttemptSettings(
        harnesses={"terminal": MiniSWEAgentHarness()}, verifier=UnitTestVerifier(), sandboxes=containers
    )
    task = write_image_task(tmp_path, '[environment]\ndocker_image = "no-such-image:1"\n', "true\n")
    with pytest.raises(ConfigError, match="has no image 'no-such-image:1'; nothing is pulled"):
        settings.prepare([task])
    # A name is a name: nothing of this machine becomes an image because a task calls its image so.
    with pytest.raises(ConfigError, match="has no image '/etc'"):
        settings.prepare([replace(task, root=RootFileSystem("/etc"))])
