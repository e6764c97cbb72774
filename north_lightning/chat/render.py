"""A conversation as segments: control tokens and the texts between them, each marked trained or not.

In: messages and tools. Out: segments whose concatenation is, byte for byte, what ``cohere_melody`` renders with
``cmd4-v2`` (checked at every call). It knows nothing of ids (``format``) and does not parse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from cohere_melody import render_cmd4

from north_lightning.chat import controls
from north_lightning.errors import DataError
from north_lightning.types import Message, ToolCall, ToolResult, ToolSpec

_MAX_DEPTH = 100  # of nested JSON; melody refuses 128


@dataclass(frozen=True, slots=True)
class Segment:
    """One control token (``is_control``; ``text`` is its name) or one text that is encoded alone."""

    text: str
    is_control: bool
    trained: bool


def render_conversation(
    messages: Sequence[Message], tools: Sequence[ToolSpec], reasoning: bool, platform_instruction: str = ""
) -> list[Segment]:
    """Segments of a whole conversation, without a generation prompt.

    With ``reasoning`` off no message may carry reasoning, and the empty thinking block belongs to the prompt.
    ``DataError`` says what in the conversation cannot be rendered.
    """
    messages = _number_calls(messages)
    segments = _platform_turn(tools, platform_instruction)
    index = 0
    while index < len(messages):
        message = messages[index]
        if message.role == "tool":
            results = []
            while index < len(messages) and messages[index].role == "tool":
                results.append(ToolResult(messages[index].tool_call_id or "", messages[index].content))
                index += 1
            segments += tool_result_turn(results)
            continue
        segments += assistant_turn(message, reasoning) if message.role == "assistant" else text_turn(message)
        index += 1
    _check_against_melody(segments, messages, tools, platform_instruction)
    return segments


def conversation_texts(messages: Sequence[Message], tools: Sequence[ToolSpec], reasoning: bool = True) -> list[str]:
    """What stands between the control tokens: the texts a tokenizer is trained on."""
    return [s.text for s in render_conversation(messages, tools, reasoning) if s.text and not s.is_control]


def generation_prompt(reasoning: bool) -> list[Segment]:
    """What opens the turn that the model is to complete."""
    opening = [_control(controls.TURN), _control(controls.CHATBOT), _control(controls.START_THINKING)]
    return opening if reasoning else [*opening, _control(controls.END_THINKING)]


def tool_result_turn(results: Sequence[ToolResult]) -> list[Segment]:
    """The system turn that answers the calls of one action."""
    if not results:
        raise DataError("tool results: expected at least one, got none")
    bodies = [
        f'    {{\n        "tool_call_id": {to_json(result.tool_call_id)},\n        "results": {{\n'
        f'            "0": {{"content": {to_json(result.content)}}}\n        }},\n        "is_error": null\n    }}'
        for result in results
    ]
    return [
        _control(controls.TURN),
        _control(controls.SYSTEM),
        _control(controls.START_TOOL_RESULT),
        Segment("[\n" + ",\n".join(bodies) + "\n]", False, False),
        _control(controls.END_TOOL_RESULT),
        _control(controls.END_TURN),
    ]


def assistant_turn(message: Message, reasoning: bool) -> list[Segment]:
    """An assistant's turn; what the model has to produce itself, eos included, is trained if the message is."""
    if message.tool_calls:
        start, text, end = controls.START_ACTION, render_calls(message.tool_calls), controls.END_ACTION
    else:
        start, text, end = controls.START_TEXT, message.content, controls.END_TEXT
    learned = message.trained
    segments = generation_prompt(reasoning)
    if reasoning:
        segments += [Segment(message.reasoning, False, learned), _control(controls.END_THINKING, learned)]
    elif message.reasoning:
        raise DataError("assistant reasoning: expected none with reasoning off, got some; strip it or turn it on")
    segments += [_control(start, learned), Segment(text, False, learned), _control(end, learned)]
    return [*segments, _control(controls.END_TURN, learned)]


def text_turn(message: Message) -> list[Segment]:
    """A turn of the user or the system."""
    return _framed(controls.USER if message.role == "user" else controls.SYSTEM, message.content)


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The text between the action markers."""
    lines = [
        f'    {{"tool_call_id": {to_json(call.id)}, "tool_name": {to_json(call.name)}, '
        f'"parameters": {to_json(call.arguments)}}}'
        for call in calls
    ]
    return "[\n" + ",\n".join(lines) + "\n]"


def to_json(value: Any, depth: int = 0) -> str:
    """JSON as melody writes it: Python's separators, Unicode unescaped, Rust's way with floats.

    ``DataError`` for what JSON or melody cannot carry: NaN, integers beyond 64 bits, keys that are not strings.
    """
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise DataError(f"JSON integer: expected at most 64 bits, got {value.bit_length()} bits")
        return str(value)
    if isinstance(value, float):
        return _float_to_json(value)
    if depth > _MAX_DEPTH:
        raise DataError(f"JSON: expected at most {_MAX_DEPTH} levels, got more")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"JSON object: expected string keys, got {list(value)}")
        items = [f"{encode_basestring(key)}: {to_json(item, depth + 1)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join([to_json(item, depth + 1) for item in value]) + "]"
    raise DataError(f"JSON: expected a JSON value, got {type(value).__name__}")


def _float_to_json(value: float) -> str:
    if not math.isfinite(value):
        raise DataError(f"JSON number: expected a finite one, got {value}")
    text = repr(value)
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    if int(exponent) == -5:  # Python changes to exponents one digit before Rust does
        sign, digits = ("-", mantissa[1:]) if mantissa.startswith("-") else ("", mantissa)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{mantissa}e{int(exponent)}"


# ---- turns ---------------------------------------------------------------------------------------------------------


def _control(name: str, trained: bool = False) -> Segment:
    return Segment(name, True, trained)


def _platform_turn(tools: Sequence[ToolSpec], platform_instruction: str) -> list[Segment]:
    lines = [
        f'    {{"name": {to_json(tool.name)}, "description": {to_json(tool.description)}, '
        f'"parameters": {to_json(tool.parameters)}, "responses": null}}'
        for tool in tools
    ]
    opening = platform_instruction + "\n\n" if platform_instruction else ""
    text = opening + "# Available Tools\n```json\n[\n" + ",\n".join(lines) + "\n]\n```"
    return [_control(controls.BOS), *_framed(controls.SYSTEM, text)]


def _framed(role: str, text: str) -> list[Segment]:
    return [
        _control(controls.TURN),
        _control(role),
        _control(controls.START_TEXT),
        Segment(text, False, False),
        _control(controls.END_TEXT),
        _control(controls.END_TURN),
    ]


# ---- checks --------------------------------------------------------------------------------------------------------


def _number_calls(messages: Sequence[Message]) -> list[Message]:
    """Messages with call ids counted from "0", as the format wants them; refuses what melody would drop silently."""
    numbers: dict[str, str] = {}
    open_calls: set[str] = set()
    numbered = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                raise DataError(
                    f"{where}: expected the result of one of {sorted(open_calls)}, got {message.tool_call_id}"
                )
            open_calls.remove(message.tool_call_id)
            message = Message("tool", message.content, tool_call_id=numbers[message.tool_call_id])
        else:
            open_calls = set()
        if message.role != "assistant" and (message.tool_calls or message.reasoning):
            raise DataError(
                f"{where}: expected tool calls and reasoning of the assistant only, got role {message.role}"
            )
        if message.role == "assistant":
            _check_assistant(message, where)
            for call in message.tool_calls:
                if call.id in numbers:
                    raise DataError(f"{where}: expected a new tool call id, got {call.id!r} again")
                numbers[call.id] = str(len(numbers))
                open_calls.add(call.id)
            calls = tuple(ToolCall(numbers[call.id], call.name, call.arguments) for call in message.tool_calls)
            message = Message("assistant", message.content, message.reasoning, calls, trained=message.trained)
        numbered.append(message)
    return numbered


def _check_assistant(message: Message, where: str) -> None:
    if message.tool_calls and message.content:
        raise DataError(f"{where}: expected content or tool calls, got both; move the content into the reasoning first")
    for call in message.tool_calls:
        if not isinstance(call.arguments, Mapping):
            kind = type(call.arguments).__name__
            raise DataError(
                f"{where}: expected the arguments of {call.name} as an object, got {kind}; decode them first"
            )


def _check_against_melody(
    segments: Sequence[Segment], messages: Sequence[Message], tools: Sequence[ToolSpec], platform_instruction: str
) -> None:
    ours = "".join(segment.text for segment in segments)
    try:
        ours.encode("utf-8")
        theirs = render_with_melody(messages, tools, True, platform_instruction)
    except ValueError as error:
        raise DataError(f"conversation: expected what Command-4 can carry, got: {error}") from error
    ours += "".join(segment.text for segment in generation_prompt(True))  # melody always opens the next turn
    if ours != theirs:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        raise DataError(
            f"conversation: expected melody to render {ours[place - 20 : place + 20]!r}, got "
            f"{theirs[place - 20 : place + 20]!r}; it rounds numbers of 17 digits"
        )


def render_with_melody(
    messages: Sequence[Message], tools: Sequence[ToolSpec], reasoning: bool, platform_instruction: str = ""
) -> str:
    """The conversation and its generation prompt as ``cohere_melody`` renders them."""
    config: dict[str, Any] = {
        "template_id": "cmd4-v2",
        "use_jinja": True,
        "grounding": "disabled",
        "reasoning_type": "enabled" if reasoning else "disabled",
        "messages": [_melody_message(message) for message in messages],
        "available_tools": [
            {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)} for tool in tools
        ],
    }
    if platform_instruction:
        config["platform_instruction"] = platform_instruction
    return str(render_cmd4(config))


def _melody_message(message: Message) -> dict[str, Any]:
    content = [{"type": "text", "text": message.content}]
    if message.tool_calls:
        content = []
    if message.reasoning:
        content.insert(0, {"type": "thinking", "thinking": message.reasoning})
    role = "chatbot" if message.role == "assistant" else message.role
    rendered: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"id": call.id, "name": call.name, "parameters": json.dumps(_plain(call.arguments), ensure_ascii=False)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
