"""How a release is served: the script beside its weights, and log-probabilities from vLLM itself.

In: a release. Out: ``serve.sh``, an OpenAI-compatible endpoint with tool calls and reasoning; or what a vLLM server on
this machine says of given tokens, and why there is none.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from north_lightning.model import NorthConfig
from north_lightning.sampling import Sidecar, VLLMSampler

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of a head that vLLM's attention on a CPU takes."""
SLOWEST_READ = 100e6  # bytes a second, from a disk that is no reason to give up

_SCRIPT = """\
#!/bin/sh
# Serves this model: an OpenAI-compatible endpoint with tool calls and reasoning, on http://127.0.0.1:8000/v1.
# Arguments are vLLM's, and win over those below: ./serve.sh --port 8001 --tensor-parallel-size 2
# Needs vLLM 0.24 or later, and cohere_melody 0.14 or later, which holds the parsers.
here=$(cd -- "$(dirname -- "$0")" && pwd)
set -- --served-model-name {name} --host 127.0.0.1 --max-model-len auto --enable-auto-tool-choice \\
    --tool-call-parser cohere_command4 --reasoning-parser cohere_command4 "$@"
python=${{PYTHON:-python3}}
if "$python" -c 'from importlib.metadata import version; version("vllm")' 2> /dev/null; then
    exec vllm serve "$here" "$@"
fi
exec "$python" -m vllm.entrypoints.openai.api_server --model "$here" "$@"  # the CPU build has no command
"""


def serve_script(name: str) -> str:
    """The text of ``serve.sh`` for a model that clients call ``name``."""
    return _SCRIPT.format(name=shlex.quote(name))


def why_not_served(release: Path, config: NorthConfig, is_quantized: bool) -> str | None:
    """What keeps vLLM on this machine from serving ``release``; None if nothing does."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    on_gpu = torch.cuda.is_available()
    if not on_gpu and is_quantized:
        return "vLLM has no kernel for these FP8 experts on a CPU"
    if not on_gpu and config.head_dim not in CPU_HEAD_DIMS:
        return f"vLLM on a CPU takes no heads of {config.head_dim} numbers"
    needed = _num_bytes(release) * (1.1 if on_gpu else 3)
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        return f"it needs {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    return None


def served_logprobs(release: Path, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every token of ``rows`` given those before it, as a vLLM server says; 0.0 for the first."""

    async def ask(url: str) -> list[list[float]]:
        sampler = VLLMSampler(url, timeout_s=600)
        try:
            return [await sampler.score(row) for row in rows]
        finally:
            await sampler.close()

    with TemporaryDirectory() as folder:
        server = Sidecar(
            release,
            Path(folder) / "vllm.log",
            max_model_len=max(map(len, rows)) + 1,
            max_num_seqs=8,
            dtype="auto" if torch.cuda.is_available() else "float32",
            start_timeout_s=300 + _num_bytes(release) / SLOWEST_READ,
        )
        with server:
            return asyncio.run(ask(server.url))


def _num_bytes(release: Path) -> int:
    return sum(file.stat().st_size for file in release.glob("*.safetensors"))
