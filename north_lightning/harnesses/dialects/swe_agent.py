"""SWE-agent's words: bash, its editor, submit."""

from __future__ import annotations

from north_lightning.harnesses import swe_agent
from north_lightning.harnesses.actions import (
    Action,
    Create,
    Dialect,
    Finish,
    Outcome,
    Replace,
    Run,
    View,
    absolute,
    no_counterpart,
    rows_outcome,
    text_outcome,
    tool_call,
)
from north_lightning.types import AssistantAction, ToolCall


class SWEAgent(Dialect):
    keeps_state = True
    editor = "str_replace_editor"

    def read_call(self, call: ToolCall) -> Action:
        arguments = call.arguments
        if call.name == "submit":
            return Finish()
        if call.name == "bash":
            return Run(arguments["command"])
        path = absolute(arguments["path"])
        match arguments["command"]:
            case "view":
                first, last = arguments.get("view_range", (1, -1))
                return View(path, first, None if last == -1 else last)
            case "create":
                return Create(path, arguments["file_text"])
            case "str_replace":
                return Replace(path, arguments["old_str"], arguments.get("new_str", ""))
            case other:
                raise no_counterpart(f"{call.name} {other}")

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        match action:
            case Run(command):
                return tool_call("bash", reasoning, command=command)
            case View(path, 1, None):
                return tool_call("str_replace_editor", reasoning, command="view", path=path)
            case View(path, first, last):
                lines = [first, -1 if last is None else last]
                return tool_call("str_replace_editor", reasoning, command="view", path=path, view_range=lines)
            case Create(path, text):
                return tool_call("str_replace_editor", reasoning, command="create", path=path, file_text=text)
            case Replace(path, old, new):
                return tool_call(
                    "str_replace_editor", reasoning, command="str_replace", path=path, old_str=old, new_str=new
                )
        raise no_counterpart(type(action).__name__)

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [tool_call("submit", reasoning), tool_call("submit", "")]

    def outcome(self, action: Action, observation: str) -> Outcome:
        text = observation.removeprefix("OBSERVATION:\n")
        text = "" if text == swe_agent.NO_OUTPUT else text
        if isinstance(action, Run):
            return text_outcome(text)
        if text.startswith("Error: "):
            return Outcome("failed")
        return rows_outcome(text, "\t") if isinstance(action, View) else Outcome("done")
