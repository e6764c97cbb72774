"""What the scripted model says, per harness and scenario: played to the real agent once, and to ours in every test.

A turn is ``{"content": ..., "tool_calls": [(name, arguments), ...]}``. The tree they act on is ``FILES``.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

FILES = {"calc.py": "def add(a, b):\n    return a - b\n", "pkg/deep.txt": "deep\n"}

MAX_CHARS = 1000

Turns = list[dict[str, Any]]

SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def bash(*commands: str) -> dict[str, Any]:
    return {"tool_calls": [("bash", {"command": command}) for command in commands]}


MINI_SWE_AGENT: dict[str, Turns] = {
    "fix and submit": [
        bash("ls", "cat calc.py"),
        bash("sed -i 's/a - b/a + b/' calc.py && cat calc.py"),
        bash("cd pkg; x=1"),
        bash("ls; echo [$x]"),
        bash(SUBMIT),
    ],
    "outputs": [
        bash("true"),
        bash("false"),
        bash("echo out; echo err >&2; exit 3"),
        bash("printf 'no newline'"),
        bash("printf '\\377\\376 caf\\303\\251'"),
        bash("printf '<output>&\"quoted\" it\\047s</output>\\n'"),
        bash("printf '%09999d' 7"),
        bash("printf '%010000d' 7"),
        bash("printf '%012345d' 7"),
        bash("seq 20000"),
        bash(SUBMIT),
    ],
    "time-out": [bash("echo before; sleep 1000"), bash("echo after"), bash(SUBMIT)],
    "marker elsewhere": [
        bash(f"echo first; {SUBMIT}"),
        bash(f"{SUBMIT}; false"),
        bash(f"printf '\\n\\n  '; {SUBMIT}; echo rest"),
    ],
    "marker before other calls": [bash("echo one", SUBMIT, "touch never")],
    "three format errors": [
        {"content": "Let me think."},
        {"tool_calls": [("python", {"command": "ls"})]},
        {"tool_calls": [("bash", {"cmd": "ls"})]},
    ],
    "errors that are mended": [
        {"content": "Let me think."},
        {"tool_calls": [("bash", "{broken")]},
        bash("echo mended"),
        {"tool_calls": [("bash", {"command": "echo one"}), ("python", {})]},
        {"content": "Again."},
        bash(SUBMIT),
    ],
    "an argument too many": [
        {"tool_calls": [("bash", {"command": "echo extra", "timeout": 3})]},
        bash(SUBMIT),
    ],
}


def tool(name: str, **arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [(name, arguments)]}


OPENCODE: dict[str, Turns] = {  # WORK stands for the directory that the agent works in
    "files": [
        tool("read", filePath="WORK/calc.py"),
        tool("edit", filePath="WORK/calc.py", oldString="a - b", newString="a + b"),
        tool("edit", filePath="WORK/calc.py", oldString="missing", newString="x"),
        tool("edit", filePath="WORK/calc.py", oldString="a", newString="c"),
        tool("edit", filePath="WORK/calc.py", oldString="same", newString="same"),
        tool("edit", filePath="WORK/gone.py", oldString="a", newString="b"),
        tool("write", filePath="WORK/twice.txt", content="x = 1\ny = 2\nx = 1\n"),
        tool("edit", filePath="WORK/twice.txt", oldString="x = 1", newString="x = 3"),
        tool("edit", filePath="WORK/twice.txt", oldString="x = 1", newString="x = 3", replaceAll=True),
        tool("read", filePath="WORK/twice.txt"),
        tool("edit", filePath="WORK/made.txt", oldString="", newString="made\n"),
        tool("read", filePath="WORK/gone.txt"),
        tool("read", filePath="WORK"),
        tool("read", filePath="WORK/pkg"),
        tool(
            "bash",
            command="seq 3000 > numbers.txt; printf '%03000d' 7 > wide.txt; printf 'a\\000b' > raw.bin; : > empty",
        ),
        tool("read", filePath="WORK/numbers.txt", offset=2990),
        tool("read", filePath="WORK/numbers.txt", offset=5, limit=2),
        tool("read", filePath="WORK/numbers.txt", offset=5000),
        tool("read", filePath="WORK/numbers.txt"),
        tool("read", filePath="WORK/wide.txt"),
        tool("read", filePath="WORK/raw.bin"),
        tool("read", filePath="WORK/empty"),
        tool("bash", command="cat calc.py"),
    ],
    "edits": [
        tool("edit", filePath="WORK/pkg/deep.txt", oldString="deep", newString="unread"),
        tool("write", filePath="WORK/calc.py", content="unread\n"),
        tool("write", filePath="WORK/new/a.py", content="if a:\n    b = 1\n    c = 2\n"),
        tool("edit", filePath="WORK/new/a.py", oldString="if a:\n  b = 1\n  c = 2", newString="if x:\n    b = 1"),
        tool("edit", filePath="WORK/new/a.py", oldString="b  =  1", newString="b = 2"),
        tool("edit", filePath="WORK/new/a.py", oldString="\n  b = 2\n", newString="    b = 3"),
        tool("read", filePath="new/a.py"),
        tool("edit", filePath="WORK/new/a.py", oldString="", newString="whole"),
        tool("bash", command="cat new/a.py pkg/deep.txt calc.py"),
    ],
    "search": [
        tool("glob", pattern="**/*.py"),
        tool("glob", pattern="*.nothing"),
        tool("glob", pattern="*.txt", path="WORK/pkg"),
        tool("grep", pattern="return"),
        tool("grep", pattern="nothing at all"),
        tool("grep", pattern="d.ep", include="*.txt"),
        tool("grep", pattern="return", path="WORK/pkg"),
        tool("todowrite", todos=[{"content": "fix", "status": "in_progress", "priority": "high"}]),
        {"tool_calls": [("bash", {"command": "echo one"}), ("bash", {"command": "echo two"})]},
    ],
    "matches": [
        tool("bash", command="printf 'one a\\ntwo b\\none c\\n' > pkg/more.txt; cp pkg/more.txt pkg/other.txt"),
        tool("grep", pattern="one", path="WORK/pkg"),
        tool("glob", pattern="**/*.txt"),
    ],
    "commands": [
        tool("bash", command="true"),
        tool("bash", command="echo out; echo err >&2; exit 3"),
        tool("bash", command="cd pkg; x=1"),
        tool("bash", command="ls; echo [$x]"),
        tool("bash", command="ls", workdir="WORK/pkg"),
        tool("bash", command="printf 'no newline'"),
        tool("bash", command="printf '\\377\\376 caf\\303\\251'"),
        tool("bash", command="echo before; sleep 20", timeout=1000),
        tool("bash", command="seq 3000"),
        tool("bash", command="printf '%060000d' 7"),
    ],
    "mistakes": [
        tool("python", command="ls"),
        {"tool_calls": [("bash", "{broken")]},
        tool("bash", cmd="ls"),
        tool("read", filePath=3),
        {"tool_calls": [("bash", {"command": "echo fine"}), ("python", {})]},
    ],
    "circle": [tool("bash", command="echo same")] * 5,
}


# ---- what a recording keeps ----------------------------------------------------------------------------------------

_WORDS = (
    re.compile(r"(?<=<warning>).*?(?=</warning>)", re.DOTALL),
    re.compile(r"(?<=<exception>).*?(?=</exception>)", re.DOTALL),
    re.compile(r'(?<="exception_info": ").*?(?=")'),
    re.compile(r"(?<=<shell_metadata>).*?(?=</shell_metadata>)", re.DOTALL),
    re.compile(r"(?<=Full output saved to: )\S+"),
)


ERRORS = {
    "INVALID": re.compile(r"The arguments provided to the tool are invalid|The \w+ tool was called with invalid"),
    "NOT FOUND": re.compile("Could not find oldString"),
    "AMBIGUOUS": re.compile("Found multiple matches for oldString"),
    "EMPTY": re.compile("oldString cannot be empty"),
}


def kept(content: str) -> str:
    """An observation without the sentences that every agent words in its own way; a long one as its digest."""
    for name, start in ERRORS.items():
        if start.match(content):
            return name
    for words in _WORDS:
        content = words.sub("WORDS", content)
    if len(content) <= MAX_CHARS:
        return content
    return f"{len(content)} characters, SHA-256 {hashlib.sha256(content.encode()).hexdigest()}"


def without_descriptions(schema: Any) -> Any:
    """A tool or its schema without what is worded."""
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    worded = {key for key, value in schema.items() if key == "description" and isinstance(value, str)}
    return {key: without_descriptions(value) for key, value in schema.items() if key not in worded}
