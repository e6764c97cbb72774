"""Replies of Terminus 2 from the steps that Harbor made of them.

Harbor writes either the raw reply (``raw_content``) or "Analysis: ... Plan: ..." with the keystrokes as calls of
``bash_command`` and ``mark_task_complete``, tools that the agent never had. The reply is written again, as JSON or,
where the prompt asks for it, as XML; which blanks the model had between its fields is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from north_lightning.data.formats.base import Notes, text_of_parts

_TOOLS = {"bash_command", "mark_task_complete"}
_FIELDS = re.compile(r"(?:Analysis: (.*?))?(?:(?:\A|\n)Plan: (.*))?", re.DOTALL)
_ERROR = "Previous response had parsing errors"


def wrote(agent: Mapping[str, Any], steps: Sequence[Any]) -> bool:
    """Whether the steps are those of Terminus 2."""
    called = {
        call.get("function_name")
        for step in steps
        if isinstance(step, dict)
        for call in step.get("tool_calls") or []
        if isinstance(call, dict)
    }
    is_named = re.sub(r"[\W_]", "", str(agent.get("name", ""))).lower().startswith("terminus")
    return called <= _TOOLS and (is_named or "mark_task_complete" in called)


def is_xml(agent: Mapping[str, Any], steps: Sequence[Any]) -> bool:
    """Whether the agent answered in XML."""
    extra = agent.get("extra")
    if isinstance(extra, dict) and extra.get("parser"):
        return extra["parser"] == "xml"
    asked = next((text_of_parts(step.get("message")) for step in steps if step.get("source") == "user"), "")
    return "<response>" in asked and "<keystrokes" in asked


def messages_of(step: Mapping[str, Any], as_xml: bool, notes: Notes) -> Iterator[dict[str, Any]]:
    """The agent's turn, and what its terminal showed."""
    from north_lightning.data.formats.atif import marked, observed  # which asks this module about every agent

    seen = [content for content, _ in observed(step, notes)]
    message = text_of_parts(step.get("message"))
    if message != "" and not step.get("tool_calls") and (not _fields(message) or "".join(seen[:1]).startswith(_ERROR)):
        reply = message  # as the model wrote it
    else:
        reply = _reply(_fields(message) or (message, ""), step.get("tool_calls") or [], as_xml)
        notes.changed["replies of Terminus 2 put together from their parts"] += 1
    yield marked(step) | {
        "role": "assistant",
        "content": reply,
        "reasoning_content": step.get("reasoning_content"),
    }
    yield from ({"role": "user", "content": content} for content in seen)


def _fields(message: str) -> tuple[str, str] | None:
    """Analysis and plan, if a message is made of them."""
    found = _FIELDS.fullmatch(message) if message.startswith(("Analysis: ", "Plan: ")) or not message else None
    return None if found is None else (found[1] or "", found[2] or "")


def _reply(fields: tuple[str, str], calls: Sequence[Mapping[str, Any]], as_xml: bool) -> str:
    analysis, plan = fields
    commands = [
        {"keystrokes": arguments.get("keystrokes", ""), "duration": arguments.get("duration", 1.0)}
        for arguments in (call.get("arguments") or {} for call in calls if call.get("function_name") == "bash_command")
    ]
    is_complete = any(call.get("function_name") == "mark_task_complete" for call in calls)
    if not as_xml:
        reply = {"analysis": analysis, "plan": plan, "commands": commands} | (
            {"task_complete": True} if is_complete else {}
        )
        return json.dumps(reply, indent=2, ensure_ascii=False)
    typed = "".join(f'<keystrokes duration="{one["duration"]}">{one["keystrokes"]}</keystrokes>\n' for one in commands)
    end = "<task_complete>true</task_complete>\n" if is_complete else ""
    return (
        f"<response>\n<analysis>\n{analysis}\n</analysis>\n<plan>\n{plan}\n</plan>\n<commands>\n{typed}</commands>\n"
        f"{end}</response>"
    )
