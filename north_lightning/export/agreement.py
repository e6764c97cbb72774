"""Whether a release is the model that it was made from: weight for weight, and in what it says.

In: a checkpoint's weights, the release written from them, and rows of tokens. Out: how far their log-probabilities are
apart, or a ``CheckpointError``. Both models are computed in float32 and one layer at a time, so that the largest needs
the memory of two layers.

Shapes: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from north_lightning.errors import CheckpointError
from north_lightning.export.quantization import Quantization
from north_lightning.export.serving import served_logprobs, why_not_served
from north_lightning.export.weights import Weights, weights_of_folder
from north_lightning.model import NorthConfig, NorthModel
from north_lightning.model.attention import PackedRow
from north_lightning.model.checkpoint import hf_parts
from north_lightning.model.decoder import DecoderLayer
from north_lightning.model.experts import MoE
from north_lightning.untrusted import read_json

CHUNK_TOKENS = 256  # whose distributions over the vocabulary are in memory at a time
MAX_SERVED_DIFFERENCE = 0.05
"""Largest mean difference of a served token's log-probability, in nats; bfloat16 arithmetic stays well below."""


def check_release(
    source: Weights,
    release: Path,
    dtype: torch.dtype,
    quantization: Quantization | None,
    rows: Sequence[Sequence[int]],
    max_kl: float,
) -> dict[str, Any]:
    """Reload ``release``, compare it with ``source`` on ``rows``, serve it if possible, and say what came out.

    Raises:
        CheckpointError: a weight is not what it has to be, or the models disagree.
    """
    hf_config = read_json(release / "config.json", CheckpointError)
    hf_config.pop("quantization_config", None)
    config = NorthConfig.from_hf(hf_config)
    assert config == source.config, "config.json does not say what was written"
    reloaded = weights_of_folder(release, config, quantization)
    measured, logprobs = _compare(source, reloaded, dtype, quantization, rows)
    print(
        f"check: every weight is as it has to be; {measured['tokens']} tokens: KL {measured['kl']:.2g} nats, "
        f"same best token {measured['top1']:.2%}, log-probabilities {measured['logprob_difference']:.2g} apart"
    )
    if not measured["kl"] <= max_kl:
        raise CheckpointError(
            f"the release differs from the checkpoint: expected a KL of at most {max_kl:g} nats per token, got "
            f"{measured['kl']:.3g}; if that is good enough for you, set max_kl"
        )
    if (reason := why_not_served(release, config, quantization is not None)) is not None:
        print(f"check: not served: {reason}")
        return measured | {"served_logprob_difference": None, "not_served": reason}
    served = torch.tensor([value for row in served_logprobs(release, rows) for value in row[1:]])
    difference = float((served - logprobs).abs().mean())
    print(f"check: served by vLLM, log-probabilities {difference:.2g} apart")
    if not difference <= MAX_SERVED_DIFFERENCE:
        raise CheckpointError(
            "the served release differs from the checkpoint: expected log-probabilities at most "
            f"{MAX_SERVED_DIFFERENCE:g} apart on average, got {difference:.3g}"
        )
    return measured | {"served_logprob_difference": difference, "not_served": None}


@torch.no_grad()
def _compare(
    source: Weights,
    release: Weights,
    dtype: torch.dtype,
    quantization: Quantization | None,
    rows: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], Tensor]:
    """What is measured, and the checkpoint's log-probability of every token but each row's first."""
    config = source.config
    ids = torch.tensor([token for row in rows for token in row])
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    packed = PackedRow.from_cu_seqlens(bounds, ids, config)
    with torch.device("meta"):
        models = [NorthModel(config), NorthModel(config)]
    hidden: list[Tensor] = []
    tensors = zip(hf_parts(config), source.tensors(), release.tensors(), strict=True)
    for name, group in groupby(tensors, key=lambda part: part[0][1].partition(".weight")[0].split(".")[:2]):
        modules = [model.get_submodule(".".join(name)).to_empty(device="cpu") for model in models]
        for (hf_name, parameter, index), (_, tensor), (_, written) in group:
            _check_weight(hf_name, tensor, written, dtype, quantization)
            for model, part in zip(models, (tensor, written), strict=True):
                attrgetter(parameter)(model)[index].copy_(part)
            source.forget(tensor)
        if name == ["embedding"]:
            hidden = [module(ids) for module in modules]
        elif name == ["norm"]:
            hidden = [norm(x_TD) for norm, x_TD in zip(modules, hidden, strict=True)]
        else:
            layer = modules[1]
            assert isinstance(layer, DecoderLayer)
            if quantization is not None and isinstance(layer.mlp, MoE):
                quantization.round_inputs(layer.mlp)
            hidden = [layer(x_TD, packed) for layer, x_TD in zip(modules, hidden, strict=True)]
            for layer in modules:
                layer.to("meta")

    is_last = torch.zeros(len(ids), dtype=torch.bool)
    is_last[bounds[1:].long() - 1] = True
    chunks = [x[~is_last].split(CHUNK_TOKENS) for x in (ids.roll(-1), *hidden)]
    kl, same, logprobs = [], [], []
    for target, *states in zip(*chunks, strict=True):
        p, q = (
            (F.linear(x_TD, model.embedding_weight) * config.logit_scale).log_softmax(-1)
            for x_TD, model in zip(states, models, strict=True)
        )
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        logprobs.append(torch.stack([table.gather(1, target[:, None])[:, 0] for table in (p, q)]))
    ours, theirs = torch.cat(logprobs, 1)
    apart = (ours - theirs).abs()
    measured = {
        "tokens": len(ours),
        "kl": float(torch.cat(kl).mean()),
        "top1": float(torch.cat(same).float().mean()),
        "logprob_difference": float(apart.mean()),
        "largest_logprob_difference": float(apart.max()),
    }
    return measured, ours


def _check_weight(
    name: str, tensor: Tensor, written: Tensor, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    """``CheckpointError`` if ``written`` is not ``tensor`` of the checkpoint as the release has to hold it."""
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name}: expected finite numbers in the checkpoint")
    expected = tensor.to(dtype)
    if quantization is not None and quantization.covers(name):
        expected = quantization.dequantize(*quantization.quantize(expected))
    if not torch.equal(expected, written):
        raise CheckpointError(f"{name}: read back as another than was written: the disk, or its driver, is at fault")
