"""A plain record to a conversation: roles, parts, thoughts, calls and their results, weights, tools, labels.

In: a record whose messages have roughly OpenAI's shape, under any of its published variants: ``role`` and ``content``
or ``from`` and ``value``; contents as text or as parts (OpenAI, Anthropic, LLaMA-Factory, Inspect); calls as
``tool_calls``, ``function_call``, parts, or Hermes' text. Out: a ``Conversation``. What Command-4 has no place for is
moved, never dropped: text beside tool calls goes behind the reasoning.

Thoughts are thoughts: ``<think>``, ``thinking``, ``thinking_blocks`` and ``reasoning_details`` never become part of an
answer. Results find their calls by id, else by order where their counts agree, else they are one result of all. A
message whose weight is zero is shown and not learned. Whatever is left over is counted in ``Notes``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from north_lightning.data.formats.base import MESSAGE_KEYS, Format, Notes, below, decoded, listed, text_of_parts, words
from north_lightning.data.formats.columns import COLUMNS, labels_of, verdict_of
from north_lightning.data.formats.pairing import Pairing, Said
from north_lightning.data.formats.text_calls import RESPONSE, read_calls, read_responses, tools_in_text
from north_lightning.data.formats.tools import infer_tools, read_tools
from north_lightning.data.formats.weights import WEIGHT_KEYS, is_trained, is_zero
from north_lightning.errors import DataError
from north_lightning.types import Conversation, Role
from north_lightning.untrusted import load_json

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("assistant", "gpt", "ai", "model", "chatbot", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "environment"), "tool"),
}
_CONTENT = ("content", "value", "text", "system_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_blocks", "reasoning_details")
_IDS = ("tool_call_id", "tool_call_ids", "call_id", "tool_use_id")
_METADATA = words(
    "agent message_type action tags cache_control name timestamp id model metadata extra annotations index usage "
    "finish_reason stop_reason provider_specific_fields step created_at type object cutoff_date function error "
    "internal is_input source_call_id logprobs token_ids"
)
_MESSAGE = frozenset(
    ["role", "from", *_CONTENT, *_REASONING, "thought", *_IDS, *_METADATA, "tool_calls", "function_call", *WEIGHT_KEYS]
)
_CALL = words("id type function name arguments input args parameters index call_id tool_call_id parse_error view extra")
_THOUGHT_PARTS = words(
    "thinking reasoning redacted_thinking reasoning.text reasoning.summary reasoning.encrypted reasoning_text "
    "summary_text"
)
_CALL_PARTS = ("tool_call", "tool_use", "function_call")


def conversation_of(record: Mapping[str, Any], settings: Format, notes: Notes) -> Conversation:
    """The conversation in a plain record; ``DataError`` names the JSON path, what was expected and what came."""
    record = {name: value for name, value in record.items() if name not in settings.ignore}
    key, raw = listed(record, *MESSAGE_KEYS)
    if not raw:
        given = next((name for name in MESSAGE_KEYS if name in record), "messages")
        found = decoded(record.get(given), f"$.{given}")
        raise DataError(f"$.{given}: expected a list of messages, got {found!r}"[:200])
    pairing = Pairing(notes)
    opening = text_of_parts(record.get("system") or record.get("system_prompt"))
    first = raw[0] if isinstance(raw[0], dict) else {}
    if opening and "system" not in (first.get("role"), first.get("from")):
        pairing.add(Said("system", opening))
    weightless = is_zero(record)
    for index, message in enumerate(raw):
        for said in _read(message, f"$.{key}[{index}]", notes):
            said.trained = said.trained and not weightless
            pairing.add(said)
    messages = pairing.finish()
    tools = read_tools(record, notes) or settings.tools_of_file
    if not tools and any(message.tool_calls for message in messages):
        tools = tools_in_text(messages) or infer_tools(messages, notes)
    notes.skip("$.", record, COLUMNS | {key, "system", "system_prompt"})
    return Conversation(
        messages, tools, verified=verdict_of(record, notes), **labels_of(record, settings.source, settings.harness)
    )


def _read(message: Any, where: str, notes: Notes) -> Iterator[Said]:
    """What one message says: itself, and the results that came in parts of it."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected an object, got {message!r}"[:200])
    if "role" not in message and isinstance(message.get("output"), list):  # a response of OpenAI's Responses API
        message = {"role": "assistant", "content": message["output"]}
    elif message.get("type") == "function_call_output":
        message = {"role": "tool", "content": message.get("output"), "tool_call_id": message.get("call_id")}
    name = message.get("role", message.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}.role: expected one of {', '.join(_ROLES)}, got {name!r}"[:300])
    notes.skip("$.messages[].", message, _MESSAGE)
    said = Said(role, trained=is_trained(message, role, notes))
    content = next((message[key] for key in _CONTENT if message.get(key) is not None), None)
    if name in ("function_call", "tool_call") and isinstance(content, str):  # ShareGPT's calls
        said.calls += _calls(decoded(content, f"{where}.value"), where, said, notes)
        content = None
    results: list[Said] = []
    for kind, value in _parts(content, f"{where}.content", said, notes):
        if kind == "result":
            results.append(value)
        elif kind == "call":
            said.calls += _calls(value, where, said, notes)
        elif kind == "thought":
            said.thoughts.append(value)
        else:
            said.content += value
    yield from results
    if role == "assistant":
        said.calls += _calls(
            decoded(message.get("tool_calls"), f"{where}.tool_calls"), f"{where}.tool_calls", said, notes
        )
        said.calls += _calls(message.get("function_call"), f"{where}.function_call", said, notes)
        for key in _REASONING:
            said.think_once(list(_thoughts(message.get(key))))
        if (thought := message.get("thought")) and str(thought).strip() not in said.content:  # SWE-agent says it twice
            said.think_once(list(_thoughts(thought)))
        if not said.calls and "<tool_call>" in said.content:
            read_calls(said, notes)
        said.tidy(notes)
        yield said
    elif role != "tool" and RESPONSE not in said.content:
        if said.content or not results:
            yield said
    else:
        said.answers = _answered(message)
        yield from read_responses(said)


def _parts(content: Any, where: str, said: Said, notes: Notes) -> Iterator[tuple[str, Any]]:
    """Kind and value of every part of a content: text, thought, call or result."""
    if content is None or isinstance(content, str):
        yield "text", content or ""
        return
    parts = content if isinstance(content, list) else [content]
    if said.role == "tool" and not all(isinstance(part, str) or _kind(part) for part in parts):
        yield "text", json.dumps(content, ensure_ascii=False)  # what a tool returned, as it is
        return
    for part in parts:
        kind = "text" if isinstance(part, str) else _kind(part)
        if kind in ("text", "input_text", "output_text"):
            yield from _parts(part if isinstance(part, str) else _value(part), where, said, notes)
        elif kind == "message":
            yield from _parts(part.get("content"), where, said, notes)
        elif kind in _THOUGHT_PARTS:
            yield from (("thought", text) for text in _thoughts(part))
        elif kind in _CALL_PARTS:
            yield "call", decoded(part["value"], where) if "value" in part else part
        elif kind == "tool_result":
            result = Said("tool", answers=part.get("tool_use_id"))
            result.content = "".join(str(text) for _, text in _parts(part.get("content"), where, result, notes))
            yield "result", result
        elif kind:
            notes.not_understood[f"$.messages[].content[].{kind}"] += 1
        else:
            raise DataError(f"{where}: expected a string or a list of text parts, got {content!r}"[:300])


def _kind(part: Any) -> str:
    """The type of a part; empty for what is none."""
    if not isinstance(part, Mapping):
        return ""
    kind = part.get("type") or ("text" if isinstance(part.get("text"), str) else "")
    is_text = kind in ("text", "input_text", "output_text")
    return kind if isinstance(kind, str) and (not is_text or isinstance(_value(part), str)) else ""


def _value(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), "")


def _thoughts(value: Any) -> Iterator[str]:
    """The texts of a thought, in any of its published shapes; what is encrypted has none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _thoughts(one)
    elif isinstance(value, Mapping) and not (value.get("redacted") or value.get("type") == "redacted_thinking"):
        keys = ("thinking", "reasoning", "text", "value", "summary", "content")
        yield from _thoughts(next((value[key] for key in keys if value.get(key)), None))
    elif isinstance(value, Mapping):
        yield from _thoughts(value.get("summary"))


def _calls(value: Any, where: str, said: Said, notes: Notes) -> list[tuple[str | None, str, dict[str, Any]]]:
    """Id, name and arguments of the calls in a list, or in one of them."""
    calls = []
    for number, call in enumerate(value if isinstance(value, list) else [value] if value else []):
        place = f"{where}[{number}]"
        call = decoded(call, place)
        if not isinstance(call, Mapping):
            raise DataError(f"{place}: expected an object, got {call!r}"[:200])
        notes.skip("$.messages[].tool_calls[].", call, _CALL)
        function = below(call, "function") or call
        name = function.get("name") or call.get("function")
        if not isinstance(name, str) or not name:
            raise DataError(f"{place}.function.name: expected a string, got {name!r}"[:200])
        id = next((call[key] for key in ("call_id", "tool_call_id", "id") if isinstance(call.get(key), str)), None)
        keys = ("arguments", "input", "args", "parameters")
        arguments: Any = next((function[key] for key in keys if function.get(key) is not None), {})
        if isinstance(arguments, str):
            try:
                arguments = load_json(arguments or "{}")
            except DataError as error:
                if not isinstance(error.__cause__, json.JSONDecodeError):
                    raise DataError(f"{place}.function.arguments: {error}") from error
                arguments = None
        if isinstance(arguments, Mapping) and not call.get("parse_error"):
            calls.append((id, name, dict(arguments)))
        else:  # the model wrote no JSON: what it was told then is worth learning from, the call is not
            said.garble(json.dumps(call, ensure_ascii=False), notes)
    return calls


def _answered(message: Mapping[str, Any]) -> str | None:
    """The id of the call that a result names, if it does."""
    value = next((message[key] for key in (*_IDS, "source_call_id") if message.get(key)), None)
    if isinstance(value, list):  # SWE-agent's
        value = value[0] if len(value) == 1 else None
    return value if isinstance(value, str) else None
