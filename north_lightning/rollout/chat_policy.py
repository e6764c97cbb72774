"""Attempts by any model behind an OpenAI-compatible chat server: messages out, one turn back. For evaluation.

In: a server's URL and model name. Out: a ``Policy`` per attempt. No token ids and no log-probabilities come back, so
nothing recorded this way can be trained on; ``Turn`` carries the server's own count of tokens. What is asked is what
the harness says: the server renders it with its own template.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from north_lightning.chat import to_openai, tools_to_openai
from north_lightning.errors import ConfigError, InvalidActionError, SamplerError
from north_lightning.rollout.attempt import AttemptEnds, Policy
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.seeds import derive_seed
from north_lightning.types import (
    AssistantAction,
    FinishReason,
    Message,
    Prompt,
    Rollout,
    SamplingParams,
    Step,
    ToolCall,
    Turn,
    Whole,
)

OK, BAD_REQUEST, TOO_LARGE, TOO_MANY = 200, 400, 413, 429
_SERVER_ERROR = 500
_OVERFLOW_WORDS = ("context length", "context_length", "maximum context", "context window", "too many tokens")
_CALL_FINISHES = ("stop", "tool_calls", "function_call", "length")


@dataclass(frozen=True)
class ChatServer:
    """An OpenAI-compatible server.

    Args:
        url: Base URL, up to and with ``/v1``.
        model: The name the server knows the model by.
        api_key_env: Environment variable with the key; empty for a server that wants none.
        num_retries: How often a request is sent again when the connection breaks or the server is busy.
        extra_body: More keys for every request, such as ``{"top_k": 20}``.
    """

    url: str
    model: str
    api_key_env: str = ""
    num_retries: Whole = 3
    extra_body: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"server.url: expected http:// or https://, up to and with /v1, got {self.url!r}")
        self.headers()

    def headers(self) -> dict[str, str]:
        """Of every request; ``ConfigError`` if the key is not in the environment."""
        if not self.api_key_env:
            return {}
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ConfigError(f"api_key_env: expected the environment variable {self.api_key_env} to hold a key")
        return {"Authorization": f"Bearer {key}"}

    async def complete(self, session: aiohttp.ClientSession, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer to one request.

        Raises:
            AttemptEnds: ``context``, if the server says that the conversation is too long for the model.
            SamplerError: no answer, or one of another shape.
        """
        for attempt in range(self.num_retries + 1):
            try:
                url = self.url.rstrip("/") + "/chat/completions"
                async with session.post(url, json={**body, **(self.extra_body or {})}) as response:
                    if response.status == OK:
                        answer: Mapping[str, Any] = await response.json(content_type=None)
                        return answer
                    text = (await response.text(errors="replace"))[:1000]
                    if response.status in (BAD_REQUEST, TOO_LARGE) and _is_overflow(text):
                        raise AttemptEnds("context")
                    problem = f"{self.url}: status {response.status}: {text[:300]}"
                    if response.status != TOO_MANY and response.status < _SERVER_ERROR:
                        raise SamplerError(problem)
            except (TimeoutError, aiohttp.ClientError, ValueError) as error:
                problem = f"{self.url}: no answer ({type(error).__name__}: {error})"
            if attempt < self.num_retries:
                await asyncio.sleep(0.5 * 2**attempt)
        raise SamplerError(f"{problem}, after {self.num_retries + 1} tries")


class ChatCompletionsPolicy(Policy):
    """A model behind a chat server, in one attempt.

    Args:
        server: Whom to ask.
        session: Of the event loop that makes the attempt.
        params: Of one turn; ``stop_token_ids`` are not sent.
        max_context_tokens: The attempt ends when the server counts so many tokens in the conversation.
        timeout_s: Limit of one turn.
        rollout: Where the turns are counted; ``rollout.seed`` seeds them.
    """

    can_forget = True

    def __init__(
        self,
        server: ChatServer,
        session: aiohttp.ClientSession,
        params: SamplingParams,
        max_context_tokens: int,
        timeout_s: float,
        rollout: Rollout,
    ) -> None:
        self._server = server
        self._session = session
        self._params = params
        self._max_context_tokens = max_context_tokens
        self._timeout_s = timeout_s
        self._rollout = rollout
        self._tools: list[dict[str, Any]] = []
        self._num_tokens = 0  # of the conversation, as the server counted
        self._unread = ""

    def begin(self, prompt: Prompt) -> None:
        self._tools = tools_to_openai(prompt.tools)

    async def act(self, messages: Sequence[Message], next_call_id: int) -> AssistantAction:
        if self._num_tokens >= self._max_context_tokens:
            raise AttemptEnds("context")
        body: dict[str, Any] = {
            "model": self._server.model,
            "messages": to_openai(messages),
            "max_tokens": min(self._params.max_tokens, self._max_context_tokens - self._num_tokens),
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "seed": derive_seed(self._rollout.seed, "turn", len(self._rollout.turns)) % 2**31,
        }
        if self._tools:
            body["tools"] = self._tools
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._server.complete(self._session, body)
        except TimeoutError as error:
            raise SamplerError(
                f"{self._server.url}: no answer within {self._timeout_s:g} s (timeouts.sample_s), for a turn of at "
                f"most {body['max_tokens']} tokens"
            ) from error
        message, finish = self._read(answer)
        if finish == "length" and not message.get("tool_calls"):
            raise AttemptEnds("length" if body["max_tokens"] == self._params.max_tokens else "context")
        self._unread = json.dumps(message, ensure_ascii=False)
        action = action_from_answer(message, next_call_id)
        self._unread = ""
        return action

    def observe(self, step: Step) -> None: ...

    def reject(self, error: InvalidActionError) -> Message | None:
        self._rollout.turns[-1] = replace(self._rollout.turns[-1], error=str(error))
        unread, self._unread = self._unread, ""
        return Message("assistant", unread) if unread else None

    def _read(self, answer: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """Message and finish reason of an answer, its tokens counted."""
        try:
            choice = answer["choices"][0]
            message, finish = dict(choice["message"]), str(choice.get("finish_reason") or "stop")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SamplerError(
                f"{self._server.url}: an answer of another shape ({error!r}): {str(answer)[:300]}"
            ) from None
        if finish not in _CALL_FINISHES:
            raise SamplerError(f"{self._server.url}: expected a finished turn, got finish reason {finish!r}")
        usage = answer.get("usage") or {}
        generated = int(usage.get("completion_tokens") or 0)
        self._num_tokens = int(usage.get("total_tokens") or 0)
        reason: FinishReason = "length" if finish == "length" else "stop"
        start = self._rollout.turns[-1].end if self._rollout.turns else 0
        self._rollout.turns.append(Turn(start, start + generated, reason))
        return message, finish


class ChatRunner(AttemptRunner):
    """Attempts at tasks by the model of a chat server.

    Args:
        server: Whom to ask.
        params: Of one turn.
        max_context_tokens: Of one conversation, as the server counts.
        further: As for ``AttemptRunner``.
    """

    def __init__(self, server: ChatServer, params: SamplingParams, max_context_tokens: int, **further: Any) -> None:
        super().__init__(**further)
        self.server = server
        self.params = params
        self.max_context_tokens = max_context_tokens
        self._session: aiohttp.ClientSession | None = None

    @property
    def sampling(self) -> tuple[object, ...]:
        return (self.params, self.max_context_tokens, self.server.extra_body)

    def make_policy(self, rollout: Rollout) -> Policy:
        if self._session is None or self._session.closed:
            unlimited = aiohttp.ClientTimeout(total=None)  # what limits a turn is ``timeouts.sample_s``
            self._session = aiohttp.ClientSession(headers=self.server.headers(), timeout=unlimited)
        limits = (self.max_context_tokens, self.timeouts.sample_s)
        return ChatCompletionsPolicy(self.server, self._session, self.params, *limits, rollout)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def action_from_answer(message: Mapping[str, Any], next_call_id: int) -> AssistantAction:
    """A server's assistant message as an action; ``InvalidActionError`` if its calls cannot be read.

    Text beside calls is thought aloud: it goes behind the reasoning, where Command-4 has its place.
    """
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise InvalidActionError(f"expected the content to be text, got {type(content).__name__}")
    raw_calls = message.get("tool_calls") or []
    calls = tuple(_call(raw, str(next_call_id + i)) for i, raw in enumerate(raw_calls))
    if calls:
        return AssistantAction("\n\n".join(part for part in (reasoning, content) if part), "", calls)
    return AssistantAction(reasoning, content)


def _call(raw: Mapping[str, Any], call_id: str) -> ToolCall:
    try:
        name, arguments = raw["function"]["name"], raw["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
    except (KeyError, TypeError) as error:
        raise InvalidActionError(f"expected a call with a name and arguments, got {str(raw)[:200]}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidActionError(f"expected the arguments as JSON, got: {error}") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise InvalidActionError(f"expected a name and an object of arguments, got {str(raw)[:200]}")
    return ToolCall(call_id, name, arguments)


def _is_overflow(text: str) -> bool:
    return any(words in text.lower() for words in _OVERFLOW_WORDS)
