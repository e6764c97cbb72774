"""The evaluation's memory: one line per attempt, appended as it ends, keyed so that a stopped evaluation goes on.

In: finished rollouts. Out: ``attempts.jsonl``. The key is (weights, task, harness, settings, seed): what decides how an
attempt goes. What decides its verdict (``tests``, ``verifier``, ``grader``) is beside the key: where only that has
changed, what the attempt left is graded again (``evaluate.regrade``).
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from north_lightning.errors import DataError
from north_lightning.interfaces import Harness, RewardVerifier
from north_lightning.rollout.metrics import is_solved, num_invalid_turns
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.types import Rollout, Task
from north_lightning.verifiers.loops import has_loop

ATTEMPTS = "attempts.jsonl"
FORMAT = 1
"""Version of the format of a recorded attempt. Files of another format are not read."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one task. ``reward`` is None exactly when ``error`` says what failed outside the model.

    ``weights``, ``task``, ``tests``, ``harness``, ``settings`` and ``verifier`` are digests. ``kept`` names what the
    attempt left behind (``works``); empty where nothing is kept. ``grader`` is name and version of what graded it.
    """

    checkpoint: str
    weights: str
    task_id: str
    task: str
    environment: str
    family: str
    harness: str
    seed: int
    reward: float | None
    settings: str = ""
    solved: bool = False
    error: str | None = None
    stop_reason: str = ""
    turns: int = 0
    generated_tokens: int = 0
    invalid_turns: int = 0
    looped: bool = False
    duration_s: float = 0.0
    tests: str = ""
    verifier: str = ""
    kept: str = ""
    grader: str = ""
    format: int = FORMAT

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return (self.weights, self.task, self.harness, self.settings, self.seed)


def attempt_of(rollout: Rollout, identity: dict[str, Any], kept: str = "") -> Attempt:
    """The record of a finished rollout; ``identity`` holds the fields that name it."""
    return Attempt(
        **identity,
        kept=kept,
        reward=rollout.reward.value if rollout.reward is not None else 0.0,
        solved=is_solved(rollout),
        stop_reason=rollout.stop_reason,
        turns=len(rollout.turns),
        generated_tokens=sum(turn.end - turn.start for turn in rollout.turns),
        invalid_turns=num_invalid_turns(rollout),
        looped=has_loop(rollout),
        duration_s=round(rollout.duration_s, 3),
    )


def read_attempts(path: Path) -> list[Attempt]:
    """Every recorded attempt; a half-written last line (a killed run) is left out, any other bad line is an error."""
    if not path.exists():
        return []
    known = {field.name for field in fields(Attempt)}
    lines = path.read_text().splitlines()
    attempts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row.get("format") != FORMAT:
                found = row.get("format", "none (an earlier version's)")
                raise DataError(
                    f"{path}:{number}: expected attempts of format {FORMAT}, got {found}: move the file aside"
                )
            attempts.append(Attempt(**{key: row[key] for key in row if key in known}))
        except DataError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: not an attempt: {error}") from error
    return attempts


def append_attempts(path: Path, attempts: Iterable[Attempt]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for attempt in attempts:
            file.write(json.dumps(asdict(attempt)) + "\n")


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its newline, so that appending starts on a fresh one."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def task_digest(task: Task) -> str:
    """What an attempt at the task sees: instruction, environment, steps, settings but those of its verifier; the first
    16 hex digits of a SHA-256."""
    digest = sha256(f"{task.instruction}\0{task.max_turns}\0".encode())
    settings, _ = _split_settings(task)
    digest.update(settings)
    _add_files(digest, task.directory, "environment", "steps")
    return digest.hexdigest()[:16]


def grading_digest(task: Task) -> str:
    """What the task's verdict is made of: its tests, expected tests and settings of its verifier; as the other."""
    _, settings = _split_settings(task)
    digest = sha256(settings)
    _add_files(digest, task.directory, "tests")
    return digest.hexdigest()[:16]


VERDICT_SETTINGS = ("verifier", "metadata")
"""Tables of ``task.toml`` that an attempt does not see, but for ``ATTEMPT_METADATA``."""
ATTEMPT_METADATA = ("environment", "family", "max_turns", "framework")


def _split_settings(task: Task) -> tuple[bytes, bytes]:
    """``task.toml``, as what an attempt depends on and what its verdict depends on."""
    try:
        settings = tomllib.loads((task.directory / "task.toml").read_text())
    except FileNotFoundError:
        settings = {}
    metadata = settings.get("metadata", {})
    verdict = {name: settings.pop(name) for name in VERDICT_SETTINGS if name in settings}
    settings["metadata"] = {name: metadata[name] for name in ATTEMPT_METADATA if name in metadata}
    return tuple(json.dumps(part, sort_keys=True, default=str).encode() for part in (settings, verdict))  # type: ignore[return-value]


def _add_files(digest: Any, directory: Path, *parts: str) -> None:
    for part in parts:
        for path in (directory / part, *sorted((directory / part).rglob("*"))):
            if ".git" in path.parts or not os.path.lexists(path):
                continue
            digest.update(f"{path.relative_to(directory)}\0".encode())
            if path.is_symlink():
                digest.update(str(path.readlink()).encode())
            elif path.is_file():
                digest.update(path.read_bytes())


def weights_digest(checkpoint: Path) -> str:
    """The first 16 hex digits of a SHA-256 of a checkpoint's safetensors shards, config.json and tokenizer.json."""
    digest = sha256()
    for file in sorted(
        [*checkpoint.glob("*.safetensors"), *checkpoint.glob("config.json"), *checkpoint.glob("tokenizer.json")]
    ):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def harness_digest(harness: Harness) -> str:
    """Name and settings of a harness."""
    return f"{harness.name}-{sha256(repr(_settings_of(harness)).encode()).hexdigest()[:8]}"


def settings_digest(runner: AttemptRunner) -> str:
    """How a runner samples, and where commands run; the first 8 hex digits of a SHA-256. Time limits of stages are not
    in it: an attempt that meets one is not scored."""
    parts = (*runner.sampling, runner.vary_prompts)
    return sha256(repr((parts, _settings_of(runner.sandboxes))).encode()).hexdigest()[:8]


def verifier_digest(verifier: RewardVerifier) -> str:
    """Class and settings of a verifier."""
    return f"{type(verifier).__name__}-{sha256(repr(_settings_of(verifier)).encode()).hexdigest()[:8]}"


def _settings_of(part: object) -> Any:
    """Class and public attributes of a part chosen in the config, and of the parts within it, but for those that its
    class calls ``without_effect`` on an attempt's outcome."""
    if isinstance(part, str | int | float | bool | Path | type(None)):
        return part
    if isinstance(part, Mapping):
        return sorted((str(key), _settings_of(value)) for key, value in part.items())
    if isinstance(part, Iterable):
        return [_settings_of(value) for value in part]
    left_out = getattr(type(part), "without_effect", ())
    public = {
        name: value
        for name, value in getattr(part, "__dict__", {}).items()
        if not name.startswith("_") and name not in left_out
    }
    return f"{type(part).__module__}.{type(part).__qualname__}", _settings_of(public)
