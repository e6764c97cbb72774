"""Queue and producers in Ray actors, so that rollouts are made on several machines. Needs the ``ray`` extra.

    trainer ── take, release ──► queue actor ◄── admit, complete, drop ── producer actors ──► rollout processes

What crosses a machine's border here is bytes that ``wire`` reads without executing anything. Ray itself sends pickled
functions and settings from the trainer to its workers, over ports that are not bound to loopback: whoever holds the
cluster's token may execute code there, so no cluster without token authentication is used (``cluster``).
"""

from north_lightning.rollout.ray.producers import RayProducers, RayRolloutProducer
from north_lightning.rollout.ray.queue import RayQueue

__all__ = ["RayProducers", "RayQueue", "RayRolloutProducer"]
