"""What the chat tests share: conversations about random names, on which their tokenizer is trained."""

import random

from hypothesis import HealthCheck, settings

from north_lightning.types import Message, ToolCall, ToolSpec

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
"""For properties over whole conversations, which are big, on machines that may be busy."""

TERMINAL = ToolSpec(
    "terminal",
    "Type keystrokes into a terminal and read the screen. End a command with \\n.",
    {
        "type": "object",
        "properties": {"keystrokes": {"type": "string"}, "wait_s": {"type": "number", "maximum": 60}},
        "required": ["keystrokes"],
        "additionalProperties": False,
    },
)
SUBMIT = ToolSpec("submit", "Finish the task.", {"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = (TERMINAL, SUBMIT)


def random_name(rng: random.Random) -> str:
    syllables = [rng.choice("bdfgkmptvz") + rng.choice("aeiou") + rng.choice("lnrsx") for _ in range(2)]
    return "".join(syllables)


def conversation(rng: random.Random) -> list[Message]:
    a, b, c, d = (random_name(rng) for _ in range(4))
    instruction, commands = rng.choice(
        [
            (f"Create the file {a}/{b}.txt that contains the word {c}.", [f"mkdir -p {a}", f"echo {c} > {a}/{b}.txt"]),
            (f"Replace every {a} in {b}.cfg by {c}.", [f"sed -i 's/{a}/{c}/g' {b}.cfg", f"cat {b}.cfg"]),
            (f"Rename {a}.log to {b}.log for {c} and add the line '{d}'.", [f"mv {a}.log {b}.log", f"ls\n{d}\n"]),
            (f"Sum the {rng.randrange(99)} numbers of {a}.csv into {b}.txt", [f"awk '{{s+=$1}}' {a}.csv > {b}.txt"]),
        ]
    )
    messages = [Message("user", rng.choice(["Use the terminal. ", "Do this task in the shell. "]) + instruction)]
    for index, command in enumerate(commands):
        call = ToolCall(str(index), "terminal", {"keystrokes": command + "\n"})
        messages.append(Message("assistant", tool_calls=(call,)))
        messages.append(Message("tool", f"$ {command}\n{c} {d}\n$ ", tool_call_id=str(index)))
    messages.append(Message("assistant", tool_calls=(ToolCall(str(len(commands)), "submit", {}),)))
    return messages
