"""The words of each harness: system messages in three wordings, and the frame around an instruction.

The wordings say the same; a run that mixes them trains a model to read its prompt instead of replaying one. Only the
instruction varies from task to task, so that a small model's prompt is a few constant sentences and the task itself.
"""

from __future__ import annotations

from collections.abc import Sequence

REACT_SYSTEM = (
    "Solve the task in the terminal, one tool call at a time. When it is done, answer without a call.",
    "You work in a shell. Each turn, send keystrokes with the terminal tool; when the task is finished, say so.",
    "Use the terminal tool to carry out the request step by step, then say that you are done.",
)

SWE_SYSTEM = (
    "You fix software. Make exactly one tool call in every turn.",
    "You are a software engineer working in a repository through tools. Every turn is exactly one tool call.",
    "Resolve the issue with the tools you have, one call per turn.",
)

SWE_USER = (
    "The repository is in {repository}. Change its code so that this issue is resolved; leave the tests as they are. "
    "Call submit when you are done.\n\n{issue}",
    "Issue in the repository at {repository}:\n\n{issue}\n\nFix the code, not the tests, then submit.",
    "{issue}\n\nThe code is in {repository}. Find the cause, fix it without touching tests, check, and submit.",
)

SWE_REVIEW = "These are your changes. Take back what does not belong to the fix, then call submit again to finish."


def pick(wordings: Sequence[str], variation: int) -> str:
    """The wording with this number, counted round."""
    return wordings[variation % len(wordings)]
