"""A sidecar without vLLM whose model plays a script, or answers at once, by the seed it is asked with."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from north_lightning.sampling.sidecar import Sidecar

_script: list[list[int]] = []


def play(turns: list[list[int]]) -> None:
    """What is said, turn by turn; the last turn is what an attempt that gives up says at once."""
    _script[:] = turns


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The turn after as many as the prompt shows: each is followed by its stop token and its result's."""
    prompt, params = request["token_ids"], request["sampling_params"]
    said = [turn for turn in _script[:-1] if _holds(prompt, turn)]
    gives_up = not said and params["seed"] % 2
    tokens = _script[-1] if gives_up else _script[len(said)]
    return {
        "choices": [
            {
                "token_ids": tokens,
                "logprobs": {"content": [{"token_id": token, "logprob": -6.0} for token in tokens]},
                "finish_reason": "stop",
                "weight_versions": [{"version": "0", "start": 0, "end": len(tokens)}],
            }
        ]
    }


def _holds(prompt: list[int], turn: list[int]) -> bool:
    return any(prompt[i : i + len(turn)] == turn for i in range(len(prompt)))


class ScriptedSidecar(Sidecar):
    """Takes every argument of a real one."""

    def start(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(answer(request)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def check_alive(self, timeout_s: float = 30.0) -> None: ...

    def stop(self, timeout_s: float = 10.0) -> None:
        self._server.shutdown()
        self._server.server_close()
