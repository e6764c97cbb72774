"""Calls against the schemas of their tools, in bounded time: schemas and arguments are a stranger's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend
from jsonschema_specifications import REGISTRY

from north_lightning.errors import DataError
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import Conversation, ToolCall


class InvalidToolCall(ConversationFilter):
    """A call that is learned, of a tool the sample does not offer or with arguments outside that tool's schema; an id
    used twice."""

    reason = "invalid_tool_call"

    def find_fault(self, sample: Conversation) -> str | None:
        validators: dict[str, Draft202012Validator] = {}
        for index, tool in enumerate(sample.tools):
            validator = _validator(json.dumps(dict(tool.parameters), default=repr))
            if validator is None:
                return f"tools[{index}]: {tool.name}: parameters are no JSON schema"
            validators[tool.name] = validator
        seen: set[str] = set()
        for place, call, is_learned in calls_of(sample):
            if call.id in seen:
                return f"{place}: id {call.id!r} again"
            seen.add(call.id)
            if not is_learned:
                continue
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


def calls_of(sample: Conversation) -> Iterator[tuple[str, ToolCall, bool]]:
    """Every call with its place, and whether it is learned."""
    for index, message in enumerate(sample.messages):
        for number, call in enumerate(message.tool_calls):
            yield f"messages[{index}].tool_calls[{number}]", call, message.trained
