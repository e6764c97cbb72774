"""mini-SWE-agent's words: bash, and a marker that hands in."""

from __future__ import annotations

import json
import re
from shlex import quote

from north_lightning.harnesses import mini_swe_agent
from north_lightning.harnesses.actions import Action, Finish, Run, no_counterpart, tool_call
from north_lightning.harnesses.dialects.shell_only import ShellOnly
from north_lightning.types import AssistantAction, ToolCall


class MiniSWEAgent(ShellOnly):
    many_calls = True

    def read_call(self, call: ToolCall) -> Action:
        command = call.arguments["command"]
        if mini_swe_agent.MARKER not in command:
            return Run(command)
        if not re.fullmatch(rf"\s*echo (['\"]?){mini_swe_agent.MARKER}\1\s*", command):
            raise no_counterpart("a command that hands in and does more")
        return Finish()

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        return tool_call("bash", reasoning, command=self.command(action))

    def writing(self, path: str, text: str) -> str:
        if not text.endswith("\n"):
            return super().writing(path, text)
        lines = text.split("\n")
        end = next(word for word in ("EOF", *(f"EOF{number}" for number in range(len(lines)))) if word not in lines)
        return f"cat > {quote(path)} <<'{end}'\n{text}{end}"

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [tool_call("bash", reasoning, command=f"echo {mini_swe_agent.MARKER}")]

    def output(self, action: Action, observation: str) -> str:
        """As far as it was not cut; of an output that was, the whole observation."""
        if observation.startswith("{"):
            return str(json.loads(observation).get("output", observation))
        match = re.fullmatch(r".*?<output>\n(.*)</output>", observation, re.DOTALL)
        return match[1] if match else observation
