"""FP8 releases against what llm-compressor has written for the same checkpoint, bit for bit (``llm_compressor.py``)."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Literal

import pytest
import torch
from releases import recorded_checkpoint, tensors_of

from north_lightning.export.command import export_checkpoint

RECORDED = json.loads((Path(__file__).parent / "llm_compressor.json").read_text())


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {sha256(content).hexdigest()[:16]}"


@pytest.mark.parametrize("form", ["fp8", "fp8_block"])
def test_llm_compressor_writes_the_same(form: Literal["fp8", "fp8_block"], inputs: Path, tmp_path: Path) -> None:
    source = recorded_checkpoint(inputs, tmp_path / "source")
    assert {name: digest(tensor) for name, tensor in tensors_of(source).items()} == RECORDED["source"]
    export_checkpoint(source, tmp_path / "out", format=form, check=False)
    assert {name: digest(tensor) for name, tensor in tensors_of(tmp_path / "out").items()} == RECORDED[form]
    theirs = RECORDED[f"{form}_config"]
    ours = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for key in ("format", "quant_method", "quantization_status"):
        assert ours[key] == theirs[key], key
    (group,), (their_group,) = ours["config_groups"].values(), theirs["config_groups"].values()
    for key in ("weights", "input_activations"):
        expected = {name: value for name, value in their_group[key].items() if name != "observer"}  # of calibration
        assert {name: group[key][name] for name in expected} == expected, key
