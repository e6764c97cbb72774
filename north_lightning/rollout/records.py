"""Finished rollouts as lines of JSON, for people and for metrics. Token ids are left out: messages say what they
said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from north_lightning.durable import replace_text
from north_lightning.errors import DataError
from north_lightning.types import NOT_SAMPLED, Message, Rollout, ToolCall, Turn

FORMAT = 1
"""Version of the format of a line. A line of another format is not read."""


def rollout_record(rollout: Rollout) -> dict[str, Any]:
    """One rollout as JSON primitives: identity, verdict, turns, versions, messages."""
    versions = [version for version in rollout.policy_versions if version != NOT_SAMPLED]
    return {
        "format": FORMAT,
        "group_id": rollout.group_id,
        "index": rollout.index,
        "task_id": rollout.task_id,
        "environment": rollout.environment,
        "family": rollout.family,
        "seed": rollout.seed,
        "reward": None if rollout.reward is None else rollout.reward.value,
        "reward_details": {} if rollout.reward is None else dict(rollout.reward.details),
        "advantage": rollout.advantage,
        "stop_reason": rollout.stop_reason,
        "duration_s": round(rollout.duration_s, 3),
        "num_tokens": len(rollout.token_ids),
        "num_sampled_tokens": rollout.num_sampled_tokens,
        "policy_version_min": min(versions, default=None),
        "policy_version_max": max(versions, default=None),
        "turns": [
            {"num_tokens": turn.end - turn.start, "finish_reason": turn.finish_reason, "error": turn.error}
            for turn in rollout.turns
        ],
        "messages": [_message(message) for message in rollout.messages],
    }


def rollout_of(record: Mapping[str, Any]) -> Rollout:
    """What a verifier may ask of a recorded rollout: identity, messages, turns, and as many tokens, all of them 0."""
    turns, place = [], 0
    for turn in record["turns"]:
        turns.append(Turn(place, place := place + turn["num_tokens"], turn["finish_reason"], turn["error"]))
    names = ("task_id", "environment", "family", "group_id", "index", "seed", "stop_reason", "duration_s")
    return Rollout(
        **{name: record[name] for name in names},
        token_ids=[0] * place,
        loss_mask=[True] * place,
        turns=turns,
        messages=[_message_of(message) for message in record["messages"]],
    )


def _message_of(record: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(call["id"], call["name"], call["arguments"]) for call in record.get("tool_calls", ()))
    return Message(
        record["role"], record.get("content", ""), record.get("reasoning", ""), calls, record.get("tool_call_id")
    )


def append_records(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Append one line per rollout; a line torn by an earlier crash is closed first."""
    lines = "".join(json.dumps(rollout_record(rollout), default=str) + "\n" for rollout in rollouts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                lines = "\n" + lines
        file.write(lines.encode())


def forget_unended(path: Path, end_of: Callable[[int], str | None]) -> None:
    """Drop the lines of groups that have not ended by the queue's ledger: a resumed run samples them again, and a fresh
    one begins with none. A line that a crash has torn goes with them.

    Raises:
        DataError: lines that another version has written.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            group_id = record["group_id"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if end_of(group_id) is not None:
            if record.get("format") != FORMAT:
                raise DataError(f"{path}: expected lines of format {FORMAT}, got {record.get('format')}: move it aside")
            kept.append(line + "\n")
    replace_text(path, "".join(kept))


def _message(message: Message) -> dict[str, Any]:
    record: dict[str, Any] = {"role": message.role}
    if message.reasoning:
        record["reasoning"] = message.reasoning
    if message.content or not message.tool_calls:
        record["content"] = message.content
    if message.tool_calls:
        record["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        record["tool_call_id"] = message.tool_call_id
    return record
