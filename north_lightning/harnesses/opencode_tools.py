"""OpenCode's tools as its model sees them: names and schemas as published, descriptions in our words. Data only."""

from __future__ import annotations

from north_lightning.types import ToolSpec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MAX_INTEGER = 2**53 - 1
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": _MAX_INTEGER}
_POSITIVE = {"type": "integer", "minimum": -_MAX_INTEGER, "exclusiveMinimum": 0, "maximum": _MAX_INTEGER}


def _tool(name: str, description: str, required: list[str], /, **properties: object) -> ToolSpec:
    schema = {"$schema": _DIALECT, "type": "object", "properties": properties, "required": required}
    return ToolSpec(name, description, schema)


_TODO = {
    "type": "object",
    "properties": {"content": _TEXT, "status": _TEXT, "priority": _TEXT},
    "required": ["content", "status", "priority"],
}

TOOLS = (
    _tool(
        "bash",
        "Run a command in bash, in workdir (default: the project); timeout is in milliseconds.",
        ["command"],
        command=_TEXT,
        timeout=_POSITIVE,
        workdir=_TEXT,
    ),
    _tool(
        "edit",
        "Replace oldString in a file by newString; it must be found once, unless replaceAll is set.",
        ["filePath", "oldString", "newString"],
        filePath=_TEXT,
        oldString=_TEXT,
        newString=_TEXT,
        replaceAll={"type": "boolean"},
    ),
    _tool("glob", "Find files by a pattern such as **/*.py.", ["pattern"], pattern=_TEXT, path=_TEXT),
    _tool(
        "grep",
        "Find lines that match a regular expression; include limits the files, such as *.py.",
        ["pattern"],
        pattern=_TEXT,
        path=_TEXT,
        include=_TEXT,
    ),
    _tool(
        "read",
        "Read a file, with line numbers, or list a directory; offset is the first line, limit their number.",
        ["filePath"],
        filePath=_TEXT,
        offset=_COUNT,
        limit=_COUNT,
    ),
    _tool("skill", "Load instructions for a kind of task.", ["name"], name=_TEXT),
    _tool(
        "task",
        "Give a task to another agent.",
        ["description", "prompt", "subagent_type"],
        description=_TEXT,
        prompt=_TEXT,
        subagent_type=_TEXT,
        task_id=_TEXT,
        command=_TEXT,
    ),
    _tool(
        "todowrite",
        "Replace the list of things to do.",
        ["todos"],
        todos={"type": "array", "items": _TODO},
    ),
    _tool(
        "webfetch",
        "Fetch a page.",
        ["url"],
        url=_TEXT,
        format={"type": "string", "enum": ["text", "markdown", "html"], "default": "markdown"},
        timeout={"type": "number"},
    ),
    _tool("write", "Write a file; what it held is lost.", ["content", "filePath"], content=_TEXT, filePath=_TEXT),
)
