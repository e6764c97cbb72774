"""Which conversations are fit to train on, and why the others are not.

In: conversations. Out: those without a fault, and for each reason a count and a few examples. Every filter is a small
class that finds one kind of fault and repairs nothing; leaks and duplicates (``decontamination``, ``dedup``) are faults
too. A fault is a text that begins with the place: ``messages[3].tool_calls[0]: ...``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend
from jsonschema_specifications import REGISTRY

from north_lightning.chat import (
    ActionFormatError,
    ChatFormat,
    NorthTokenizer,
    parse_calls,
    render_calls,
    render_conversation,
)
from north_lightning.chat.controls import CONTROL_TOKENS, RESERVED_TOKENS
from north_lightning.errors import DataError
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import Conversation, Count, Message, ToolCall

NUM_EXAMPLES = 5


class SampleFilter:
    """Passes conversations on, or counts why not: the first filter that finds a fault gives the reason.

    >>> fit = SampleFilter()
    >>> list(fit([])), fit.dropped
    ([], Counter())
    """

    def __init__(self, filters: Sequence[ConversationFilter] | None = None) -> None:
        """``filters``, in the order they are asked; ``default_filters()`` for None."""
        self.filters = default_filters() if filters is None else list(filters)
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def __call__(self, samples: Iterable[Conversation]) -> Iterator[Conversation]:
        return (sample for sample in samples if self.passes(sample))

    def passes(self, sample: Conversation) -> bool:
        """Whether ``sample`` has no fault; counted either way."""
        fault = next(self._faults(sample), None)
        if fault is None:
            self.kept += 1
        else:
            self.count(sample, *fault)
        return fault is None

    def count(self, sample: Conversation, reason: str, detail: str) -> None:
        """Count ``sample`` as dropped; the first few of every reason are kept as examples."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"source": sample.source, "task_id": sample.task_id, "detail": detail[:300]})

    def _faults(self, sample: Conversation) -> Iterator[tuple[str, str]]:
        for check in self.filters:
            detail = check.find_fault(sample)
            if detail is not None:
                yield check.reason, detail


def default_filters() -> list[ConversationFilter]:
    """All filters that need no setting, cheap ones first."""
    return [
        NothingToTrain(),
        FailedVerification(),
        UnpairedToolResult(),
        InvalidToolCall(),
        ContentBesideToolCalls(),
        ErroneousWhitespace(),
        ControlMarker(),
        HallucinatedCitation(),
        RepetitionLoop(),
        TruncatedEnding(),
        RoundTrip(),
    ]


# ---- structure -----------------------------------------------------------------------------------------------------


class NothingToTrain(ConversationFilter):
    """No message by the assistant says or does anything."""

    reason = "nothing_to_train"

    def find_fault(self, sample: Conversation) -> str | None:
        spoken = any(m.content or m.reasoning or m.tool_calls for m in sample.messages if m.role == "assistant")
        return None if spoken else "messages: no words and no calls by the assistant"


class FailedVerification(ConversationFilter):
    """A verifier rejected the result.

    Args:
        required: whether a result that nobody checked is dropped too.
    """

    reason = "failed_verification"

    def __init__(self, required: bool = False) -> None:
        self.required = required

    def find_fault(self, sample: Conversation) -> str | None:
        failed = sample.verified is False or (self.required and sample.verified is None)
        return f"verified: {sample.verified}" if failed else None


class UnpairedToolResult(ConversationFilter):
    """Calls and results that do not pair up: a result without its call, a second result, a call without a result.

    Each result follows the call it answers, before anybody else speaks; only the last message's calls may stay open.
    """

    reason = "unpaired_tool_result"

    def find_fault(self, sample: Conversation) -> str | None:
        open_calls: set[str] = set()
        for index, message in enumerate(sample.messages):
            if message.role == "tool":
                if message.tool_call_id not in open_calls:
                    return f"messages[{index}]: a result of call {message.tool_call_id!r}, which is not open"
                open_calls.discard(message.tool_call_id)
            elif open_calls:
                return f"messages[{index}]: calls {sorted(open_calls)} have no result"
            open_calls |= {call.id for call in message.tool_calls}
        if open_calls and not sample.messages[-1].tool_calls:
            return f"messages: calls {sorted(open_calls)} have no result"
        return None


class InvalidToolCall(ConversationFilter):
    """A call of a tool the sample does not offer, arguments outside that tool's schema, an id used twice."""

    reason = "invalid_tool_call"

    def find_fault(self, sample: Conversation) -> str | None:
        validators: dict[str, Draft202012Validator] = {}
        for index, tool in enumerate(sample.tools):
            validator = _validator(json.dumps(dict(tool.parameters), default=repr))
            if validator is None:
                return f"tools[{index}]: {tool.name}: parameters are no JSON schema"
            validators[tool.name] = validator
        seen: set[str] = set()
        for place, call in _calls(sample):
            if call.id in seen:
                return f"{place}: id {call.id!r} again"
            seen.add(call.id)
            if call.name not in validators:
                return f"{place}: {call.name!r} is none of {sorted(validators)}"
            _steps.set([MAX_STEPS])
            try:
                error = best_match(validators[call.name].iter_errors(dict(call.arguments)))
            except Exception as unusable:  # a reference to nowhere, a pattern that is none, a number that is too large
                return f"tools: {call.name}: parameters are no JSON schema: {type(unusable).__name__} {unusable}"
            if error is not None:
                return f"{place}: {call.name}: {error.json_path}: {error.message}"
        return None


@lru_cache(1024)
def _validator(schema: str) -> Any:
    """Of a JSON schema as text, or None if it is none. Cached, because checking a schema takes milliseconds."""
    try:
        parameters = _without_property_patterns(json.loads(schema))
        Draft202012Validator.check_schema(parameters)
    except Exception:  # jsonschema on what a stranger wrote: too deep, a pattern that is none, ...
        return None
    return _BoundedValidator(parameters, registry=REGISTRY)  # which fetches nothing that a sample names


def _without_property_patterns(schema: Any) -> Any:
    """``schema`` without what matches names of properties by patterns, which nothing here can bound in time."""
    if isinstance(schema, list):
        return [_without_property_patterns(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    left_out = ("patternProperties", "additionalProperties", "unevaluatedProperties")
    loose = left_out if isinstance(schema.get("patternProperties"), dict) else ()
    return {key: _without_property_patterns(value) for key, value in schema.items() if key not in loose}


MAX_STEPS = 30_000
"""Keywords that are looked at for one call: references can double what there is to check at every level."""
MAX_PATTERN_S = 0.2
_steps: ContextVar[list[int]] = ContextVar("steps")


def _counted(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        left = _steps.get()
        pairs = len(instance) ** 2 if name == "uniqueItems" and isinstance(instance, list) else 0
        left[0] -= 1 + pairs // 100
        if left[0] < 0:
            raise DataError(f"expected at most {MAX_STEPS} checks, got more")
        return check(validator, value, instance, schema)

    return counted


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """``TimeoutError`` where the search takes too long: Python's own engine cannot be stopped."""
    if isinstance(instance, str) and not regex.search(pattern, instance, timeout=MAX_PATTERN_S):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


_BoundedValidator = extend(
    Draft202012Validator,
    {name: _counted(name, check) for name, check in (Draft202012Validator.VALIDATORS | {"pattern": _pattern}).items()},
)


class ContentBesideToolCalls(ConversationFilter):
    """An assistant's message with both: the chat format has no place for the content."""

    reason = "content_beside_tool_calls"

    def find_fault(self, sample: Conversation) -> str | None:
        both = (i for i, message in enumerate(sample.messages) if message.tool_calls and message.content)
        return next((f"messages[{index}]: {sample.messages[index].content!r}" for index in both), None)


class RoundTrip(ConversationFilter):
    """A conversation that cannot be rendered, or whose rendered calls do not parse to the same calls again.

    Catches what looks right and is not: numbers that change, half characters, JSON that is nested too deep.
    """

    reason = "round_trip"

    def find_fault(self, sample: Conversation) -> str | None:
        try:
            render_conversation(sample.messages, sample.tools, reasoning=True)
        except DataError as error:
            return str(error)
        number = 0
        for index, message in enumerate(sample.messages):
            if not message.tool_calls:
                continue
            calls = [ToolCall(str(number + i), c.name, c.arguments) for i, c in enumerate(message.tool_calls)]
            try:
                parsed = parse_calls(render_calls(calls), number)
            except ActionFormatError as error:
                return f"messages[{index}].tool_calls: {error}"
            if list(parsed) != calls:
                return f"messages[{index}].tool_calls: rendered and parsed, they are others"
            number += len(calls)
        return None


# ---- text ----------------------------------------------------------------------------------------------------------

_BAD_WHITESPACE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\x85\u00a0\u2028\u2029\u200b-\u200f\ufeff]"  # control characters and look-alikes of blanks
    r"|\n{5,}"
    r"|[ \t]{120,}"
    r"|\A\s|\s\Z"
)


class ErroneousWhitespace(ConversationFilter):
    """In what the assistant wrote as text: control characters, look-alikes of the blank, blanks at either end, long
    runs of them. Arguments are exempt: a terminal is sent control characters, a file may hold anything."""

    reason = "erroneous_whitespace"

    def find_fault(self, sample: Conversation) -> str | None:
        for place, text in _assistant_texts(sample):
            if found := _BAD_WHITESPACE.search(text):
                return f"{place}: {found.group()[:20]!r} at character {found.start()}"
        return None


_NAMES = "|".join(sorted({name.strip("<|>") for name in CONTROL_TOKENS if "|" in name}, key=len, reverse=True))
_MARKER = re.compile(
    "|".join(map(re.escape, (*CONTROL_TOKENS, *RESERVED_TOKENS)))
    + r"|<\|[A-Za-z][A-Za-z0-9_]+\|>"  # of another model's template too
    + rf"|(?i:<[|\s]*(?:{_NAMES})\b|\b(?:{_NAMES})[|\s]*>)"  # ours, with a delimiter missing or misspelled
)


class ControlMarker(ConversationFilter):
    """A control token spelled out in text, whole or malformed, as when a template was rendered into the data or a user
    forges a turn. Tool results are exempt: they show the world as it is, and are encoded so that no control id arises.
    """

    reason = "control_marker"

    def find_fault(self, sample: Conversation) -> str | None:
        for index, message in enumerate(sample.messages):
            if message.role == "tool":
                continue
            for name, text in _texts(message):
                if ("<" in text or ">" in text) and (found := _MARKER.search(text)):
                    return f"messages[{index}].{name}: {found.group()!r} at character {found.start()}"
        return None


_CITATION = re.compile(
    r"</?co(?:\s*:[^<>]{0,40})?>"  # Command's grounded spans
    r"|【[^】\n]{0,40}†[^】\n]{0,60}】"
    r"|\[citation(?:\s*:\s*\d+|[ _]needed)\]"
    r"|\[\^\d+(?:\^)?\](?!:)",
    re.IGNORECASE,
)
_FOOTNOTE = re.compile(r"^\[\^(\d+)\]:", re.MULTILINE)


class HallucinatedCitation(ConversationFilter):
    """Citation marks by the assistant: nothing here is grounded in documents, so they point nowhere. A footnote that is
    written out in the same message is none."""

    reason = "hallucinated_citation"

    def find_fault(self, sample: Conversation) -> str | None:
        for place, text in _assistant_texts(sample):
            footnotes = {f"[^{number}]" for number in _FOOTNOTE.findall(text)}
            for found in _CITATION.finditer(text):
                if found.group() not in footnotes:
                    return f"{place}: {found.group()!r} at character {found.start()}"
        return None


class RepetitionLoop(ConversationFilter):
    """The assistant is stuck: one call with one and the same result over and over, or words that go round in circles.

    Args:
        max_calls: the same call, with the same result, so often in a row is still sound.
        min_words: circling words are counted from this many on, once they have gone round ten times.
    """

    reason = "repetition_loop"
    max_period = 64
    rounds = 10

    def __init__(self, max_calls: Count = 3, min_words: Count = 40) -> None:
        self.max_calls = max_calls
        self.min_words = min_words

    def find_fault(self, sample: Conversation) -> str | None:
        results = {m.tool_call_id: m.content for m in sample.messages if m.role == "tool"}
        previous, times = None, 0
        for place, call in _calls(sample):
            step = (call.name, dict(call.arguments), results.get(call.id))
            times = times + 1 if step == previous else 1
            previous = step
            if times > self.max_calls:
                return f"{place}: {call.name}, {times} times in a row with the same result"
        for place, text in _assistant_texts(sample):
            if (period := self._circling(text)) is not None:
                return f"{place}: the same {period} words over and over"
        return None

    def _circling(self, text: str) -> int | None:
        """The period of a run of words that repeats itself, or None."""
        words = text.split()
        if len(words) < self.min_words:
            return None
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        ids = np.array([numbers[word] for word in words])
        for period in range(1, min(self.max_period, len(ids) // self.rounds) + 1):
            needed = max(self.min_words, period * self.rounds) - period
            breaks = np.flatnonzero(ids[period:] != ids[:-period])
            longest = np.diff(breaks, prepend=-1, append=len(ids) - period).max() - 1
            if longest >= needed:
                return period
        return None


class TruncatedEnding(ConversationFilter):
    """The conversation stops in the middle: on a tool's or a user's message, in a code fence, or in mid-phrase."""

    reason = "truncated_ending"
    _open = (",", "(", "[", "{", "=", "\\", "->", "...[truncated]")

    def find_fault(self, sample: Conversation) -> str | None:
        last = sample.messages[-1]
        where = f"messages[{len(sample.messages) - 1}]"
        if last.role != "assistant":
            return f"{where}: the last word is the {last.role}'s"
        if last.tool_calls or not last.content:
            return None
        fences = len(re.findall(r"^[^\S\n]*```", last.content, re.MULTILINE))
        if fences % 2:
            return f"{where}.content: a code fence is open at the end"
        if last.content.endswith(self._open):
            return f"{where}.content: ends in {last.content[-30:]!r}"
        return None


class TooLong(ConversationFilter):
    """More tokens than a row holds; such a sample is dropped whole, never cut.

    Args:
        max_tokens: the most that fit.
        tokenizer: directory of the tokenizer that counts.
        reasoning: whether assistant turns begin with thinking.
    """

    reason = "too_long"

    def __init__(self, max_tokens: Count, tokenizer: Path, reasoning: bool = True) -> None:
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.reasoning = reasoning

    def find_fault(self, sample: Conversation) -> str | None:
        try:
            length = len(self._chat.encode_conversation(sample.messages, sample.tools).token_ids)
        except DataError as error:
            return f"tokens: cannot be counted: {error}"
        return f"tokens: {length}, more than {self.max_tokens}" if length > self.max_tokens else None

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat(NorthTokenizer.load(self.tokenizer), self.reasoning)


def _calls(sample: Conversation) -> Iterator[tuple[str, ToolCall]]:
    for index, message in enumerate(sample.messages):
        for number, call in enumerate(message.tool_calls):
            yield f"messages[{index}].tool_calls[{number}]", call


def _assistant_texts(sample: Conversation) -> Iterator[tuple[str, str]]:
    """What the assistant wrote in words, with its place."""
    for index, message in enumerate(sample.messages):
        if message.role == "assistant":
            for name, text in (("reasoning", message.reasoning), ("content", message.content)):
                if text:
                    yield f"messages[{index}].{name}", text


def _texts(message: Message) -> list[tuple[str, str]]:
    arguments = [
        (f"tool_calls[{number}]", json.dumps(dict(call.arguments), ensure_ascii=False, default=repr))
        for number, call in enumerate(message.tool_calls)
    ]
    return [("content", message.content), ("reasoning", message.reasoning), *arguments]
