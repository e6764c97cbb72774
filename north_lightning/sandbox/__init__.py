"""Where commands of a model run: isolated, bounded, and gone afterwards. Imports no torch."""

from north_lightning.sandbox.bubblewrap import BubblewrapProvider, BubblewrapSandbox

__all__ = ["BubblewrapProvider", "BubblewrapSandbox"]
