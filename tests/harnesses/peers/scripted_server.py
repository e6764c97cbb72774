"""An OpenAI-compatible chat server with known answers, for our own client and for the agents we compare with.

In: a list of turns, each a dictionary with ``content`` and/or ``tool_calls`` (lists of ``(name, arguments)``; arguments
may be a string, which is sent as it is), or with ``status`` and ``error``. Out: the answers, streamed where that is
asked for, and ``requests``, every body that came. Standard library only: agents in other environments run it too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class ScriptedServer:
    """Serves ``turns`` in order under ``url``; after the last one every answer is ``last``.

    A request without tools may be a side errand of an agent (a title for the conversation): with ``only_with_tools`` it
    gets a fixed answer and no turn.
    """

    def __init__(self, turns: Sequence[Mapping[str, Any]], last: str = "Done.", only_with_tools: bool = False) -> None:
        self.turns = list(turns)
        self.last = last
        self.only_with_tools = only_with_tools
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.answer(self, body)

            def do_GET(self) -> None:
                write_json(self, 200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

            def log_message(self, format: str, *args: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def turn_for(self, body: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """What is said to request ``number``."""
        return self.turns[number] if number < len(self.turns) else {"content": self.last}

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.only_with_tools and not body.get("tools"):
            turn: Mapping[str, Any] = {"content": "title"}
        else:
            with self._lock:
                number = len(self.requests)
                self.requests.append(body)
            turn = self.turn_for(body, number)
        if "status" in turn:
            write_json(handler, turn["status"], {"error": {"message": turn["error"]}})
            return
        message = message_of(turn, len(self.requests))
        finish = turn.get("finish_reason", "tool_calls" if "tool_calls" in message else "stop")
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        if body.get("stream"):
            write_stream(handler, message, finish, usage)
        else:
            choice = {"index": 0, "message": message, "finish_reason": finish}
            write_json(handler, 200, envelope("chat.completion") | {"choices": [choice], "usage": usage})


def message_of(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.get("content")}
    if turn.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": f"call_{number}_{i}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                },
            }
            for i, (name, arguments) in enumerate(turn["tool_calls"])
        ]
    return message


def envelope(kind: str) -> dict[str, Any]:
    return {"id": "scripted", "object": kind, "created": 0, "model": "scripted"}


def write_json(handler: BaseHTTPRequestHandler, status: int, content: object) -> None:
    data = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def write_stream(handler: BaseHTTPRequestHandler, message: dict[str, Any], finish: str, usage: dict[str, int]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    delta = dict(message)
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
    for choice, more in (
        ({"index": 0, "delta": delta, "finish_reason": None}, {}),
        ({"index": 0, "delta": {}, "finish_reason": finish}, {"usage": usage}),
    ):
        chunk = envelope("chat.completion.chunk") | {"choices": [choice]} | more
        handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
    handler.wfile.write(b"data: [DONE]\n\n")
