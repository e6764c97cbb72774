"""Terminus 2's words: replies in JSON, and what is typed."""

from __future__ import annotations

import json
import re

from north_lightning.errors import RetellingError
from north_lightning.harnesses import terminus2
from north_lightning.harnesses.actions import Action, Finish, Outcome, ReadTurn, View, lasting, no_counterpart, typed
from north_lightning.harnesses.dialects.shell_only import OnScreen
from north_lightning.harnesses.terminus_reply import read_reply
from north_lightning.types import AssistantAction, Message, ToolCall


class Terminus2(OnScreen):
    """Analysis and plan are thoughts: read, they go behind the reasoning; written, they are taken from it."""

    def read(self, turn: Message) -> ReadTurn:
        reply = read_reply(turn.content)
        if turn.tool_calls or reply.error is not None or reply.warnings:
            raise RetellingError("unreadable_turn", f"expected a sound reply of Terminus 2, got {turn.content[:80]!r}")
        fields = json.loads(turn.content)
        thoughts = (turn.reasoning, fields["analysis"], fields["plan"])
        actions: list[Action] = [typed(command.text, needs_newline=True) for command in reply.commands]
        if not actions and not reply.is_complete:
            raise no_counterpart("a turn that only waits")
        if reply.is_complete:
            actions.append(Finish(fields["analysis"]))
        whole = AssistantAction(content=turn.content)
        calls = [whole] if len(actions) == 1 else [self._alone(action) for action in actions]
        return ReadTurn("\n\n".join(thought for thought in thoughts if thought), tuple(actions), tuple(calls))

    def _alone(self, action: Action) -> AssistantAction:
        """One action of a batch as a reply of its own."""
        return self.finish("")[0] if isinstance(action, Finish) else self.write(action)

    def read_call(self, call: ToolCall) -> Action:
        raise no_counterpart(call.name)

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        command = self.command(action)
        is_quick = re.match(r"(ls|cat|cd|head|tail|echo|pwd|grep|sed|printf|mkdir|mv|cp|rm)\b", command) is not None
        keys = {"keystrokes": command + "\n", "duration": 1.0 if is_quick else 15.0}
        return self._reply(reasoning, f"Run: {command.splitlines()[0] if command else ''}", [keys], is_complete=False)

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        done = self._reply(reasoning or words, "Nothing is left to do.", [], is_complete=True)
        return [done, self._reply("", "Confirm that the task is complete.", [], is_complete=True)]

    def output(self, action: Action, observation: str) -> str:
        """What stands between the echo of the command and the next prompt, its blanks left out where it wraps."""
        screen = observation.removeprefix(terminus2.NEW_OUTPUT).removeprefix(terminus2.SCREEN)
        shown = "".join(lasting(screen).split())
        echo = "".join(lasting(f"$ {self.command(action)}".replace("\n", "\n> ")).split())
        if not (shown.startswith(echo) and shown.endswith("$")):
            return observation
        return shown[len(echo) :].removesuffix("$")

    def outcome(self, action: Action, observation: str) -> Outcome:
        output = self.output(action, observation)
        if isinstance(action, View):
            return Outcome("failed") if output.startswith("cat:") else Outcome("text", output)
        return super().outcome(action, observation)

    @staticmethod
    def _reply(reasoning: str, plan: str, commands: list[dict[str, object]], *, is_complete: bool) -> AssistantAction:
        analysis = reasoning.rpartition("\n\n")[2] or "The work goes on."
        reply = {"analysis": analysis, "plan": plan, "commands": commands, "task_complete": is_complete}
        return AssistantAction(reasoning, json.dumps(reply, indent=2, ensure_ascii=False))
