"""Which conversations are fit to train on, and why the others are not.

In: conversations. Out: those without a fault, and for each reason a count and a few examples. Every filter is a small
class that finds one kind of fault and repairs nothing; leaks and duplicates (``decontamination``, ``dedup``) are faults
too. A fault is a text that begins with the place: ``messages[3].tool_calls[0]: ...``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from north_lightning.chat import (
    ActionFormatError,
    ChatFormat,
    NorthTokenizer,
    parse_calls,
    render_calls,
    render_conversation,
)
from north_lightning.data.text_filters import ControlMarker, ErroneousWhitespace, HallucinatedCitation, RepetitionLoop
from north_lightning.data.tool_call_filter import InvalidToolCall
from north_lightning.errors import DataError
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import Conversation, Count, ToolCall

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
    """No message by the assistant that is learned says or does anything."""

    reason = "nothing_to_train"

    def find_fault(self, sample: Conversation) -> str | None:
        learned = (message for message in sample.messages if message.role == "assistant" and message.trained)
        spoken = any(message.content or message.reasoning or message.tool_calls for message in learned)
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


class TruncatedEnding(ConversationFilter):
    """The assistant's last turn stops in the middle: in a code fence, or in mid-phrase.

    What follows that turn says nothing: an agent that ends by a call always leaves an observation behind.
    """

    reason = "truncated_ending"
    _open = (",", "(", "[", "{", "=", "\\", "->", "...[truncated]")

    def find_fault(self, sample: Conversation) -> str | None:
        spoken = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
        if not spoken:
            return None
        last, where = sample.messages[spoken[-1]], f"messages[{spoken[-1]}]"
        if last.tool_calls or not (last.content and last.trained):
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
