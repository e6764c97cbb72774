"""Where a Harbor task is worked at and where it is graded: root file systems, artifacts, collect commands.

In: a task directory and its configuration. Out: what a ``Task`` says of it, and the names of what sandboxes here cannot
give. ``environment/files/``, where there is one, is all of ``/work`` and needs no image. Nothing is built or pulled
here.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from north_lightning.tasks.check import image_holds_tests
from north_lightning.tasks.schema import Artifact as ArtifactConfig
from north_lightning.tasks.schema import Environment, TaskConfig, TaskStep, Verifier
from north_lightning.types import Artifact, Command, RootFileSystem, VerifierEnvironment

_WORKDIR = re.compile(r"^\s*WORKDIR\s+(/\S*)\s*$", re.IGNORECASE | re.MULTILINE)
_MAIN = (None, "main")


def root_of(directory: Path, environment: Environment) -> RootFileSystem | None:
    """The root file system of the attempt; None where the directory gives ``/work`` as files."""
    files = directory / "environment"
    return None if (files / "files").is_dir() else _root(files, environment.docker_image, environment.workdir)


def _root(files: Path, image: str | None, workdir: str | None) -> RootFileSystem:
    dockerfile = files / "Dockerfile"
    if workdir is None and dockerfile.is_file():
        named = _WORKDIR.findall(dockerfile.read_text(errors="replace"))
        workdir = named[-1] if named else None
    return RootFileSystem(image or dockerfile, workdir)


def collect_hooks(verifier: Verifier) -> tuple[Command, ...]:
    return tuple(Command(hook.command, hook.timeout_sec) for hook in verifier.collect if hook.service == "main")


def verifier_environment(
    directory: Path, config: TaskConfig, root: RootFileSystem | None, step: TaskStep | None = None
) -> tuple[VerifierEnvironment | None, tuple[str, ...]]:
    """Where the tests of a task, or of one of its steps, run if that is not the attempt's environment; and what the
    attempt or its verification asks for that cannot be had."""
    levels = [(config.verifier, directory)]
    if step is not None:
        levels.insert(0, (step.verifier, directory / "steps" / step.name))
    unsupported = [
        f"a collect command in service {hook.service!r}"
        for verifier, _ in levels
        for hook in verifier.collect
        if hook.service not in _MAIN
    ]
    if config.environment.os != "linux":
        unsupported.append(f"os {config.environment.os!r}")
    if root is not None and (directory / "environment" / "docker-compose.yaml").is_file():
        unsupported.append("environment/docker-compose.yaml")
    mode = next((verifier.mode for verifier, _ in levels if verifier.mode is not None), "shared")
    if mode == "shared":
        return None, tuple(unsupported)
    workdir = "/work" if root is None else root.workdir
    artifacts = []
    for entry in [*config.artifacts, *(step.artifacts if step is not None else ())]:
        artifact = ArtifactConfig(source=entry) if isinstance(entry, str) else entry
        path = _below(artifact.source, workdir)
        if artifact.service not in _MAIN or path is None:
            unsupported.append(
                f"the artifact {artifact.source} of {artifact.service or 'main'} (expected one in /work)"
            )
        else:
            artifacts.append(Artifact(path, tuple(artifact.exclude)))
    own = next((place for verifier, place in levels if image_holds_tests(verifier, place)), None)
    if own is None:
        return VerifierEnvironment(tuple(artifacts), root), tuple(unsupported)
    image = next(
        (level.environment.docker_image for level, place in levels if place == own and level.environment), None
    )
    if image is None and not (own / "tests" / "Dockerfile").is_file():
        unsupported.append("tests/docker-compose.yaml")
    there = RootFileSystem(image or own / "tests" / "Dockerfile", workdir or "/work")
    return VerifierEnvironment(tuple(artifacts), there, brings_tests=True), tuple(unsupported)


def _below(source: str, workdir: str | None) -> str | None:
    """``source`` relative to the work directory, which is ``/work`` too; None if it is not in there."""
    path = PurePosixPath(source)
    if not path.is_absolute():
        return str(path)
    for parent in (workdir, "/work"):
        if parent is not None and path.is_relative_to(parent):
            return str(path.relative_to(parent))
    return None
