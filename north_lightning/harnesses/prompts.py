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

MINI_SYSTEM = (
    "You work on a computer through bash commands.",
    "You are an engineer with a shell. Commands are your only way to look at files and to change them.",
    "Use the bash tool to carry out the request.",
)

MINI_USER = (
    "{task}\n\nWork in the current directory. Every turn makes at least one bash call; each call runs in a new shell, so "
    "directory and variables do not last. When you are done, run `echo {marker}` alone in a call: it hands in your work "
    "and ends the task.",
    "Your task:\n\n{task}\n\nRules: one or more bash calls in every turn. A call begins in the starting directory with a "
    "fresh environment; use `cd DIR && ...` where you need it. Hand in with `echo {marker}` and nothing else in that "
    "call; nothing can be done after it.",
    "Resolve this:\n\n{task}\n\nEach turn runs the bash calls you make, one after the other, each in a shell of its own. "
    "The call `echo {marker}`, not combined with others, submits and ends the work.",
)

MINI_FORMAT_ERROR = (
    "The call was not carried out:\n\n<error>\n{error}\n</error>\n\nEvery turn needs a call of the bash tool with the "
    'arguments {{"command": "..."}}. To hand in, run `echo {marker}` and nothing else.'
)

MINI_TOO_LONG = (
    "The output was too long to be shown whole. Ask for less: head, tail, sed -n, a narrower search, or a file."
)

TERMINUS_USER = (
    """You solve tasks in a Linux terminal by sending batches of keystrokes.

Answer with one JSON object and nothing else:

{{
  "analysis": "what the terminal shows, what is done, what is left",
  "plan": "what you do next, and why",
  "commands": [
    {{"keystrokes": "ls -la\\n", "duration": 0.1}}
  ],
  "task_complete": false
}}

"analysis", "plan" and "commands" are required; "task_complete" is false when left out. "keystrokes" are typed exactly as \
they stand: end a command with \\n, or it is not run. A key alone is written as tmux writes it, such as C-c or C-d. \
"duration" is how many seconds to wait before the next command (1.0 when left out, at most 60): 0.1 is enough for quick \
commands, and an empty "keystrokes" waits longer for one that is still running. An empty list of commands just looks.

Task:
{task}

The terminal now:
{terminal}""",
    """A terminal is yours. In every turn, reply with a JSON object that holds "analysis" (what you see), "plan" (what \
comes next), "commands" (a list of {{"keystrokes": TEXT, "duration": SECONDS}}) and, once the work is finished, \
"task_complete": true. Keys go to the terminal as written: a newline (\\n) at the end runs the command, C-c or C-d alone \
is that key. Durations of 0.1 suit quick commands, longer ones slow commands, never more than 60; to go on waiting, send \
empty keystrokes. No text outside of the JSON.

What to do:
{task}

Screen:
{terminal}""",
    """Do this in the terminal below:

{task}

Write each reply as JSON: {{"analysis": "...", "plan": "...", "commands": [{{"keystrokes": "pwd\\n", "duration": 0.1}}], \
"task_complete": false}}. The first three fields are needed. Commands are typed one after the other, each followed by its \
duration in seconds (default 1.0, limit 60); without \\n at the end nothing is run; special keys stand alone (C-c). Set \
task_complete to true when the task is done.

{terminal}""",
)

TERMINUS_PARSE_ERROR = "The last reply could not be read:\n{feedback}\n\nMend this and send a proper JSON response."

TERMINUS_WARNINGS = "The last reply was read with warnings:\n{feedback}\n\n{terminal}"

TERMINUS_CONFIRM = (
    "Current terminal state:\n{terminal}\n\nIs the task really done? It is graded as it stands, and nothing can be "
    'changed afterwards. To confirm, send "task_complete": true once more.'
)

OPENCODE_SYSTEM = (
    "You are a coding agent in the project directory {directory}. Use the tools to carry out the request, then answer in a "
    "few words. Paths of files are absolute.",
    "Work on the software project in {directory} with your tools: look before you change, check what you did, and end with "
    "a short answer and no call.",
    "Do what the user asks in {directory}. Several calls may go in one turn. A turn without a call ends your work.",
)


def pick(wordings: Sequence[str], variation: int) -> str:
    """The wording with this number, counted round."""
    return wordings[variation % len(wordings)]
