"""Faults on purpose: what a run promises to survive, made to happen where and as often as a test says.

In: a seed and how often what shall fail (``FaultPlan``). Out: a server, a sandbox provider and a verifier that fail so,
and the list of what has struck. The trainer, producer, queue and push that are put to the test are the real ones.

    plan = FaultPlan(Path("faults"), seed=7, rates={"verifier_nan": 0.02, "sandbox_hangs": 0.01})
    verifier = FaultyVerifier(MyVerifier(), plan)                # your plug-in, and what may go wrong with it
    sandboxes = FaultySandboxes(BubblewrapProvider(), plan)      # or NoSandboxes(), where nothing needs to run
    server = FakeVLLM(plan=plan)                                 # in place of vLLM, with the same routes

``FakeSidecar`` takes the place of ``Sidecar`` in a YAML file.
"""

from north_lightning.faults.plan import FaultPlan
from north_lightning.faults.plugins import FaultySandboxes, FaultyVerifier, NoSandboxes
from north_lightning.faults.server import FakeSidecar, FakeVLLM

__all__ = ["FakeSidecar", "FakeVLLM", "FaultPlan", "FaultySandboxes", "FaultyVerifier", "NoSandboxes"]
