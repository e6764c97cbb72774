"""Where commands of a model run: isolated, bounded, and gone afterwards. Imports no torch."""

from north_lightning.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox
from north_lightning.sandbox.docker import DockerProvider, DockerSandbox
from north_lightning.sandbox.harbor import HarborProvider
from north_lightning.sandbox.shell import Shell
from north_lightning.sandbox.terminal import Terminal, TerminalClosedError

__all__ = [
    "BubblewrapProvider",
    "BubblewrapSandbox",
    "DockerProvider",
    "DockerSandbox",
    "HarborProvider",
    "Shell",
    "Terminal",
    "TerminalClosedError",
]
