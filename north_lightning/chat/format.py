"""Conversations to token ids and sampled ids to actions: the only road between the two, for SFT, RL and evaluation.

Every text between control tokens is encoded alone, by ``encode_text``, which cannot produce a control token. So the ids
of a whole conversation are the ids of its prompt, sampled turns and tool results put end to end, and nothing is ever
tokenised twice. It knows neither models nor harnesses. Free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NoReturn

from cohere_melody import PyFilter, PyFilterOptions
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match

from north_lightning.chat import controls
from north_lightning.chat.render import (
    Segment,
    assistant_turn,
    generation_prompt,
    render_calls,
    render_conversation,
    text_turn,
    to_json,
    tool_result_turn,
)
from north_lightning.chat.tokenizer import NorthTokenizer
from north_lightning.errors import DataError, InvalidActionError
from north_lightning.types import AssistantAction, Message, TokenizedSample, ToolCall, ToolResult, ToolSpec

ActionErrorKind = Literal["parse", "unknown_tool", "schema", "truncated"]
_CALL_KEYS = ["tool_call_id", "tool_name", "parameters"]


class ActionFormatError(InvalidActionError):
    """A sampled turn that is no valid action; ``kind`` says in which way."""

    def __init__(self, kind: ActionErrorKind, message: str, num_calls: int = 0) -> None:
        super().__init__(f"{kind}: {message}", num_calls)
        self.kind: ActionErrorKind = kind


class ChatFormat:
    """The Command-4 format over one tokenizer."""

    def __init__(self, tokenizer: NorthTokenizer, reasoning: bool, platform_instruction: str = "") -> None:
        """Choose tokenizer and style.

        Args:
            tokenizer: The model's tokenizer.
            reasoning: Whether turns begin with thinking. Off, the prompt holds an empty thinking block.
            platform_instruction: Text before the tool list in the first turn.
        """
        self.tokenizer = tokenizer
        self.reasoning = reasoning
        self.platform_instruction = platform_instruction
        self.stop_token_ids = (tokenizer.eos_id,)
        self._validators: dict[str, Draft202012Validator] = {}

    def __reduce__(self) -> tuple[type[ChatFormat], tuple[NorthTokenizer, bool, str]]:
        return ChatFormat, (self.tokenizer, self.reasoning, self.platform_instruction)

    # ---- encoding --------------------------------------------------------------------------------------------------

    def segments(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Segment]:
        """The conversation as melody renders it, in pieces; ``DataError`` says what cannot be rendered."""
        return render_conversation(messages, tools, self.reasoning, self.platform_instruction)

    def encode_conversation(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], source: str = ""
    ) -> TokenizedSample:
        """A whole conversation for SFT; the mask covers exactly what the assistant has to produce."""
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        segments = self.segments(messages, tools)
        for segment in segments:
            if segment.trained and not segment.is_control:
                self._refuse_markers(segment.text)
        encoded = iter(self.tokenizer.encode_texts([s.text for s in segments if not s.is_control]))
        for segment in segments:
            ids = self.tokenizer.control_ids(segment.text) if segment.is_control else next(encoded)
            token_ids += ids
            loss_mask += [segment.trained] * len(ids)
        return TokenizedSample(token_ids, loss_mask, source)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """Ids up to where the model continues."""
        return self._encode([*self.segments(messages, tools), *generation_prompt(self.reasoning)])

    def encode_tool_results(self, results: Sequence[ToolResult], text: str = "") -> list[int]:
        """What follows a sampled turn with tool calls: their results, what the user says to them if anything, then the
        opening of the next turn."""
        said = text_turn(Message("user", text)) if text else []
        return self._encode([*tool_result_turn(results), *said, *generation_prompt(self.reasoning)])

    def encode_user_message(self, text: str) -> list[int]:
        """What follows a sampled turn that is answered by the user: the text, then the opening of the next turn."""
        return self._encode([*text_turn(Message("user", text)), *generation_prompt(self.reasoning)])

    def encode_action(self, action: AssistantAction) -> list[int]:
        """The ids a model would sample for ``action``, eos included: what a scripted policy plays."""
        message = Message("assistant", action.content, action.reasoning, action.tool_calls)
        return self._encode(assistant_turn(message, self.reasoning)[len(generation_prompt(self.reasoning)) :])

    def _encode(self, segments: Sequence[Segment]) -> list[int]:
        return [token_id for segment in segments for token_id in self._encode_segment(segment)]

    def _encode_segment(self, segment: Segment) -> Sequence[int]:
        if segment.is_control:
            return self.tokenizer.control_ids(segment.text)
        return self.tokenizer.encode_text(segment.text)

    def _refuse_markers(self, text: str) -> None:
        for name in controls.CONTROL_TOKENS if "<" in text else ():
            if name in text:
                raise DataError(f"assistant text: expected no control markers, got {name}; no server could parse it")

    # ---- parsing ---------------------------------------------------------------------------------------------------

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec], next_call_id: int) -> AssistantAction:
        """The action that one sampled turn (everything after the prompt, eos included) stands for.

        Strict: what this accepts, melody parses to the same calls and renders to the same text again. Anything else
        raises ``ActionFormatError`` with ``kind``: ``truncated`` (no eos), ``parse``, ``unknown_tool``, ``schema``.
        ``next_call_id`` is the number of calls made before in the conversation.
        """
        if not token_ids or token_ids[-1] != self.tokenizer.eos_id:
            raise ActionFormatError("truncated", "expected the turn to end with the end-of-turn token")
        reasoning, marker, text = self._split(token_ids)
        if marker == controls.START_TEXT:
            return AssistantAction(reasoning=reasoning, content=text)
        calls = parse_calls(text, next_call_id)
        for call in calls:
            self._validate(call, tools, len(calls))
        return AssistantAction(reasoning=reasoning, tool_calls=calls)

    def _split(self, token_ids: Sequence[int]) -> tuple[str, str, str]:
        """(reasoning, opening marker, text between the markers) of a turn in the one legal order."""
        body, reasoning = list(token_ids[:-1]), ""
        if self.reasoning:
            end = self._find(body, controls.END_THINKING, 0)
            if end is None:
                _reject("expected the thinking to end")
            reasoning = self._text(body[:end])
            body = body[end + len(self.tokenizer.control_ids(controls.END_THINKING)) :]
        for start, stop in ((controls.START_ACTION, controls.END_ACTION), (controls.START_TEXT, controls.END_TEXT)):
            opening, closing = list(self.tokenizer.control_ids(start)), list(self.tokenizer.control_ids(stop))
            if body[: len(opening)] == opening:
                if body[-len(closing) :] != closing or len(body) < len(opening) + len(closing):
                    _reject(f"expected {stop} before the end of the turn")
                return reasoning, start, self._text(body[len(opening) : len(body) - len(closing)])
        _reject("expected an action or a text after the thinking")

    def _find(self, ids: Sequence[int], name: str, start: int) -> int | None:
        marker = self.tokenizer.control_id(name)
        return ids.index(marker, start) if marker in ids[start:] else None

    def _text(self, token_ids: Sequence[int]) -> str:
        for token_id in token_ids:
            if token_id >= self.tokenizer.vocab_size or self.tokenizer.is_control(token_id):
                _reject(f"expected text, got the control token {token_id}")
        try:
            text = self.tokenizer.decode_bytes(token_ids).decode("utf-8")
        except UnicodeDecodeError:
            _reject("expected UTF-8 text")
        if "<" in text and any(name in text for name in controls.CONTROL_TOKENS):
            _reject("expected text, got a spelled-out control marker")
        return text

    def _validate(self, call: ToolCall, tools: Sequence[ToolSpec], num_calls: int) -> None:
        tool = next((tool for tool in tools if tool.name == call.name), None)
        if tool is None:
            expected = [tool.name for tool in tools]
            raise ActionFormatError("unknown_tool", f"expected one of {expected}, got {call.name!r}", num_calls)
        error = best_match(self._validator(tool).iter_errors(call.arguments))
        if error is not None:
            raise ActionFormatError("schema", f"{call.name}: {error.json_path}: {error.message}", num_calls)

    def _validator(self, tool: ToolSpec) -> Draft202012Validator:
        key = to_json(tool.parameters)
        if key not in self._validators:
            try:
                Draft202012Validator.check_schema(json.loads(key))
            except SchemaError as error:
                raise DataError(f"tool {tool.name}: expected a JSON schema, got: {error.message}") from error
            self._validators[key] = Draft202012Validator(json.loads(key))
        return self._validators[key]


def _reject(message: str) -> NoReturn:
    raise ActionFormatError("parse", message)


def parse_calls(text: str, next_call_id: int) -> tuple[ToolCall, ...]:
    """The calls that the text between the action markers stands for, read as strictly as ``ChatFormat.parse`` does."""
    calls = _read_calls(text, next_call_id)
    _check_with_melody(text, calls)
    return calls


def _read_calls(text: str, next_call_id: int) -> tuple[ToolCall, ...]:
    """Strict JSON calls, numbered consecutively, spelled exactly as they would be rendered."""
    try:
        items = json.loads(text, parse_constant=_reject)
    except (ValueError, RecursionError) as error:
        raise ActionFormatError("parse", f"expected JSON, got: {error}") from None
    if not isinstance(items, list) or not items:
        _reject("expected a list of calls")
    calls = []
    for index, item in enumerate(items):
        if not isinstance(item, dict) or list(item) != _CALL_KEYS:
            _reject(f"expected the keys {_CALL_KEYS}, got {list(item) if isinstance(item, dict) else item!r}")
        expected_id = str(next_call_id + index)
        if item["tool_call_id"] != expected_id:
            _reject(f'expected tool_call_id "{expected_id}", got {item["tool_call_id"]!r}')
        if not isinstance(item["tool_name"], str) or not isinstance(item["parameters"], dict):
            _reject("expected tool_name to be a string and parameters an object")
        calls.append(ToolCall(expected_id, item["tool_name"], item["parameters"]))
    try:
        rendered = render_calls(calls)
    except DataError as error:
        _reject(str(error))
    if rendered != text:
        _reject("expected the calls as they are rendered, got another spelling")
    return tuple(calls)


def _check_with_melody(text: str, calls: Sequence[ToolCall]) -> None:
    """What every server's parser would see must be what we saw."""
    seen = PyFilter(PyFilterOptions().cmd4()).process_full_text(controls.START_ACTION + text + controls.END_ACTION)
    parsed = [(call.id, call.name, call.arguments or "{}") for call in seen.tool_calls]
    if parsed != [(call.id, call.name, to_json(call.arguments)) for call in calls]:
        _reject("expected melody to read the same calls")
