"""Each mistake that ports of this architecture made, made on purpose: the logits must move away from transformers'."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers_reference import make_reference, our_logits, ours_from, random_documents, reference_logits

from north_lightning.errors import CheckpointError
from north_lightning.model import NorthModel, attention, block_attention, decoder, experts, load_checkpoint

LENGTHS = [50, 7, 80]  # two of them longer than the window of 12


def with_config(**changes: Any) -> Callable[[NorthModel, pytest.MonkeyPatch], NorthModel]:
    def mutate(model: NorthModel, _: pytest.MonkeyPatch) -> NorthModel:
        mutant = NorthModel(replace(model.config, **changes))
        mutant.load_state_dict(model.state_dict())
        return mutant

    return mutate


def with_rope(layer: int, uses_rope: bool) -> Callable[[NorthModel, pytest.MonkeyPatch], NorthModel]:
    def mutate(model: NorthModel, _: pytest.MonkeyPatch) -> NorthModel:
        assert model.layers[layer].attention.uses_rope is not uses_rope
        model.layers[layer].attention.uses_rope = uses_rope
        return model

    return mutate


def rope_on_halves(model: NorthModel, monkeypatch: pytest.MonkeyPatch) -> NorthModel:
    """(x[i], x[i + C / 2]) instead of (x[2i], x[2i + 1])."""

    def rotate(qkv, plan, rotations):
        qk = qkv[:, : plan.num_heads + plan.num_kv_heads]
        first, second = qk.chunk(2, -1)
        rotated = torch.complex(first.clone(), second.clone()) * rotations
        qk.copy_(torch.cat([rotated.real, rotated.imag], -1))

    monkeypatch.setattr(block_attention, "_rotate_", rotate)
    return model


def no_document_mask(model: NorthModel, monkeypatch: pytest.MonkeyPatch) -> NorthModel:
    """Positions restart, but attention runs through the row."""

    def one_document(lengths, *args):
        return block_attention.plan_blocks([sum(lengths)], *args)

    monkeypatch.setattr(attention, "plan_blocks", one_document)
    return model


def positions_run_on(model: NorthModel, monkeypatch: pytest.MonkeyPatch) -> NorthModel:
    """RoPE is relative: running positions alone change nothing, restarting ones in the middle of a document do."""
    original = attention.PackedRow.from_cu_seqlens

    def restart_in_the_middle(cu_seqlens, token_ids, config):
        row = original(cu_seqlens, token_ids, config)
        wrong = original(torch.tensor([0, LENGTHS[0] // 2, len(token_ids)], dtype=torch.int32), token_ids, config)
        row.rotations = wrong.rotations
        return row

    monkeypatch.setattr(decoder.PackedRow, "from_cu_seqlens", restart_in_the_middle)
    return model


def sequential_block(model: NorthModel, monkeypatch: pytest.MonkeyPatch) -> NorthModel:
    """x + attention(n(x)), then + mlp(n(that))."""

    def forward(self, x, row, *routing):
        x = x + self.attention(self.norm(x), row)
        return x + self.mlp(self.norm(x))

    monkeypatch.setattr(decoder.DecoderLayer, "forward", forward)
    return model


def softmax_router(model: NorthModel, monkeypatch: pytest.MonkeyPatch) -> NorthModel:
    def forward(self, x, *routed):
        logits = torch.nn.functional.linear(x, self.weight)
        best, expert_ids = logits.topk(self.num_experts_per_tok)
        return logits, best.softmax(-1), expert_ids

    monkeypatch.setattr(experts.Router, "forward", forward)
    return model


def swapped_gate_and_up(model: NorthModel, _: pytest.MonkeyPatch) -> NorthModel:
    with torch.no_grad():
        weight = model.layers[2].mlp.gate_up_proj
        weight.copy_(torch.cat(weight.chunk(2, 1)[::-1], 1))
    return model


MISTAKES = {
    "LayerNorm instead of RMSNorm": with_config(rms_norm_eps=None),
    "RoPE on a NoPE layer": with_rope(4, True),
    "dense layer without RoPE": with_rope(0, False),
    "sliding layer without RoPE": with_rope(1, False),
    "window one key too long": with_config(sliding_window_includes_current=False),
    "window one key too short": with_config(sliding_window=11),
    "no window": with_config(sliding_window=4096),
    "router weights renormalised": with_config(norm_topk_prob=True),
    "softmax instead of sigmoid router": softmax_router,
    "RoPE on halves instead of interleaved pairs": rope_on_halves,
    "another RoPE base": with_config(rope_theta=10000.0),
    "no document mask": no_document_mask,
    "positions restart in the middle of a document": positions_run_on,
    "sequential instead of parallel block": sequential_block,
    "gate and up swapped": swapped_gate_and_up,
    "no logit scale": with_config(logit_scale=1.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_port_mistake_is_visible_in_the_logits(mistake, monkeypatch):
    reference = make_reference(logit_scale=0.5)
    documents = random_documents(LENGTHS)
    with torch.no_grad():
        expected = reference_logits(reference, documents)
        model = ours_from(reference)
        assert (our_logits(model, documents) - expected).abs().max() < 1e-5
        mutant = MISTAKES[mistake](model, monkeypatch)
        assert (our_logits(mutant, documents) - expected).abs().max() > 1e-2


def test_rms_norm_instead_of_layer_norm_is_visible_in_the_logits():
    reference = make_reference(rms_norm_eps=None)
    documents = random_documents(LENGTHS)
    with torch.no_grad():
        expected = reference_logits(reference, documents)
        model = ours_from(reference)
        assert (our_logits(model, documents) - expected).abs().max() < 1e-5
        for layer in [*model.layers, model]:
            weight = layer.norm.weight
            layer.norm = decoder.RMSNorm(model.config.hidden_size, 1e-5)
            layer.norm.weight.copy_(weight)
        assert (our_logits(model, documents) - expected).abs().max() > 1e-2


def test_a_dense_layer_read_as_sparse_does_not_load(tmp_path):
    reference = make_reference()
    reference.save_pretrained(tmp_path)
    config = reference.config.to_dict() | {"mlp_layer_types": ["sparse"] * 5, "model_type": "cohere2_moe"}
    (tmp_path / "config.json").write_text(__import__("json").dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.gate\.weight.* missing"):
        load_checkpoint(tmp_path)
