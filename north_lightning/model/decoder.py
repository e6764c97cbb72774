"""The decoder: token ids of a packed row in, hidden states out.

In: ``token_ids`` [T] and ``cu_seqlens`` [N + 1]. Out: hidden states [T, D] after the final norm. Logits, their scale
(``config.logit_scale``), probabilities and losses are the business of whoever calls it; the head is
``embedding_weight``. The sampler's choices of experts can be replayed.

Each layer is a parallel block with one norm: ``x + attention(n(x)) + mlp(n(x))``.

Shapes: T tokens, D model, V vocabulary, N documents, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from north_lightning.model.attention import Attention, PackedRow
from north_lightning.model.compute import ComputeConfig
from north_lightning.model.config import NorthConfig
from north_lightning.model.experts import DenseMLP, MoE, Routing


class RMSNorm(nn.Module):
    """Root-mean-square norm; the weight is multiplied in float32, as vLLM does."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        x, weight = x_TD.float(), self.weight.float()
        if x.is_cuda:
            return F.rms_norm(x, weight.shape, weight, self.eps).to(x_TD.dtype)
        return _CPURMSNorm.apply(x, weight, self.eps).to(x_TD.dtype)


class _CPURMSNorm(torch.autograd.Function):
    """torch has no fused RMSNorm for a CPU; its composition of small operations takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        width = x_TD.shape[-1]
        mean_square = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).square_().div_(width)
        scale_T1 = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return torch.mul(x_TD, scale_T1).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """With g = grad * weight and y = x * scale: scale * (g - y * mean(g * y)).

        LayerNorm's fused backward, told that the mean is 0, gives scale * (g - mean(g) - y * mean(g * y)).
        """
        (grad_TD,) = grad_outputs
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_TD.contiguous(),
            x_TD,
            list(weight_D.shape),
            torch.zeros_like(scale_T1),
            scale_T1,
            weight_D,
            None,
            [True, True, False],
        )
        mean_g = torch.mv(grad_TD, weight_D).div_(weight_D.shape[0])
        return grad_x.add_(mean_g[:, None] * scale_T1), grad_weight, None


class LayerNorm(nn.Module):
    """LayerNorm without bias, in float32: the family's norm where ``rms_norm_eps`` is None."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.layer_norm(x_TD.float(), self.weight.shape, self.weight.float(), None, self.eps).to(x_TD.dtype)


def make_norm(config: NorthConfig) -> RMSNorm | LayerNorm:
    if config.rms_norm_eps is not None:
        return RMSNorm(config.hidden_size, config.rms_norm_eps)
    return LayerNorm(config.hidden_size, config.layer_norm_eps)


class DecoderLayer(nn.Module):
    """One parallel block."""

    def __init__(self, config: NorthConfig, layer: int, compute: ComputeConfig | None = None) -> None:
        super().__init__()
        compute = compute or ComputeConfig()
        self.checkpointing = compute.checkpointing
        self.norm = make_norm(config)
        self.attention = Attention(config, layer, compute)
        self.mlp: DenseMLP | MoE
        if config.is_dense(layer):
            assert config.prefix_dense_intermediate_size is not None
            self.mlp = DenseMLP(config.hidden_size, config.prefix_dense_intermediate_size)
        else:
            self.mlp = MoE(config, layer, compute)

    def forward(
        self,
        x_TD: Tensor,
        row: PackedRow,
        routing: list[Routing] | None = None,
        replayed_TLK: Tensor | None = None,
    ) -> Tensor:
        block: Callable[..., tuple[Tensor, list[Routing]]] = self._block
        if self.checkpointing in ("full", "offload"):
            block = recomputed(block)
        is_on_host = self.checkpointing == "offload"
        with save_on_cpu(pin_memory=x_TD.is_cuda) if is_on_host else nullcontext():
            x_TD, decided = block(x_TD, row, routing is not None, replayed_TLK)
        if routing is not None:
            routing.extend(decided)
        return x_TD

    def _block(
        self, x_TD: Tensor, row: PackedRow, record: bool, replayed_TLK: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        normed = self.norm(x_TD)
        mlp = recomputed(self._mlp) if self.checkpointing == "selective" else self._mlp
        mlp_out, decided = mlp(normed, record, replayed_TLK)
        return x_TD + self.attention(normed, row) + mlp_out, decided

    def _mlp(self, normed: Tensor, record: bool, replayed_TLK: Tensor | None) -> tuple[Tensor, list[Routing]]:
        """The MLP branch, and what its router decided if that is wanted: returned, for a block may run twice."""
        decided: list[Routing] = []
        if isinstance(self.mlp, MoE):
            return self.mlp(normed, decided if record else None, replayed_TLK), decided
        return self.mlp(normed), decided


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which keeps its arguments and runs again in the backward pass. (No layer draws random
    numbers, so there is no generator's state to restore.)"""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class NorthModel(nn.Module):
    """A North-shaped mixture-of-experts decoder over packed rows.

    Random weights are normal with standard deviation ``config.initializer_range`` (norms: ones). The family's 0.02 is
    about 1 / sqrt(hidden_size) at the released width; a small model trained from scratch learns faster with
    ``initializer_range`` set to that for its own width.

    Args:
        config: the shape.
        compute: how it is computed; nothing of it is in the weights.
    """

    def __init__(self, config: NorthConfig, compute: ComputeConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, compute) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.reset_parameters()

    @property
    def embedding_weight(self) -> Tensor:
        """[V, D]: input embedding and tied output head."""
        return self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh random weights, from torch's global generator."""
        for parameter in self.parameters():
            self.draw(parameter)

    @torch.no_grad()
    def draw(self, parameter: Tensor) -> None:
        """Fill one whole parameter: norms with ones, matrices with random numbers."""
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, self.config.initializer_range)

    def tokens_held(self, num_tokens: int) -> slice:
        """Which tokens of a row of ``num_tokens`` this process computes: all, unless ``parallel`` shares rows out."""
        return slice(0, num_tokens)

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        routing: list[Routing] | None = None,
        routed_experts: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of a packed row; documents do not see each other and positions restart in each.

        Args:
            token_ids: [T] int64
            cu_seqlens: [N + 1] int32, document boundaries from 0 to T
            routing: an empty list to be filled with one ``Routing`` per sparse layer; None records nothing.
            routed_experts: [T, L, K] integers, experts that another run of the model (the sampler) chose for each token
                in each layer, to be visited again whatever the router says now; the rows of dense layers are not read,
                and where an entry is negative the router chooses. The routers keep their gradient.

        Returns:
            [T, D] after the final norm; of ``tokens_held(T)`` only.

        Raises:
            ValueError: shapes or boundaries that do not fit, or an expert that does not exist.
        """
        if token_ids.dim() != 1 or cu_seqlens.dim() != 1:
            raise ValueError(
                "expected a packed row, token_ids [T] and cu_seqlens [N + 1], "
                f"got {list(token_ids.shape)} and {list(cu_seqlens.shape)}"
            )
        if routed_experts is not None:
            self._check_replay(routed_experts, token_ids.shape[0])
        row = PackedRow.from_cu_seqlens(cu_seqlens, token_ids, self.config)
        held = self.tokens_held(len(token_ids))
        x_TD = self.embedding(token_ids[held])
        replayed = None if routed_experts is None else routed_experts[held]
        for layer in self.layers:
            x_TD = layer(x_TD, row, routing, replayed)
        return self.norm(x_TD)

    def _check_replay(self, routed_experts: Tensor, num_tokens: int) -> None:
        config = self.config
        expected = (num_tokens, config.num_hidden_layers, config.num_experts_per_tok)
        if routed_experts.shape != expected:
            raise ValueError(
                f"routed_experts: expected [tokens, layers, experts per token] = {list(expected)}, "
                f"got {list(routed_experts.shape)}"
            )
        sparse = routed_experts[:, config.num_dense_layers :]
        if sparse.numel() and int(sparse.max()) >= config.num_experts:
            raise ValueError(f"routed_experts: expected ids below {config.num_experts}, got {int(sparse.max())}")
