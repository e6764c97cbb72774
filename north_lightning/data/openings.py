"""The task in the opening of a conversation, without the words that an agent program puts around every task.

In: messages. Out: where the opening ends, the task, and where the work is. It knows the prompts of SWE-agent (and
SWE-smith), mini-SWE-agent, OpenHands and Terminus 2 (in JSON), and tags like ``<issue>``; in other openings all that
the user says is the task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from north_lightning.types import Message

_TAGS = (
    "pr_description",
    "issue_description",
    "github_issue",
    "issue",
    "task_description",
    "task",
    "problem_statement",
)
_TERMINUS = ("You are an AI assistant ", "\nTask Description:\n", "\n\nCurrent terminal state:\n")
_MINI = ("", "Please solve this issue: ", "\n\nYou can execute bash commands")
_FRAMES = (_TERMINUS, _MINI, *((None, f"<{tag}>", f"</{tag}>") for tag in _TAGS))
"""How a prompt begins, if that matters, and what stands before and after the task."""
_DIRECTORIES = (
    re.compile(r"<uploaded_files>\s*(/\S+)\s*</uploaded_files>"),
    re.compile(r"(?:[Dd]irectory|repository|code files):? (?:in |at )?`?(/[\w./-]*\w)"),
)


@dataclass(frozen=True, slots=True)
class Opening:
    """The first messages of a conversation, up to the assistant's first turn."""

    num_messages: int
    task: str
    is_framed: bool  # by an agent program's words, for a harness that is here too
    directory: str = ""  # where the repository is, if the opening says so
    terminal: str = ""  # what the terminal showed, if the opening says so


def read_opening(messages: Sequence[Message]) -> Opening | None:
    """The opening of a conversation; None for one in which the assistant does not answer a user."""
    length = next((index for index, message in enumerate(messages) if message.role == "assistant"), len(messages))
    if not length or messages[length - 1].role != "user":
        return None
    text = messages[length - 1].content
    places = (place.search(message.content) for place in _DIRECTORIES for message in messages[:length])
    directory = next((place[1] for place in places if place), "")
    for first, start, end in _FRAMES:
        before, starts, rest = text.partition(start)
        task, ends, after = rest.rpartition(end)
        is_other = first is not None and (not before.startswith(first) or (not first and before))
        if not (starts and ends) or is_other:
            continue
        task = task.strip() if first is None else task
        task = task.removeprefix("Consider the following PR description:\n")
        is_terminus = first == _TERMINUS[0]
        is_xml = is_terminus and "as JSON" not in before  # which no harness of ours takes
        return Opening(length, task, not is_xml, directory, after if is_terminus else "")
    return Opening(length, text, False, directory)
