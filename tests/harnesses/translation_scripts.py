"""What agents might do in each harness, in its own words: turns of (reasoning, calls) or (reasoning, text).

They look at files whole and in part, edit, make files with quotes, tabs and odd characters, fail, change directory, and
hand in. The tree they act on is ``FILES``.
"""

from __future__ import annotations

import json
from typing import Any

FILES = {"calc.py": "def add(a, b):\n    return a - b\n", "pkg/deep.txt": "deep\n\tcafé 漢\n"}
NEW_TEXT = "x = 'it''s'\n\tif \"a\" != '$HOME':  # `pwd` \\n\n"

Turn = tuple[str, str | list[tuple[str, dict[str, Any]]]]


def bash(command: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "bash", {"command": command, **more}


def edit(command: str, path: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "str_replace_editor", {"command": command, "path": path, **more}


def keys(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [("terminal", {"keystrokes": text})]


def reply(*commands: str, complete: bool = False) -> str:
    typed = [{"keystrokes": f"{command}\n", "duration": 10.0} for command in commands]
    return json.dumps({"analysis": "So far so good.", "plan": "Go on.", "commands": typed, "task_complete": complete})


SCRIPTS: dict[str, list[Turn]] = {
    "swe_agent": [
        ("Where am I?", [bash("pwd; cat calc.py")]),
        ("I look with str_replace_editor.", [edit("view", "/work/calc.py")]),
        ("", [edit("view", "pkg/deep.txt", view_range=[2, 2])]),
        ("", [edit("view", "/work/calc.py", view_range=[2, -1])]),
        ("", [edit("view", "/work/gone.py")]),
        ("This is not there.", [edit("str_replace", "/work/calc.py", old_str="a * b", new_str="x")]),
        (
            "",
            [
                edit(
                    "str_replace",
                    "/work/calc.py",
                    old_str="\n    return a - b",
                    new_str="\n    return a + b  # 'fixed'",
                )
            ],
        ),
        ("", [edit("create", "/work/pkg/new.py", file_text=NEW_TEXT)]),
        ("", [edit("create", "/work/no_newline", file_text="end")]),
        ("", [bash("cd pkg")]),
        ("Am I there?", [bash("cat new.py; pwd")]),
        ("", [bash("no_such_command; false")]),
        ("", [bash("python3 -c 'import calc' 2>&1 | tail -n 1")]),
        ("Done, I think.", [("submit", {})]),
        ("Yes.", [("submit", {})]),
    ],
    "mini_swe_agent": [
        ("Two looks.", [bash("cat calc.py"), bash("cd pkg && x=1; pwd; echo $x")]),
        ("Nothing is left of that.", [bash("pwd; echo [$x]")]),
        ("", [bash("cat > pkg/new.py <<'EOF'\n" + NEW_TEXT.replace("\t", "    ") + "EOF")]),
        ("", [bash("export y=2 # no comment"), bash("echo [$y]")]),
        ("", [bash("sed -i 's/a - b/a + b/' calc.py && tail -n 1 calc.py"), bash("false")]),
        ("", [bash("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")]),
    ],
    "opencode": [
        ("A look.", [("read", {"filePath": "/work/calc.py"}), ("read", {"filePath": "pkg/deep.txt", "offset": 2})]),
        ("", [("read", {"filePath": "/work/pkg/deep.txt", "offset": 1, "limit": 1})]),
        ("", [("edit", {"filePath": "/work/calc.py", "oldString": "a - b", "newString": "a + b"})]),
        ("", [("edit", {"filePath": "/work/calc.py", "oldString": "missing", "newString": "b"})]),
        ("", [("write", {"filePath": "/work/pkg/new.py", "content": NEW_TEXT})]),
        ("", [("edit", {"filePath": "/work/made.txt", "oldString": "", "newString": "made"})]),
        ("", [bash("pwd; cat deep.txt", workdir="/work/pkg"), bash("cd pkg; x=1")]),
        ("", [bash("pwd; echo [$x]", timeout=5000)]),
        ("It is fixed.", "add adds."),
    ],
    "react_terminal": [
        ("I look.", keys("cat calc.py")),
        ("", keys("cd pkg; ls")),
        ("", keys("x=1; echo [$x]; pwd; cat deep.txt")),
        ("", keys("for i in 1 2\ndo echo $i > file$i\ndone")),
        ("", keys("sed -i 's/a - b/a + b/' ../calc.py && cat ../calc.py")),
        ("", "Done."),
    ],
    "terminus2": [
        ("I look.", reply("cat calc.py", "cd pkg")),
        ("", reply("pwd; cat deep.txt")),
        ("", reply("sed -i 's/a - b/a + b/' ../calc.py", "cat ../calc.py", complete=True)),
        ("", reply(complete=True)),
    ],
}
