"""Agent loops: the prompt and tools a model sees, what its calls do in a sandbox, and when an attempt ends."""

from north_lightning.harnesses.mini_swe_agent import MiniSWEAgentHarness
from north_lightning.harnesses.opencode import OpenCodeHarness
from north_lightning.harnesses.react_terminal import ReActTerminalHarness
from north_lightning.harnesses.single_answer import SingleAnswerHarness
from north_lightning.harnesses.swe_agent import SWEAgentHarness
from north_lightning.harnesses.terminus2 import Terminus2Harness
from north_lightning.harnesses.translation import HarnessTranslation
from north_lightning.harnesses.variation import HarnessVariation, VariedHarness

__all__ = [
    "HarnessTranslation",
    "HarnessVariation",
    "MiniSWEAgentHarness",
    "OpenCodeHarness",
    "ReActTerminalHarness",
    "SWEAgentHarness",
    "SingleAnswerHarness",
    "Terminus2Harness",
    "VariedHarness",
]
