"""FP8 for the experts, in compressed-tensors' form: which matrices, what is written for them, and back.

In: matrices by Hugging Face's names. Out: float8 matrices and their scales, as llm-compressor writes them for
linearized experts, and the ``quantization_config`` that vLLM reads. Attention, router, embedding, head and dense layers
are left alone. The arithmetic is compressed-tensors'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from north_lightning.errors import ConfigError
from north_lightning.model import NorthConfig
from north_lightning.model.checkpoint import EMBEDDING, hf_shapes
from north_lightning.model.experts import MoE
from north_lightning.model.shards import Entry

FP8 = Literal["fp8", "fp8_block"]
PRESETS = {"fp8": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK"}
BLOCK, FP8_MAX = 128, 448.0
_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")


class Quantization:
    """One of compressed-tensors' presets, applied to the experts."""

    def __init__(self, config: NorthConfig, form: FP8) -> None:
        """``ConfigError`` if compressed-tensors is not installed, or the experts are not made of whole blocks."""
        try:
            library = import_module("compressed_tensors.quantization")
        except ImportError as error:
            raise ConfigError(f"format: {form} needs compressed-tensors: pip install compressed-tensors") from error
        widths = (config.hidden_size, config.intermediate_size)
        if form == "fp8_block" and any(width % BLOCK for width in widths):
            raise ConfigError(f"format: fp8_block needs experts in multiples of {BLOCK}, got {widths}: take fp8")
        self._library, self._model_config = library, config
        self._scheme = library.preset_name_to_scheme(PRESETS[form], ["Linear"])
        self._scheme.format = "float-quantized"
        self._is_blocks = form == "fp8_block"

    def covers(self, name: str) -> bool:
        """Whether the tensor of this name is quantized."""
        return _EXPERT.fullmatch(name) is not None

    def entries(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[Entry]:
        """What is written for tensors of these names and shapes, those that are not quantized in ``dtype``."""
        for name, shape in shapes.items():
            if self.covers(name):
                rows, columns = shape
                yield Entry(name, torch.float8_e4m3fn, shape)
                scales = (rows // BLOCK, columns // BLOCK) if self._is_blocks else (rows, 1)
                yield Entry(f"{name}_scale", dtype, scales)
            else:
                yield Entry(name, dtype, shape)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Float8 matrix, and scales in the weight's dtype: bit for bit what the library's compressor gives, which takes
        three times as long because it rounds twice."""
        blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)) if self._is_blocks else weight
        dims = (1, 3) if self._is_blocks else (1,)
        low, high = (extreme(blocks, dim=dims, keepdim=True) for extreme in (torch.amin, torch.amax))
        scale, _ = self._library.utils.calculate_qparams(low, high, self._scheme.weights)
        rounded = (blocks / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return rounded.view_as(weight), scale.squeeze(dims) if self._is_blocks else scale

    def dequantize(self, quantized: Tensor, scale: Tensor) -> Tensor:
        """The matrix that the server computes with, in float32."""
        return self._library.dequantize(quantized, scale.float(), args=self._scheme.weights, dtype=torch.float32)

    def round_inputs(self, moe: MoE) -> None:
        """Have experts round their inputs to float8, token by token, as the server does; in place."""
        moe.mix = partial(self._mix, moe)  # type: ignore[method-assign]

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json: all matrices but the experts' are named as ignored."""
        ignored = [
            name.removesuffix(".weight")
            for name, shape in hf_shapes(self._model_config).items()
            if len(shape) == 2 and name != EMBEDDING and not self.covers(name)
        ]
        written = self._library.QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format="float-quantized",
            quantization_status="compressed",
            ignore=[*ignored, "lm_head"],
        )
        return dict(written.model_dump(mode="json"))

    def _mix(self, moe: MoE, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        out = torch.zeros_like(x_TD)
        for expert in expert_ids_TK.unique().tolist():
            tokens, choice = (expert_ids_TK == expert).nonzero(as_tuple=True)
            gate, up = F.linear(self._rounded(x_TD[tokens]), moe.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(self._rounded(F.silu(gate) * up), moe.down_proj[expert])
            out.index_add_(0, tokens, y * weights_TK[tokens, choice, None])
        return out

    def _rounded(self, x: Tensor) -> Tensor:
        """[T, I] in float8 and back."""
        arguments = self._scheme.input_activations
        x = x[None]  # compressed-tensors counts tokens in two dimensions
        scale, zero_point = self._library.utils.compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity())
        return self._library.fake_quantize(x, scale, zero_point, arguments)[0]
