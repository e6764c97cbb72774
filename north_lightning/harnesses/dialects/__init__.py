"""How each harness says what ``actions`` are: one file per harness."""

from __future__ import annotations

from north_lightning.errors import RetellingError
from north_lightning.harnesses.actions import Dialect
from north_lightning.harnesses.dialects.mini_swe_agent import MiniSWEAgent
from north_lightning.harnesses.dialects.opencode import OpenCode
from north_lightning.harnesses.dialects.react_terminal import ReActTerminal
from north_lightning.harnesses.dialects.swe_agent import SWEAgent
from north_lightning.harnesses.dialects.terminus2 import Terminus2
from north_lightning.harnesses.mini_swe_agent import MiniSWEAgentHarness
from north_lightning.harnesses.opencode import OpenCodeHarness
from north_lightning.harnesses.react_terminal import ReActTerminalHarness
from north_lightning.harnesses.swe_agent import SWEAgentHarness
from north_lightning.harnesses.terminus2 import Terminus2Harness

DIALECTS: dict[str, Dialect] = {
    SWEAgentHarness.name: SWEAgent(),
    OpenCodeHarness.name: OpenCode(),
    MiniSWEAgentHarness.name: MiniSWEAgent(),
    ReActTerminalHarness.name: ReActTerminal(),
    Terminus2Harness.name: Terminus2(),
}


def dialect_of(harness_name: str) -> Dialect:
    """The words of a harness, by its name; ``RetellingError`` for one that is not known."""
    if harness_name not in DIALECTS:
        raise RetellingError("unknown_harness", f"expected one of {', '.join(DIALECTS)}, got {harness_name!r}")
    return DIALECTS[harness_name]
