"""One gradient norm over parameters that are cut in different ways, and clipping to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from north_lightning.parallel.mesh import num_copies


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for any mixture of plain tensors and ``DTensor``s on different meshes.

    Each process adds up the squares of the parts it holds, divided by the number of processes that hold the same part;
    one sum over all processes gives the square of the norm. A tensor that is not distributed counts as equal
    everywhere. Every process has to call, with parameters of which all processes together hold every part.

    Returns:
        The norm before clipping, a scalar in float32, equal on all processes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        norm = torch.nn.utils.get_total_norm(gradients)
        local = gradients
    else:
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        norms = torch._foreach_norm(local, dtype=torch.float32)  # one kernel for all
        shares = [norm.square() / num_copies(gradient) for norm, gradient in zip(norms, gradients, strict=True)]
        square = torch.stack(shares).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
