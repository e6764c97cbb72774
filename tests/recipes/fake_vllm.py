"""A sidecar without vLLM: random tokens over HTTP, in the shape of vLLM's answers, with routed experts."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from north_lightning.sampling.sidecar import Sidecar


class FakeSidecar(Sidecar):
    """Takes every argument of a real one."""

    def start(self) -> None:
        config = json.loads((self.model_dir / "config.json").read_text())

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(answer(request, config)).encode()
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


def answer(request: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Twelve random tokens and a stop token."""
    params = request["sampling_params"]
    random = np.random.default_rng(params["seed"])
    tokens = [*random.integers(10, config["vocab_size"], 12).tolist(), params["stop_token_ids"][0]]
    choice = {
        "token_ids": tokens,
        "logprobs": {"content": [{"token_id": token, "logprob": -6.0} for token in tokens]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "0", "start": 0, "end": len(tokens)}],
    }
    if "routed_experts_prompt_start" in params:
        num_read = len(request["token_ids"]) - params["routed_experts_prompt_start"] + len(tokens) - 1
        scores = random.random((num_read, config["num_hidden_layers"], config["num_experts"]))
        experts = scores.argsort(-1)[..., : config["num_experts_per_tok"]].astype(np.uint8)
        buffer = io.BytesIO()
        np.save(buffer, experts)
        choice["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()
    return {"choices": [choice]}
