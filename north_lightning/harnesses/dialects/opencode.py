"""OpenCode's words: bash, read, write, edit."""

from __future__ import annotations

import re

from north_lightning.harnesses import opencode
from north_lightning.harnesses.actions import (
    DONE,
    WORK,
    Action,
    Create,
    Dialect,
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


class OpenCode(Dialect):
    names_directory = True
    many_calls = True
    editor = "edit"

    def read_call(self, call: ToolCall) -> Action:
        arguments = call.arguments
        if call.name == "bash":
            return Run(arguments["command"], absolute(arguments.get("workdir", WORK)))
        if call.name not in ("read", "write", "edit"):
            raise no_counterpart(call.name)
        path = absolute(arguments["filePath"])
        match call.name:
            case "read":
                first, limit = arguments.get("offset", 1), arguments.get("limit")
                return View(path, first, None if limit is None else first + limit - 1)
            case "write":
                return Create(path, arguments["content"])
            case "edit" if not arguments["oldString"]:
                return Create(path, arguments["newString"])
            case "edit" if not arguments.get("replaceAll"):
                return Replace(path, arguments["oldString"], arguments["newString"])
        raise no_counterpart(f"{call.name} with replaceAll")

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        match action:
            case Run(command, directory):
                return tool_call(
                    "bash", reasoning, command=command, **({} if directory == WORK else {"workdir": directory})
                )
            case View(path, 1, None):
                return tool_call("read", reasoning, filePath=path)
            case View(path, first, None):
                return tool_call("read", reasoning, filePath=path, offset=first)
            case View(path, first, int(last)):
                return tool_call("read", reasoning, filePath=path, offset=first, limit=last - first + 1)
            case Create(path, text):
                return tool_call("write", reasoning, content=text, filePath=path)
            case Replace(path, old, new):
                return tool_call("edit", reasoning, filePath=path, oldString=old, newString=new)
        raise no_counterpart(type(action).__name__)

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [AssistantAction(reasoning, words or DONE)]

    def outcome(self, action: Action, observation: str) -> Outcome:
        if isinstance(action, Run):
            return text_outcome("" if observation == opencode.NO_OUTPUT else observation)
        if not isinstance(action, View):
            return Outcome("done" if observation in (opencode.EDITED, opencode.WROTE) else "failed")
        body = re.search(r"<type>file</type>\n<content>\n(.*)\n\n\([^\n]*\)\n</content>$", observation, re.DOTALL)
        if body is None:
            return text_outcome(observation) if observation.startswith("<path>") else Outcome("failed")
        return rows_outcome(body[1], ": ")
