"""The entry point vLLM calls in each of its processes: registers our weight-transfer backend.

Comes in: nothing (declared under ``vllm.general_plugins``). Goes out: the backend name ``BACKEND`` in vLLM's registry. It
imports nothing heavy and never stops vLLM from starting: a vLLM without weight transfer is left as it is.
"""

import os

BACKEND = "north_shared_memory"


def register() -> None:
    """Register the shared-memory backend; safe to call twice, and a no-op where vLLM has no weight transfer.

    In a sidecar the engine process also starts to watch its parent here, so that it never outlives the server.
    """
    if os.environ.get("NORTH_LIGHTNING_SIDECAR") == str(os.getppid()):
        from north_lightning.sampling.launch import die_with_parent

        die_with_parent(os.getppid())
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory
    except ImportError:
        return
    if BACKEND not in Factory._registry:  # the class offers no public look-up
        Factory.register_engine(BACKEND, "north_lightning.sampling.vllm_engine", "SharedMemoryEngine")
