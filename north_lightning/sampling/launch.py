"""The sidecar's main module: vLLM's API server, which starts fast on CPU and ends when its parent is gone.

``python -m north_lightning.sampling.launch PARENT_PID <arguments of vLLM's API server>``. Everything else is vLLM's.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

PARENT_VARIABLE = "NORTH_LIGHTNING_SIDECAR_PID"
"""Environment variable by which processes the server starts recognise it as the parent to watch."""
BACKGROUND_VARIABLE = "NORTH_LIGHTNING_SIDECAR_BACKGROUND"
"""Environment variable by which the server runs only on CPU time that nobody else wants."""
WATCH_INTERVAL_S = 0.5


def die_with_parent(parent_pid: int) -> None:
    """Kill this process's whole group as soon as its parent is no longer ``parent_pid``.

    A thread compares ``getppid`` instead of ``prctl(PR_SET_PDEATHSIG)``, which fires when the parent's *thread* ends.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(WATCH_INTERVAL_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def fork_the_engine() -> None:
    """On CPU, let vLLM fork its engine process from this one, in which everything is imported already.

    vLLM spawns it there, which imports torch and vLLM a second time, and inspects the model's class in one more
    process; together that is half of the start-up time and 0.6 GB. Forking is what vLLM does on GPUs. Nothing is
    compiled: two small functions would be, at the first request of a machine, and are no faster afterwards.
    """
    import torch._dynamo
    from vllm import ModelRegistry
    from vllm.model_executor.models.cohere2_moe import Cohere2MoeForCausalLM
    from vllm.platforms import current_platform
    from vllm.v1.engine import core  # noqa: F401  # imported now, for the child
    from vllm.v1.worker import cpu_worker  # noqa: F401

    torch._dynamo.config.disable = True
    ModelRegistry.register_model("Cohere2MoeForCausalLM", Cohere2MoeForCausalLM)
    platform = type(current_platform)
    set_defaults = platform.check_and_update_config

    def set_defaults_and_fork(vllm_config: Any) -> None:
        set_defaults(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = staticmethod(set_defaults_and_fork)


def main() -> None:
    """Watch the parent, then hand over to vLLM."""
    if BACKGROUND_VARIABLE in os.environ:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # threads and processes inherit it
    die_with_parent(int(sys.argv.pop(1)))
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    os.register_at_fork(after_in_child=lambda: die_with_parent(os.getppid()))
    from vllm.entrypoints.launchers.api_server.entry import main as serve
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        fork_the_engine()
    serve()


if __name__ == "__main__":
    main()
