"""The common subset of Dockerfiles: what is in it, and a build context that needs no registry.

In: a Dockerfile. Out: its instructions, or an error that names the line. ``FROM`` (one; ``scratch`` or an image that
the engine has), ``COPY``, ``ADD`` of local files, ``RUN``, ``WORKDIR``, ``ENV``, ``ARG`` and ``LABEL`` have effect;
``CMD``, ``ENTRYPOINT`` and ``EXPOSE`` are read and mean nothing to a sandbox. Everything else is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from north_lightning.errors import ConfigError
from north_lightning.untrusted import read_file

SUPPORTED = ("FROM", "COPY", "ADD", "RUN", "WORKDIR", "ENV", "ARG", "LABEL", "CMD", "ENTRYPOINT", "EXPOSE")


@dataclass(frozen=True, slots=True)
class Instruction:
    line: int
    name: str
    arguments: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """Every instruction of the Dockerfile; ``ConfigError`` names the first one that sandboxes do not support."""
    instructions = _instructions(path)
    if not instructions or next(step.name for step in instructions if step.name != "ARG") != "FROM":
        raise ConfigError(f"{path}: expected FROM as the first instruction")
    for number, step in enumerate(instructions):
        reason = _refusal(step, is_first=all(earlier.name == "ARG" for earlier in instructions[:number]))
        if reason:
            raise ConfigError(f"{path}:{step.line}: {step.name} {step.arguments[:60]}: {reason}")
    return instructions


def base_of(instructions: list[Instruction]) -> str | None:
    """The image that ``FROM`` names; None for ``scratch``."""
    name = next(step.arguments for step in instructions if step.name == "FROM")
    return None if name == "scratch" else name


def _instructions(path: Path) -> list[Instruction]:
    found: list[Instruction] = []
    begun, text = 0, ""
    try:
        content = read_file(path, path.parent, error=ConfigError).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a Dockerfile, got: {error}") from None
    for number, line in enumerate(content.split("\n"), 1):
        if re.match(r"\s*#\s*escape\s*=\s*[^\\\s]", line, re.IGNORECASE):
            raise ConfigError(f"{path}:{number}: another escape character than the backslash is not supported")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = begun if text else number
        text += line.rstrip() if text else line.strip()
        if text.endswith("\\"):
            text = text[:-1]  # as Docker joins lines: a word may go on in the next one
            continue
        name, _, arguments = text.partition(" ")
        found.append(Instruction(begun, name.upper(), arguments.strip()))
        text = ""
    if text:
        raise ConfigError(f"{path}:{begun}: expected another line after the backslash")
    return found


def _refusal(step: Instruction, *, is_first: bool) -> str:
    """Why ``step`` cannot be done; empty if it can."""
    if step.name not in SUPPORTED:
        return f"not supported; expected one of {', '.join(SUPPORTED)}"
    if step.name == "FROM" and not is_first:
        return "only one FROM is supported, no stages"
    if step.name == "FROM" and re.search(r"\s|\$", step.arguments):
        return "expected the name of one image, without options, stages and variables"
    if step.name in ("COPY", "ADD") and re.search(r"--(from|mount|link|chown|checksum)\b", step.arguments):
        return "only --chmod is supported; files of other stages or owners are not"
    if step.name == "ADD" and re.search(r"://|@|\$|\.git\b", step.arguments):
        return "there is no network; expected local files, named without variables"
    if step.name in ("COPY", "ADD", "RUN") and re.search(r"<<-?['\"]?\w", step.arguments):
        return "here-documents are not supported"
    if step.name == "RUN" and step.arguments.startswith("--"):
        return "options of RUN are not supported"
    return ""
