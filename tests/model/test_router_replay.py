"""Router replay against transformers with the same choices forced on its routers: outputs and every gradient."""

import types

import pytest
import torch
from torch.nn import functional as F
from transformers_reference import (
    TINY,
    loss_of,
    make_reference,
    ours_from,
    packed,
    random_documents,
    reference_gradients,
    reference_logits,
)

from north_lightning.model import NorthConfig, NorthModel, Routing, named_hf_tensors

LENGTHS = [50, 7, 30]
NUM_LAYERS, NUM_EXPERTS, TOP_K = TINY["num_hidden_layers"], TINY["num_experts"], TINY["num_experts_per_tok"]


def random_choices(num_tokens: int) -> torch.Tensor:
    """[T, L, K] distinct experts, nothing to do with any router."""
    scores = torch.rand(num_tokens, NUM_LAYERS, NUM_EXPERTS, generator=torch.Generator().manual_seed(3))
    return scores.topk(TOP_K, -1).indices


def force_choices(reference, choices: torch.Tensor) -> None:
    """Make transformers' routers choose ``choices`` [T, L, K], one document after the other."""

    def forward(self, hidden_states):
        chosen = self.left[: len(hidden_states)]
        self.left = self.left[len(hidden_states) :]
        logits = F.linear(hidden_states, self.weight)
        scores = logits.gather(1, chosen).sigmoid()
        if self.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores, chosen

    for index, layer in enumerate(reference.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.left = choices[:, index]
            layer.mlp.gate.forward = types.MethodType(forward, layer.mlp.gate)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_replayed_choices_give_transformers_logits_and_gradients(norm_topk_prob, dtype):
    reference = make_reference(norm_topk_prob=norm_topk_prob)
    model, documents = ours_from(reference), random_documents(LENGTHS)
    choices = random_choices(sum(LENGTHS))
    force_choices(reference, choices)
    expected = reference_logits(reference, documents)
    actual = model(*packed(documents), routed_experts=choices.to(dtype)) @ model.embedding_weight.T
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    loss_of(expected, documents).backward()
    loss_of(actual, documents).backward()
    expected_gradients = reference_gradients(reference)
    for (name, _), gradient in zip(named_hf_tensors(model), our_gradients(model), strict=True):
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-5, msg=name)
        if name.endswith("mlp.gate.weight"):
            assert gradient.abs().max() > 1e-5, f"{name}: the router has lost its gradient"


def our_gradients(model: NorthModel) -> list[torch.Tensor]:
    holder = NorthModel(model.config)
    with torch.no_grad():
        for copy, parameter in zip(holder.parameters(), model.parameters(), strict=True):
            copy.copy_(parameter.grad)
    return [tensor for _, tensor in named_hf_tensors(holder)]


def test_replaying_the_routers_own_choices_changes_nothing():
    model, documents = ours_from(make_reference()), random_documents(LENGTHS)
    routing: list[Routing] = []
    expected = model(*packed(documents), routing)
    choices = torch.full((sum(LENGTHS), NUM_LAYERS, TOP_K), -1)
    for layer in routing:
        choices[:, layer.layer] = layer.expert_ids
        assert layer.replayed_differently() == 0
    torch.testing.assert_close(model(*packed(documents), routed_experts=choices), expected, atol=1e-6, rtol=1e-6)


def test_a_token_without_recorded_experts_is_routed_live():
    """Half of the row is replayed: its choices are the recorded ones, and the others' the router's."""
    model, documents = ours_from(make_reference()), random_documents([40])
    choices = random_choices(40)
    choices[20:] = -1
    recorded: list[Routing] = []
    model(*packed(documents), recorded, choices)
    for layer in recorded:
        assert torch.equal(layer.expert_ids[:20], choices[:20, layer.layer])
        live = layer.logits.topk(TOP_K, -1).indices
        assert torch.equal(layer.expert_ids[20:].sort(-1).values, live[20:].sort(-1).values)
        pairs = zip(choices[:20, layer.layer].tolist(), live[:20].tolist(), strict=True)
        different = sum(len(set(replayed) - set(own)) for replayed, own in pairs)
        assert different > 0
        assert layer.replayed_differently() == pytest.approx(different / (40 * TOP_K))


def test_choices_of_another_shape_and_experts_that_do_not_exist_are_refused():
    model = NorthModel(NorthConfig.from_hf(ours_from(make_reference()).config.to_hf()))
    row = packed(random_documents([10]))
    with pytest.raises(ValueError, match=r"\[10, 5, 3\], got \[9, 5, 3\]"):
        model(*row, routed_experts=random_choices(9))
    choices = random_choices(10)
    choices[4, 2, 1] = NUM_EXPERTS
    with pytest.raises(ValueError, match="below 8, got 8"):
        model(*row, routed_experts=choices)
    choices[4, 2, 1], choices[4, 0, 0] = 0, 200  # layer 0 is dense: whatever a sampler reports there is not read
    model(*row, routed_experts=choices)
