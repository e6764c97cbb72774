"""Builds a Dockerfile of the common subset under bubblewrap, without a container engine.

In: the instructions, their context and the root file system that ``FROM`` names. Out: that directory changed, and what
the Dockerfile says to whoever runs it. Every command runs in namespaces of its own, without a network or capabilities,
as the only user that there is: root inside, an unprivileged user of this machine outside. Where a command gives a file
to another user, it fails; so does what would download something.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from north_lightning.errors import ConfigError, TreeTooLargeError
from north_lightning.sandbox.command import ENVIRONMENT, Limits, build_launcher
from north_lightning.sandbox.dockerfile import Instruction
from north_lightning.sandbox.layers import ImageSettings
from north_lightning.sandbox.probe import program
from north_lightning.sandbox.slots import Host, Slot
from north_lightning.sandbox.trees import Allowance, copy_tree, delete_tree

MAX_BYTES, MAX_FILES = 16 << 30, 1_000_000
CONTEXT = "/run/context"
LIMITS = Limits(memory_bytes=8 << 30, max_processes=256, max_file_bytes=4 << 30)
"""Of each process, and of all processes of a build."""
_WORDS_IN_ERRORS = 800
_MAX_CHARS = 1 << 16
_VARIABLE = re.compile(r"\\\$|\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


@dataclass(frozen=True)
class Build:
    """Where and how the commands run: ``system`` is changed, ``context`` is only read; both are copies."""

    path: Path  # of the Dockerfile
    system: Path
    context: Path
    host: Host
    slot: Slot
    timeout_s: float


def build(build: Build, instructions: Sequence[Instruction], base: ImageSettings) -> ImageSettings:
    """Carry out everything after ``FROM``; ``ConfigError`` names the line that fails, with the command's last words."""
    settings = base
    arguments: dict[str, str] = {}
    for step in instructions:
        try:
            if step.name == "ARG":
                arguments |= _argument(step.arguments, {**arguments, **settings.variables})
            elif step.name == "ENV":
                settings = replace(settings, variables={**settings.variables, **_variables(step, settings, arguments)})
            elif step.name == "WORKDIR":
                place = PurePosixPath(settings.workdir or "/", expanded(step.arguments, settings, arguments))
                settings = replace(settings, workdir=str(place))
                _run(build, ["mkdir", "-p", settings.workdir], replace(settings, workdir="/"), {})
            elif step.name == "RUN":
                _run(build, _program(step.arguments), settings, arguments)
            elif step.name in ("COPY", "ADD"):
                _run(build, ["/bin/sh", "-c", _copying(build, step, settings, arguments)], settings, {})
        except (_StepFailed, ValueError) as failed:  # a quote that is not closed, a NUL
            raise ConfigError(f"{build.path}:{step.line}: {step.name} {step.arguments[:80]}: {failed}") from None
    return settings


def expanded(text: str, settings: ImageSettings, arguments: Mapping[str, str]) -> str:
    """``$NAME``, ``${NAME}`` and ``${NAME:-default}``; ENV goes before ARG."""
    known = {"PATH": ENVIRONMENT["PATH"], **arguments, **settings.variables}

    def value(match: re.Match[str]) -> str:
        if match[0] == "\\$":
            return "$"
        found = known.get(match[1] or match[2], "")
        return found or (match[3] or "")

    long = _VARIABLE.sub(value, text)
    if len(long) > _MAX_CHARS:
        raise _StepFailed(f"expected at most {_MAX_CHARS} characters once variables are filled in, got {len(long)}")
    return long


class _StepFailed(Exception):
    """Why an instruction could not be carried out."""


def _argument(text: str, known: Mapping[str, str]) -> dict[str, str]:
    name, has_default, default = text.partition("=")
    words = shlex.split(default) if has_default else []
    return {name.strip(): expanded(words[0] if words else "", ImageSettings(), known)}


def _variables(step: Instruction, settings: ImageSettings, arguments: Mapping[str, str]) -> dict[str, str]:
    """``NAME=value ...`` with quotes, or the old ``NAME value``; values see the variables before this instruction."""
    if "=" not in step.arguments.split(maxsplit=1)[0]:
        name, _, value = step.arguments.partition(" ")
        return {name: expanded(value.strip(), settings, arguments)}
    try:
        pairs = [word.partition("=") for word in shlex.split(step.arguments)]
    except ValueError as error:
        raise _StepFailed(str(error)) from None
    return {name: expanded(value, settings, arguments) for name, _, value in pairs}


def _program(text: str) -> list[str]:
    words = _words(text) if text.startswith("[") else None
    return words or ["/bin/sh", "-c", text]


def _words(text: str) -> list[str] | None:
    """The exec form, a JSON list of strings; None if it is none."""
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _copying(build: Build, step: Instruction, settings: ImageSettings, arguments: Mapping[str, str]) -> str:
    """The script that copies inside, where links lead nowhere else. Directories are copied by their content."""
    text = expanded(step.arguments, settings, arguments)
    mode = re.match(r"--chmod=(\S+)\s+", text)
    text = text[mode.end() :] if mode else text
    *sources, target = _words(text) or shlex.split(text) or [""]
    found = [path for source in sources for path in _found(build.context, source)]
    if not found:
        raise _StepFailed("expected sources and a destination")
    if step.name == "ADD" and any(re.search(r"\.(tar|tgz|tbz2|txz|tar\.\w+)$", path.name) for path in found):
        raise _StepFailed("archives are not unpacked under bubblewrap; use RUN tar, or the DockerProvider")
    is_folder = target.endswith("/") or target in (".", "..") or len(found) > 1
    place = str(PurePosixPath(settings.workdir or "/", target))
    lines = ["set -e", "umask 022"]
    for path in found:
        source = shlex.quote(f"{CONTEXT}/{path.relative_to(build.context)}")
        if path.is_dir() and not path.is_symlink():
            name, folder = shlex.quote(place), shlex.quote(place)
            lines.append(f"mkdir -p {folder}; cp -R --preserve=mode,timestamps,links {source}/. {folder}")
        else:
            into = f"{place}/{path.name}" if is_folder else place
            name, folder = shlex.quote(into), shlex.quote(str(PurePosixPath(into).parent))
            lines.append(f"mkdir -p {folder}; [ ! -d {name} ] || set -- {name}/{shlex.quote(path.name)}")
            lines.append(f"cp -P --preserve=mode,timestamps,links {source} ${{1:-{name}}}")
        if mode:
            lines.append(f"chmod -R {shlex.quote(mode[1])} {name}")
    return "\n".join(lines)


def _found(context: Path, pattern: str) -> list[Path]:
    """What a source names in the context; nothing outside of it."""
    words = pattern.strip("/")
    if ".." in PurePosixPath(words).parts:
        raise _StepFailed(f"{pattern} leads out of the build context")
    if words in ("", "."):
        return [context]
    found = sorted(_matching(context, PurePosixPath(words).parts))
    if not found:
        raise _StepFailed(f"{pattern} is not in the build context")
    return found


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """What fits one pattern for each part of the path; no link is followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if fnmatchcase(entry.name, patterns[0]):
                if len(patterns) == 1:
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    yield from _matching(Path(entry.path), patterns[1:])


def _run(build: Build, argv: list[str], settings: ImageSettings, arguments: Mapping[str, str]) -> None:
    launcher = build_launcher(
        bwrap=program("bwrap"),
        setpriv="" if build.slot.uid is None else program("setpriv"),
        uid=build.slot.uid,
        system=build.system,
        context=build.context,
        seccomp=build.host.seccomp,
        workdir=settings.workdir or "/",
        variables={**arguments, **settings.variables},
        limits=LIMITS,
    )
    filter_fd = launcher.open_filter()
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.run(
                launcher.argv(argv, filter_fd), stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={}, cwd="/",
                pass_fds=() if filter_fd is None else (filter_fd,), timeout=build.timeout_s,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise _StepFailed(f"did not end within {build.timeout_s:g} s") from None
        finally:
            if filter_fd is not None:
                os.close(filter_fd)
        said.seek(max(said.seek(0, os.SEEK_END) - _WORDS_IN_ERRORS, 0))
        words = said.read().decode(errors="replace").strip("\x02 \n")
    if code:
        hint = " (there is no network while an image is built here)" if _NETWORK.search(words) else ""
        raise _StepFailed(f"exit code {code}{hint}: {words}")


_NETWORK = re.compile(r"resolve|[Nn]etwork is unreachable|name resolution|Connection (refused|failed)|No route")


def built_root(path: Path, instructions: Sequence[Instruction], system: Path, base: ImageSettings, host: Host,
               timeout_s: float) -> ImageSettings:  # fmt: skip
    """``system``, the root file system that ``FROM`` names, as the Dockerfile at ``path`` makes it.

    The commands work on a copy that belongs to a user of its own; it takes the place of ``system`` as this process's.
    """
    if (ignored := path.with_name(".dockerignore")).exists():
        raise ConfigError(f"{ignored}: not read under bubblewrap; use the DockerProvider")
    copy, context, done = (system.with_name(name) for name in ("building", "context", "built"))
    slot = host.take(16 << 20, 1000)
    try:
        copy_tree(system, copy, slot.uid)
        copy_tree(path.parent, context, slot.uid, Allowance(MAX_BYTES, MAX_FILES))
        for tree in (copy, context):
            tree.chmod(0o755)
            if slot.uid is not None:
                os.chown(tree, slot.uid, slot.uid)
        settings = build(Build(path, copy, context, host, slot, timeout_s), instructions, base)
        copy_tree(copy, done, allowance=Allowance(MAX_BYTES, MAX_FILES))
    except TreeTooLargeError as error:
        raise ConfigError(f"{path}: more than an image or its context may hold: {error}") from error
    finally:
        host.give_back(slot)
        for old in (copy, context):
            delete_tree(old)
    delete_tree(system)
    done.rename(system)
    return settings
