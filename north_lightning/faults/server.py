"""The routes of a vLLM server that this package uses, without a model, and with what may go wrong with it.

In: requests, weights, and a ``FaultPlan``. Out: answers in vLLM's shape. It pauses, takes weights in sessions and says
which version each token is of, as the real one does; what it samples is up to a function.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from north_lightning.errors import SidecarError
from north_lightning.faults.plan import FaultPlan
from north_lightning.sampling.client import GENERATE_PATH
from north_lightning.sampling.sidecar import HOST, Sidecar
from north_lightning.seeds import derive_seed

REQUEST_FAULTS = (
    "request_cut",
    "request_hangs",
    "request_refused",
    "request_slow",
    "logprob_nan",
    "logprob_clamped",
    "version_of_another",
    "answer_truncated",
    "answer_garbled",
)
PUSH_FAULTS = ("push_fails", "push_hangs")
LOGPROB = -6.0

Reply = Callable[[Mapping[str, Any]], Sequence[int]]


def random_tokens(request: Mapping[str, Any], vocab_size: int = 256, num_tokens: int = 12) -> list[int]:
    """Tokens drawn with the seed of the request, then its first stop token."""
    params = request["sampling_params"]
    draw = random.Random(params.get("seed"))
    return [draw.randrange(10, vocab_size) for _ in range(num_tokens)] + list(params.get("stop_token_ids", ()))[:1]


class FakeVLLM:
    """A server on a thread of this process; ``start`` and ``stop``, or a ``with`` block. Loopback only.

    Planned faults of a request, which is known by its prompt's length and its seed: the connection is cut, or never
    answered; the server refuses (500), or answers late; log-probabilities are NaN, or vLLM's replacement for it; the
    version is not a number of ours; the body ends early, or is no JSON. Planned faults of a push, which is known by the
    server's name and by its number: it fails (500) or hangs after some of its tensors, how many is drawn. Every fault
    strikes once.

    Beyond the plan, a test does by hand: ``kill`` (connections are refused), ``hang`` (accepted, never answered),
    ``fail_push_after`` (a number of tensors), ``broken_route`` (answers 500), ``logprob_offset`` (of ``score``).

    Args:
        reply: Token ids for a request's body; default ``random_tokens``.
        plan: Which requests and pushes fail. Default: none.
        port: Default: any that is free.
        name: What the plan knows this server's pushes by.
        delay_s: What every answer takes.
        num_slots: Requests that are answered at a time; others wait.
    """

    def __init__(
        self,
        reply: Reply = random_tokens,
        plan: FaultPlan | None = None,
        port: int = 0,
        name: str = "",
        delay_s: float = 0.0,
        num_slots: int = 256,
    ) -> None:
        self.reply = reply
        self.plan = plan
        self.name = name
        self.delay_s = delay_s
        self.version = "0"
        self.weights: dict[str, bytes] = {}
        """What was pushed, by name, as it lies in the file."""
        self.is_paused = False
        self.is_torn = False
        """Whether some tensors of an update have arrived and the update was not finished."""
        self.num_torn_answers = 0
        """Requests answered from torn weights: 0 in a sound system."""
        self.routes: list[str] = []
        """Paths that were asked for by POST, in order."""
        self.served_s: dict[int, float] = {}
        """Seed of a request -> seconds its latest answer took in a slot."""
        self.fail_push_after: int | None = None
        self.broken_route = ""
        self.logprob_offset = 0.0
        self._port = port
        self._slots = threading.BoundedSemaphore(num_slots)
        self._changed = threading.Condition()
        self._closing = threading.Lock()
        self._is_open = False
        self._is_hung = False
        self._session: dict[str, bytes] | None = None
        self._num_pushes = 0
        self._push_limit: tuple[str, int] | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    @property
    def is_alive(self) -> bool:
        """Whether it answers at all."""
        return self._is_open and not self._is_hung

    def start(self) -> None:
        """Listen; known from then on under ``url``."""
        self._http = _HTTP((HOST, self._port), _Handler)
        self._http.fake = self
        self._port = self._http.server_address[1]
        self._is_open, self._is_hung = True, False
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End every connection, those that wait included. May be called twice; returns when the port is free."""
        with self._closing:
            with self._changed:
                was_open, self._is_open = self._is_open, False
                self._changed.notify_all()
            if was_open:
                self._http.shutdown()
                self._http.server_close()

    kill = stop

    def hang(self) -> None:
        """Accept connections and answer none, until ``stop``."""
        self._is_hung = True

    def __enter__(self) -> FakeVLLM:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- answers -----------------------------------------------------------------------------------------------------

    def choice(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What is sampled for one request, in vLLM's shape; to be overridden for more than tokens."""
        tokens = list(self.reply(request))
        is_end = tokens[-1] in request["sampling_params"].get("stop_token_ids", ())
        return {
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": token, "logprob": LOGPROB} for token in tokens]},
            "finish_reason": "stop" if is_end else "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
        }

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and body; ``_NoAnswer`` where the connection is to be cut."""
        self.routes.append(path)
        if self._is_hung:
            self._wait_while(lambda: True)
        if path == self.broken_route:
            return 500, b"broken on purpose"
        if path == GENERATE_PATH:
            return self._score(body) if "prompt_logprobs" in body["sampling_params"] else self._generate(body)
        with self._changed:
            if path in ("/pause", "/resume"):
                self.is_paused = path == "/pause"
                self._changed.notify_all()
            elif path == "/start_weight_update":
                if self._session is not None:
                    return 400, b"a weight update is under way"
                self._begin_update()
            elif path == "/update_weights":
                return self._update(body["update_info"]["path"])
            elif path == "/finish_weight_update":
                return self._finish_update(str(body["weight_version"]))
            elif path == "/update_weight_version":
                self.version = str(body["new_version"])
        return 200, b"{}"

    def _generate(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        fault = self._strike(body)
        if fault == "request_cut":
            raise _NoAnswer
        if fault == "request_hangs":
            self._wait_while(lambda: True)
        if fault == "request_refused":
            return 500, b"a planned fault"
        if fault == "request_slow":
            time.sleep(10 * self.delay_s)
        with self._slots:
            started = time.monotonic()
            time.sleep(self.delay_s)
            with self._changed:  # no push begins between the look at the weights and the answer
                self._wait_while(lambda: self.is_paused)
                self.num_torn_answers += self.is_torn
                choice = self.choice(body)
            self.served_s[body["sampling_params"].get("seed", 0)] = time.monotonic() - started
        if fault == "logprob_nan":
            choice["logprobs"]["content"][-1]["logprob"] = float("nan")
        elif fault == "logprob_clamped":
            choice["logprobs"]["content"][0]["logprob"] = -9999.0
        elif fault == "version_of_another":
            choice["weight_versions"][0]["version"] = "another trainer's"
        text = json.dumps({"choices": [choice]}).encode()
        if fault == "answer_garbled":
            text = b"\x00<html>" + text[: len(text) // 2]
        elif fault == "answer_truncated":
            raise _NoAnswer(text[: len(text) // 2], len(text))
        return 200, text

    def _strike(self, body: Mapping[str, Any]) -> str | None:
        if self.plan is None:
            return None
        return self.plan.strike(REQUEST_FAULTS, len(body["token_ids"]), body["sampling_params"].get("seed", 0))

    def _score(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        entries = [{str(token): {"logprob": -0.01 * token - self.logprob_offset}} for token in body["token_ids"]]
        return 200, json.dumps({"choices": [], "prompt_logprobs": [None, *entries[1:]]}).encode()

    def _begin_update(self) -> None:
        self._session = {}
        self._num_pushes += 1
        self._push_limit = None if self.fail_push_after is None else ("push_fails", self.fail_push_after)
        if self.plan is not None:
            fault = self.plan.strike(PUSH_FAULTS, self.name, self._num_pushes)
            if fault is not None:
                self._push_limit = (fault, derive_seed(self.plan.seed, self._num_pushes) % 20)

    def _update(self, path: str) -> tuple[int, bytes]:
        """Read a file of tensors; a failure ends the session, and leaves the weights torn if any had arrived."""
        if self._session is None:
            return 400, b"no weight update is under way"
        try:
            tensors = _read_safetensors(Path(path))
        except (OSError, ValueError) as error:
            self._session = None
            return 500, str(error).encode()
        for name, content in tensors.items():
            if self._push_limit is not None and len(self._session) >= self._push_limit[1]:
                self._session = None
                if self._push_limit[0] == "push_hangs":
                    self._wait_while(lambda: True)
                return 500, f"a planned fault at {name}".encode()
            self._session[name] = content
            self.is_torn = True
        return 200, b"{}"

    def _finish_update(self, version: str) -> tuple[int, bytes]:
        if self._session is None or self._push_limit is not None:
            self._session = None
            return 500, b"the weight update cannot be finished"
        self.weights.update(self._session)
        self._session, self.is_torn, self.version = None, False, version
        return 200, b"{}"

    def _wait_while(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_open or not holds())
        if not self._is_open:
            raise _NoAnswer


class _NoAnswer(Exception):
    """Control flow: the connection is cut, after these bytes of so many if any."""

    def __init__(self, text: bytes = b"", promised: int = 0) -> None:
        super().__init__()
        self.text, self.promised = text, promised


class _HTTP(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    fake: FakeVLLM

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever gave up waiting has closed the connection: nothing to say."""


class _Handler(BaseHTTPRequestHandler):
    server: _HTTP

    def do_GET(self) -> None:
        fake = self.server.fake
        if fake.is_alive:
            self._reply(
                200, json.dumps({"weight_version": fake.version, "is_paused": fake.is_paused, "world_size": 1}).encode()
            )

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        try:
            self._reply(*self.server.fake.answer(self.path.split("?")[0], body))
        except _NoAnswer as end:
            if end.text:
                self._reply(200, end.text, end.promised)
            self.close_connection = True

    def _reply(self, status: int, text: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(promised or len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


class FakeSidecar(Sidecar):
    """A ``FakeVLLM`` in place of the server that a ``Sidecar`` starts; takes every argument of a real one.

    A subclass says in ``make_server`` what it samples and how it fails. ``server`` is the running one: what a test does
    to it (``kill``, ``hang``) is found by ``check_alive`` as for a real one, and mended by ``stop`` and ``start``.
    """

    server: FakeVLLM
    can_return_routed_experts = False

    def make_server(self, port: int) -> FakeVLLM:
        """Random tokens of the checkpoint's vocabulary, and no faults."""
        vocab_size = json.loads((self.model_dir / "config.json").read_text())["vocab_size"]
        return FakeVLLM(lambda request: random_tokens(request, vocab_size), port=port)

    def start(self) -> None:
        self.check_checkpoint()
        self.server = self.make_server(self._port or 0)
        self.server.start()
        self._port = self.server._port

    def check_alive(self, timeout_s: float = 10.0) -> str:
        if not self.server._is_open:
            raise SidecarError("the fake sidecar was killed by SIGKILL")
        if not self.server.is_alive:
            raise SidecarError(f"the fake sidecar's engine did not answer within {timeout_s:.0f} s")
        return ""

    def stop(self, timeout_s: float = 10.0) -> None:
        if hasattr(self, "server"):
            self.server.stop()


def _read_safetensors(path: Path) -> dict[str, bytes]:
    """Name -> bytes; the format is that of https://huggingface.co/docs/safetensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    start = 8 + size
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: data[start + begin : start + end] for name, (begin, end) in spans.items()}
