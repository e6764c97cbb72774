"""The part of a weight push that runs inside vLLM: read safetensors files, load them, prove that nothing was missed.

Comes in: paths (to files in memory) that together hold every tensor of the model under its Hugging Face name. Goes
out: the running model with those weights, packed the way this device's kernels want them. It moves no bytes over a
network and knows no versions.

Every update is complete or it fails: a layer that did not receive all of its weights raises, and the next update starts
from a clean slate, whatever the failed one left behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """A part of the model: ``path`` of a safetensors file."""

    path: str


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads files through vLLM's layer-wise reload."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Forget a failed update and make every layer ready to be loaded again."""
        self._discard_unfinished_update()
        for module in self.model.modules():
            # The CPU experts are packed when their kernel is built, and only then: with the kernel kept, new weights
            # stay in the checkpoint's layout and are read in the packed one. Without it, they are packed again.
            method = getattr(module, "quant_method", None)
            if method is not None and hasattr(method, "moe_kernel"):
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Load the file. The base class's version synchronises an accelerator, which a CPU build refuses."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load every tensor of the file; ``ValueError`` if one does not fit."""
        with safe_open(update_info.path, "pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        """Close the reload: attention layers are processed here, after all others. ``ValueError`` if a layer did not
        get all of its weights; the update then stays open."""
        missing = self._unloaded_layers()
        if missing:
            raise ValueError(f"weights are missing for {len(missing)} layers, among them {', '.join(missing[:4])}")
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""

    def _unloaded_layers(self) -> list[str]:
        """Layers with weights in the checkpoint that this update has not filled.

        An embedding holds padding rows that no checkpoint has; it arrives as one tensor, or not at all.
        """
        return [
            name
            for name, layer in self.model.named_modules()
            if (info := get_layerwise_info(layer)).can_load()
            and info.load_numel < (1 if isinstance(layer, VocabParallelEmbedding) else info.load_numel_total)
            and not is_deferred_attention_layer(layer)
            and any(True for _ in layer.parameters(recurse=False))
        ]

    def _discard_unfinished_update(self) -> None:
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                _place_kernel_tensors(layer, info)
                info.reset()
