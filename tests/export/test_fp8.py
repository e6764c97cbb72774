"""FP8 releases against compressed-tensors' own model compressor and vLLM's own loader."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from hypothesis import given
from hypothesis import strategies as st
from releases import SERVABLE, tensors_of
from torch import nn

from north_lightning import cli
from north_lightning.export.command import export_checkpoint
from north_lightning.export.quantization import Quantization
from north_lightning.model import NorthConfig

FORMS = {"fp8": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK"}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(form: str, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue("checkpoint" if form == "fp8" else "checkpoint_in_blocks")
    return folder


@pytest.fixture
def release(form: str, source: Path, unserved: None, tmp_path: Path) -> Path:
    export_checkpoint(source, tmp_path / "out", format=form)  # type: ignore[arg-type]
    return tmp_path / "out"


class Linearized(nn.Module):
    """Modules named as the tensors of a checkpoint: what llm-compressor makes of this architecture to quantize it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last, _ = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if tensor.dim() == 2 and last != "embed_tokens":
                linear = nn.Linear(*reversed(tensor.shape), bias=False, dtype=tensor.dtype)
                linear.weight.data = tensor
                module.add_module(last, linear)


def compressed_by_the_library(tensors: dict[str, torch.Tensor], preset: str) -> dict[str, torch.Tensor]:
    """The quantized experts, by compressed-tensors' own way through a model."""
    model = Linearized(tensors)
    scheme = preset_name_to_scheme(preset, [r"re:.*\.mlp\.experts\.\d+\..*_proj$"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="float-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            size = 128 if preset == "FP8_BLOCK" else module.weight.shape[1]
            rows = 128 if preset == "FP8_BLOCK" else 1
            largest = module.weight.abs().unflatten(1, (-1, size)).unflatten(0, (-1, rows)).amax(dim=(1, 3))
            module.weight_scale.data = (largest / 448.0).to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="float-quantized")
    assert compressor is not None
    compressor.compress_model(model)
    return {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}


def test_experts_are_what_the_library_makes_of_them_bit_for_bit(form: str, source: Path, release: Path) -> None:
    expected = compressed_by_the_library(tensors_of(source), FORMS[form])
    written = tensors_of(release)
    experts = {name: tensor for name, tensor in written.items() if ".experts." in name}
    assert experts.keys() == expected.keys()
    for name, tensor in experts.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    before = tensors_of(source)
    for name in written.keys() - experts.keys():
        assert torch.equal(written[name], before[name]), name
    assert before.keys() == {name for name in written if not name.endswith("_scale")}


def test_no_weight_moves_by_more_than_half_a_step(form: str, source: Path, release: Path) -> None:
    before, written = tensors_of(source), tensors_of(release)
    for name in (name for name in before if ".experts." in name):
        weight, scale = before[name].float(), written[f"{name}_scale"].float()
        size = 128 if form == "fp8_block" else 1
        scales = scale.repeat_interleave(size, 0)
        scales = scales.repeat_interleave(128, 1) if form == "fp8_block" else scales
        error = (written[name].float() * scales - weight).abs()
        assert (error <= torch.maximum(weight.abs() * 2**-4, scales * 2**-10)).all(), name


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-4, 1.0, 1e4]))
def test_any_matrix_comes_back_within_the_rounding(seed: int, size: float) -> None:
    config = NorthConfig.from_hf(SERVABLE | {"eos_token_id": 7})
    weight = (torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    weight[2] = 0
    quantization = Quantization(config, "fp8")
    quantized, scale = quantization.quantize(weight)
    error = (quantization.dequantize(quantized, scale) - weight.float()).abs()
    assert (error <= torch.maximum(weight.float().abs() * 2**-4, scale.float() * 2**-10)).all()


def test_shapes_that_are_no_whole_blocks_are_refused_with_a_way_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", f"--checkpoint={checkpoint}", f"--directory={tmp_path / 'out'}", "--format=fp8_block"]
    assert cli.main(arguments) == 1
    assert "format: fp8_block needs experts in multiples of 128, got (64, 32): take fp8" in capsys.readouterr().err


def test_the_report_names_how_far_fp8_is_from_the_checkpoint(release: Path) -> None:
    check = json.loads((release / "release.json").read_text())["check"]
    assert 0 < check["kl"] < 0.05
    assert 0.5 < check["top1"] <= 1.0
    assert 0 < check["logprob_difference"] < check["largest_logprob_difference"]


# ---- vLLM's loader ---------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm_in_this_process() -> Iterator[None]:
    """Takes back what vLLM does to the process: its process groups, and variables of the environment."""
    pytest.importorskip("vllm")
    before = dict(os.environ)
    yield
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.vllm
@pytest.mark.usefixtures("vllm_in_this_process")
def test_vllm_loads_every_tensor_of_an_fp8_release(
    form: str, release: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real model class and loader; only the choice of a kernel, of which this machine has none, is left out."""
    model, loaded = load_with_vllm(release, monkeypatch)
    assert loaded >= {name for name, _ in model.named_parameters() if ".self_attn.attn." not in name}  # of the cache
    written = tensors_of(release)
    for index, layer in enumerate(model.model.layers):
        assert layer.self_attn.qkv_proj.weight.dtype == torch.bfloat16
        if index == 0:
            assert layer.mlp.gate_up_proj.weight.dtype == torch.bfloat16
            continue
        assert layer.mlp.gate.weight.dtype in (torch.bfloat16, torch.float32)
        experts = dict(layer.mlp.experts.named_parameters())
        (w13, w2, w13_scale, w2_scale) = (
            next(value for name, value in experts.items() if name.endswith(suffix))
            for suffix in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
        )
        for expert in range(len(w2)):
            parts = [f"model.layers.{index}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
            gate, up, down = (written[name] for name in parts)
            assert torch.equal(w13[expert].float(), torch.cat([gate, up]).float())
            assert torch.equal(w2[expert].float(), down.float())
            gate, up, down = (written[f"{name}_scale"].float() for name in parts)
            assert torch.equal(w13_scale[expert], torch.cat([gate, up]))
            assert torch.equal(w2_scale[expert], down)


def load_with_vllm(release: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, set[str]]:
    """vLLM's model with the weights of ``release``, and the names that its loader has filled."""
    from safetensors import safe_open
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as moe,
    )
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    monkeypatch.setattr(moe, "select_fp8_moe_backend", lambda **_: (SimpleNamespace(value="none"), None))
    config = EngineArgs(model=str(release), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        model: Any = initialize_model(config)
        tensors = [
            (name, file.get_tensor(name))
            for path in sorted(release.glob("*.safetensors"))
            for file in [safe_open(path, "pt")]
            for name in file.keys()  # noqa: SIM118
        ]
        return model, set(model.load_weights(tensors))
