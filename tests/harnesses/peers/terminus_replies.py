"""Replies for the Terminus 2 parser: whole, broken in every way it knows, and mended. Data only."""

import json

GOOD = {"analysis": "a", "plan": "p", "commands": [{"keystrokes": "ls\n", "duration": 0.1}]}


def with_commands(*commands: object, **more: object) -> str:
    return json.dumps({"analysis": "a", "plan": "p", "commands": list(commands), **more})


REPLIES = {
    "good": json.dumps(GOOD),
    "complete": with_commands(task_complete=True),
    "complete as text": with_commands(task_complete="Yes"),
    "not complete as text": with_commands(task_complete="no"),
    "complete as number": with_commands(task_complete=1),
    "complete with a broken command": with_commands({"keys": "ls"}, task_complete=True),
    "text before": "Sure! " + json.dumps(GOOD),
    "text after": json.dumps(GOOD) + " That is all.",
    "fenced": f"```json\n{json.dumps(GOOD)}\n```",
    "brace missing": json.dumps(GOOD)[:-1],
    "bracket missing": json.dumps(GOOD)[:-2] + "}",
    "two objects": json.dumps(GOOD) + json.dumps(GOOD),
    "braces in a string": with_commands({"keystrokes": "echo {a} }\n", "duration": 1}),
    "quote before": 'I say "go: ' + json.dumps(GOOD),
    "object in broken object": '{"analysis": x, "plan": ' + '{"analysis": "a", "plan": "p", "commands": []}' + "}",
    "broken, then good": "{oops} " + json.dumps(GOOD),
    "empty": "",
    "words": "I will list the files.",
    "a list": "[1, 2]",
    "no analysis": json.dumps({"plan": "p", "commands": []}),
    "nothing but commands": json.dumps({"commands": []}),
    "analysis is a number": json.dumps({**GOOD, "analysis": 3}),
    "commands is an object": json.dumps({**GOOD, "commands": {}}),
    "another order": json.dumps({"commands": [], "plan": "p", "analysis": "a"}),
    "command is text": with_commands("ls\n"),
    "no keystrokes": with_commands({"duration": 1}),
    "keystrokes are a number": with_commands({"keystrokes": 3}),
    "no duration": with_commands({"keystrokes": "ls\n"}),
    "duration is text": with_commands({"keystrokes": "ls\n", "duration": "1"}),
    "duration is long": with_commands({"keystrokes": "ls\n", "duration": 600}),
    "unknown field": with_commands({"keystrokes": "ls\n", "duration": 1, "is_blocking": True}),
    "no newline before the next": with_commands(
        {"keystrokes": "ls", "duration": 1}, {"keystrokes": "\n", "duration": 1}
    ),
    "empty keystrokes wait": with_commands({"keystrokes": "", "duration": 5}, {"keystrokes": "ls\n", "duration": 1}),
    "escapes": '{"analysis": "\\u00e9", "plan": "p", "commands": [{"keystrokes": "echo \\"x\\"\\n", "duration": 1}]}',
    "bare control character": '{"analysis": "a\n", "plan": "p", "commands": []}',
}
