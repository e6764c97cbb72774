"""The entry point vLLM calls in each of its processes: registers our weight-transfer backend.

Comes in: nothing (declared under ``vllm.general_plugins``). Goes out: the backend ``BACKEND`` in vLLM's registry. It
imports nothing heavy and never stops vLLM from starting: a vLLM without weight transfer is left as it is.
"""

import os

from north_lightning.sampling.launch import PARENT_VARIABLE, die_with_parent

BACKEND = "north_shared_memory"


def register() -> None:
    """Register the shared-memory backend; safe to call twice, and a no-op where vLLM has no weight transfer.

    In a process that a sidecar's server has spawned, it also starts the watch that ends it with the server.
    """
    if os.environ.get(PARENT_VARIABLE) == str(os.getppid()):
        die_with_parent(os.getppid())
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory
    except ImportError:
        return
    if BACKEND not in Factory._registry:  # the class offers no public look-up
        Factory.register_engine(BACKEND, "north_lightning.sampling.vllm_engine", "SharedMemoryEngine")
