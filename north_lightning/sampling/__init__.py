"""The sampler: a vLLM server as sidecar process, its token-in/token-out client, and the weight transports.

In: a checkpoint, prompts as ids, new weights. Out: sampled ids with log-probabilities and policy versions. Nothing here
knows the model's code or tokenises.

Names are imported when they are first used: vLLM imports this package in each of its processes, for the plug-in alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from north_lightning.sampling.client import VLLMSampler
    from north_lightning.sampling.pool import SamplerPool
    from north_lightning.sampling.scripted import ScriptedSampler
    from north_lightning.sampling.sidecar import Sidecar
    from north_lightning.sampling.transport import PushReport, SharedMemoryTransport

__all__ = ["PushReport", "SamplerPool", "ScriptedSampler", "SharedMemoryTransport", "Sidecar", "VLLMSampler"]

_MODULES = {
    "PushReport": "transport",
    "SamplerPool": "pool",
    "ScriptedSampler": "scripted",
    "SharedMemoryTransport": "transport",
    "Sidecar": "sidecar",
    "VLLMSampler": "client",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
