"""The independent reference of the model's tests: transformers' Cohere2MoeForCausalLM, one document at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cohere2MoeConfig, Cohere2MoeForCausalLM

from north_lightning.model import ComputeConfig, NorthModel, load_checkpoint

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 12,
    "sliding_window_pattern": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "prefix_dense_intermediate_size": 40,
    "prefix_dense_sliding_window_pattern": 1,
    "expert_selection_fn": "sigmoid",
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "logit_scale": 1.0,
    "max_position_embeddings": 4096,
    "eos_token_id": 3,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large weights: every mechanism moves the logits
}


def make_reference(seed: int = 0, **changes: Any) -> Cohere2MoeForCausalLM:
    """A random transformers model; the norms' weights are random too."""
    torch.manual_seed(seed)
    config = Cohere2MoeConfig(**{**TINY, **changes})
    reference = Cohere2MoeForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return reference


def ours_from(
    reference: Cohere2MoeForCausalLM, *, transformers_window: bool = True, compute: ComputeConfig | None = None
) -> NorthModel:
    """Our model with the reference's weights, through a checkpoint that transformers wrote."""
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(Path(directory))
        return load_checkpoint(directory, sliding_window_includes_current=transformers_window, compute=compute)


def random_documents(lengths: Sequence[int], seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> list[Tensor]:
    """Token ids from 1: transformers gives its padding id 0 no input gradient, and no packed row holds padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (length,), generator=generator) for length in lengths]


def packed(documents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    return torch.cat(list(documents)), bounds.to(torch.int32)


def reference_logits(reference: Cohere2MoeForCausalLM, documents: Sequence[Tensor]) -> Tensor:
    """[T, V], every document in a forward pass of its own."""
    return torch.cat([reference(input_ids=document[None], use_cache=False).logits[0] for document in documents])


def our_logits(model: NorthModel, documents: Sequence[Tensor]) -> Tensor:
    """[T, V], all documents in one packed row."""
    hidden = model(*packed(documents))
    return hidden @ model.embedding_weight.T * model.config.logit_scale


def loss_of(logits: Tensor, documents: Sequence[Tensor]) -> Tensor:
    """Mean cross entropy of each next token, counting every document's own."""
    targets = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents])
    return torch.nn.functional.cross_entropy(logits, targets)


def reference_gradients(reference: Cohere2MoeForCausalLM) -> dict[str, Tensor]:
    """By the names on disk: one tensor per expert."""
    gradients = {}
    for name, parameter in reference.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(g.chunk(2) for g in grad):
                prefix = name.replace("gate_up_proj", str(expert))
                gradients[f"{prefix}.gate_proj.weight"] = gate
                gradients[f"{prefix}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(grad):
                gradients[f"{name.replace('down_proj', str(expert))}.down_proj.weight"] = down
        else:
            gradients[name] = grad
    return gradients
