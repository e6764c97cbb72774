"""Rollouts: from tasks to groups with rewards and advantages, and the queue between sampling and training."""

from north_lightning.rollout.advantages import rloo_advantages
from north_lightning.rollout.attempt import Policy, Script, ScriptedPolicy, record_scripted, script_of_calls
from north_lightning.rollout.chat_policy import ChatServer
from north_lightning.rollout.curriculum import PassRateCurriculum
from north_lightning.rollout.producer import FailurePolicy, ProducerSpec, RolloutProducer
from north_lightning.rollout.queue import WindowedFIFOQueue
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.rollout.schedule import TaskSchedule
from north_lightning.rollout.stages import Timeouts

__all__ = [
    "ChatServer",
    "FailurePolicy",
    "PassRateCurriculum",
    "Policy",
    "ProducerSpec",
    "RolloutProducer",
    "RolloutRunner",
    "Script",
    "ScriptedPolicy",
    "TaskSchedule",
    "Timeouts",
    "WindowedFIFOQueue",
    "record_scripted",
    "rloo_advantages",
    "script_of_calls",
]
