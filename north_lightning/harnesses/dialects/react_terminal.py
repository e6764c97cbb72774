"""The ReAct terminal's words: what is typed."""

from __future__ import annotations

from north_lightning.harnesses import react_terminal
from north_lightning.harnesses.actions import DONE, Action, tool_call, typed
from north_lightning.harnesses.dialects.shell_only import OnScreen
from north_lightning.types import AssistantAction, ToolCall


class ReActTerminal(OnScreen):
    def read_call(self, call: ToolCall) -> Action:
        return typed(call.arguments["keystrokes"])

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        return tool_call("terminal", reasoning, keystrokes=self.command(action))

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [AssistantAction(reasoning, words or DONE)]

    def output(self, action: Action, observation: str) -> str:
        return "" if observation == react_terminal.NO_OUTPUT else observation
