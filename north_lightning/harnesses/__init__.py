"""Agent loops: the prompt and tools a model sees, what its calls do in a sandbox, and when an attempt ends."""

from north_lightning.harnesses.react_terminal import ReActTerminalHarness
from north_lightning.harnesses.swe_agent import SWEAgentHarness
from north_lightning.harnesses.variation import HarnessVariation, VariedHarness

__all__ = ["HarnessVariation", "ReActTerminalHarness", "SWEAgentHarness", "VariedHarness"]
