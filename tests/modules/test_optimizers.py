"""The optimizers that the README names: bytes per parameter, and steps that follow torch's AdamW in float32."""

import importlib

import pytest
import torch
from torch import Tensor

from north_lightning.modules import WarmupSchedule

pytest.importorskip("torchao")

RECIPES = {  # bytes per parameter, gradient included: (class, its arguments, type of the parameters)
    16.0: ("torch.optim.AdamW", {"fused": True}, torch.float32),
    12.0: ("north_lightning.modules.low_precision_adamw.AdamWBF16Moments", {}, torch.float32),
    10.1: ("torchao.optim.AdamW8bit", {}, torch.float32),
    8.0: ("torchao.optim._AdamW", {"bf16_stochastic_round": True}, torch.bfloat16),
    6.1: ("torchao.optim.AdamW8bit", {"bf16_stochastic_round": True}, torch.bfloat16),
}


def stored_bytes(tensor: Tensor) -> int:
    """Of a quantized tensor: of all its parts. Numbers of a parameter as a whole (the step) count nothing."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes if tensor.dim() else 0


def make(recipe: float, parameter: Tensor) -> torch.optim.Optimizer:
    path, arguments, _ = RECIPES[recipe]
    module, name = path.rsplit(".", 1)
    optimizer = getattr(importlib.import_module(module), name)
    return optimizer([parameter], lr=5e-2, betas=(0.9, 0.95), weight_decay=0.0, **arguments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_per_parameter_are_as_promised_and_steps_follow_adamw(recipe: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 1024).to(RECIPES[recipe][2])
    parameter = torch.nn.Parameter(start.clone())
    expected = torch.nn.Parameter(start.float().clone())
    optimizer, reference = (
        make(recipe, parameter),
        torch.optim.AdamW([expected], lr=5e-2, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [WarmupSchedule(each, warmup_steps=2) for each in (optimizer, reference)]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step; its arithmetic is the same without
        for _ in range(5):
            expected.grad = torch.randn(64, 1024)
            parameter.grad = expected.grad.to(parameter.dtype)
            for each in (optimizer, reference, *schedules):
                each.step()
    state = sum(stored_bytes(value) for value in optimizer.state[parameter].values())
    per_parameter = (parameter.nbytes + parameter.grad.nbytes + state) / parameter.numel()
    assert per_parameter == pytest.approx(recipe, abs=0.05)
    moved, should_move = (p.detach().float() - start.float() for p in (parameter, expected))
    assert (moved - should_move).norm() < 0.15 * should_move.norm()


def test_moments_that_bfloat16_would_freeze_are_refused() -> None:
    from north_lightning.modules.low_precision_adamw import AdamWBF16Moments

    with pytest.raises(ValueError, match="betas: expected at most 1 - 1/256"):
        AdamWBF16Moments([torch.nn.Parameter(torch.zeros(4))], betas=(0.9, 0.999))


def test_the_planner_knows_the_bytes_of_bfloat16_moments() -> None:
    from north_lightning.model.precision import MOMENT_BYTES, MOMENTS

    assert MOMENT_BYTES[MOMENTS["AdamWBF16Moments"] or ""] == 12.0 - 4 - 4
