"""Post-training of agentic coding models.

Importing it, before anything loads OpenMP, lets idle threads sleep instead of spin: where cores are shared, a thread
that spins takes the CPU from the one it waits for. ``OMP_WAIT_POLICY`` in the environment wins.
"""

import os

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
