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

_TAGS = "pr_description|issue_description|github_issue|issue|task_description|task|problem_statement|instruction"
_FRAMES = (
    re.compile(rf"<({_TAGS})>\s*(?:Consider the following PR description:\n)?(?P<task>.*?)\s*</\1>", re.DOTALL),
    re.compile(
        r"\AYou are an AI assistant .{0,600}?as JSON\b.*?\nTask Description:\n(?P<task>.*)\n\n"
        r"Current terminal state:\n(?P<terminal>.*)\Z",
        re.DOTALL,
    ),
    re.compile(r"\APlease solve this issue: (?P<task>.*?)\n\nYou can execute bash commands", re.DOTALL),
)
_DIRECTORIES = (
    re.compile(r"<uploaded_files>\s*(/\S+)\s*</uploaded_files>"),
    re.compile(r"(?:[Dd]irectory|repository|code files):? (?:in |at )?`?(/[\w./-]*\w)"),
)


@dataclass(frozen=True, slots=True)
class Opening:
    """The first messages of a conversation, up to the assistant's first turn."""

    num_messages: int
    task: str
    is_framed: bool  # by an agent program's words
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
    found = next(filter(None, (frame.search(text) for frame in _FRAMES)), None)
    if found is None:
        return Opening(length, text, False, directory)
    return Opening(length, found["task"], True, directory, found.groupdict().get("terminal", ""))
