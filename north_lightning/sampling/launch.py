"""The sidecar's main module: vLLM's API server, which ends when the process that started it is gone.

``python -m north_lightning.sampling.launch PARENT_PID <arguments of vLLM's API server>``. It adds nothing to the server but
that watch. The same watch runs in the engine process that vLLM starts (see ``vllm_plugin``).
"""

import os
import signal
import sys
import threading
import time

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


def main() -> None:
    """Watch the parent, then hand over to vLLM."""
    die_with_parent(int(sys.argv.pop(1)))
    os.environ["NORTH_LIGHTNING_SIDECAR"] = str(os.getpid())  # the engine's parent
    try:
        from vllm.entrypoints.launchers.api_server.entry import main as serve
    except ImportError:  # before vLLM 0.30 the server was a script
        import runpy

        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
    else:
        serve()


if __name__ == "__main__":
    main()
