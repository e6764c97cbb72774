"""Mixture of experts against a loop over tokens; what the router reports."""

import math

import pytest
import torch
from torch.nn import functional as F

from north_lightning.model import NorthConfig, NorthModel, Routing, expert_backends, experts


def loop_over_tokens(x, weights, expert_ids, gate_up, down):
    out = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], expert_ids[t].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            y = y + weight * (down[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


BACKENDS = ["plain", "batched", "grouped"]  # grouped_mm runs on a CPU too


def random_inputs(num_used, num_tokens=30, num_experts=6, width=8, requires_grad=True):
    """Tokens, weights and choices among the first ``num_used`` experts; the others get no token."""
    torch.manual_seed(num_used)
    top_k = min(2, num_used)
    x = torch.randn(num_tokens, 16)
    weights = torch.rand(num_tokens, top_k)
    expert_ids = torch.stack([torch.randperm(num_used)[:top_k] for _ in range(num_tokens)])
    gate_up, down = torch.randn(num_experts, 2 * width, 16) / 4, torch.randn(num_experts, 16, width) / 4
    for tensor in (x, weights, gate_up, down):
        tensor.requires_grad_(requires_grad)
    return x, weights, expert_ids, gate_up, down


def assert_equal_to_a_loop_over_tokens(backend, x, weights, expert_ids, gate_up, down):
    inputs = [x, weights, gate_up, down]
    out = expert_backends.mixture_of_experts(x, weights, expert_ids, gate_up, down, backend)
    expected = loop_over_tokens(x, weights, expert_ids, gate_up, down)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    d_out = torch.randn_like(out)
    expected_grads = torch.autograd.grad(expected, inputs, d_out)
    for grad, expected_grad in zip(torch.autograd.grad(out, inputs, d_out), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_used", [6, 2, 1])
def test_output_and_gradients_equal_a_loop_over_tokens(backend, num_used):
    assert_equal_to_a_loop_over_tokens(backend, *random_inputs(num_used))


@pytest.mark.parametrize("max_rows", [1, 16, 25])
def test_any_size_of_batches_equals_a_loop_over_tokens(max_rows, monkeypatch):
    """One expert at a time, and batches with and without padding."""
    monkeypatch.setattr(expert_backends, "MAX_BATCH_ROWS", max_rows)
    assert_equal_to_a_loop_over_tokens("batched", *random_inputs(5))


@pytest.mark.parametrize("backend", ["batched", "grouped"])
def test_frozen_experts_get_no_gradient_and_tokens_the_same_one(backend):
    x, weights, expert_ids, gate_up, down = random_inputs(6)
    out = expert_backends.mixture_of_experts(x, weights, expert_ids, gate_up, down, backend)
    expected = torch.autograd.grad(out.square().sum(), [x, weights])
    frozen = gate_up.detach(), down.detach()
    out = expert_backends.mixture_of_experts(x, weights, expert_ids, *frozen, backend)
    for grad, expected_grad in zip(torch.autograd.grad(out.square().sum(), [x, weights]), expected, strict=True):
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_close_to_float32(backend):
    x, weights, expert_ids, gate_up, down = random_inputs(6, requires_grad=False)
    expected = loop_over_tokens(x, weights, expert_ids, gate_up, down)
    low = [tensor.bfloat16().requires_grad_() for tensor in (x, gate_up, down)]
    out = expert_backends.mixture_of_experts(low[0], weights, expert_ids, *low[1:], backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.02)
    grads = torch.autograd.grad(out.float().square().sum(), low)
    full = [tensor.requires_grad_() for tensor in (x, gate_up, down)]
    out = expert_backends.mixture_of_experts(full[0], weights, expert_ids, *full[1:], "plain")
    for grad, expected in zip(grads, torch.autograd.grad(out.square().sum(), full), strict=True):
        assert (grad.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("backend", ["batched", "grouped"])
def test_nothing_but_inputs_and_gate_up_is_kept(backend):
    x, weights, expert_ids, gate_up, down = random_inputs(6, num_tokens=300)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() if tensor.is_floating_point() else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_backends.mixture_of_experts(x, weights, expert_ids, gate_up, down, backend)
    num_slots, width = weights.numel(), down.shape[2]
    inputs = sum(tensor.numel() for tensor in (x, weights, gate_up, down))
    assert sum(kept.values()) <= inputs + 1.2 * num_slots * (2 * width + 1)  # a few percent are padding


CONFIG = NorthConfig(64, 16, 8, 3, 2, 1, 8, 6, 2, sliding_window=8)


def test_routing_is_recorded_for_every_sparse_layer_when_asked():
    torch.manual_seed(0)
    model = NorthModel(CONFIG)
    routing: list[Routing] = []
    token_ids, cu_seqlens = torch.randint(64, (20,)), torch.tensor([0, 20], dtype=torch.int32)
    hidden = model(token_ids, cu_seqlens, routing)
    assert torch.equal(hidden, model(token_ids, cu_seqlens))
    assert [record.layer for record in routing] == [1, 2]
    for record in routing:
        counts = record.tokens_per_expert()
        assert counts.shape == (6,)
        assert counts.sum() == 20 * 2
        assert counts.tolist() == [(record.expert_ids == e).sum().item() for e in range(6)]
        best = record.logits.topk(2).indices.sort(-1).values
        assert torch.equal(record.expert_ids.sort(-1).values, best)
        assert record.logits.requires_grad


def test_router_entropy_runs_from_zero_to_log_of_experts():
    undecided = Routing(0, torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.long))
    assert undecided.entropy().item() == pytest.approx(math.log(8))
    certain = Routing(0, torch.tensor([[50.0] + [-200.0] * 7]), torch.zeros(1, 2, dtype=torch.long))
    assert certain.entropy().item() == pytest.approx(0.0, abs=1e-6)
    even_between_two = Routing(0, torch.tensor([[50.0] * 2 + [-200.0] * 6]), torch.zeros(1, 2, dtype=torch.long))
    assert even_between_two.entropy().item() == pytest.approx(math.log(2))


def test_router_picks_and_weighs_in_float32():
    """In bfloat16 all eight scores round to 1.0 or 0.996: the order, and the weights, need float32."""
    torch.manual_seed(0)
    router = experts.Router(CONFIG).to(torch.bfloat16)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(50, 16, dtype=torch.bfloat16)
    logits, weights, expert_ids = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    expected = F.linear(x, router.weight).float().sigmoid()
    torch.testing.assert_close(weights, expected.gather(1, expert_ids), atol=0.0, rtol=0.0)


def test_random_weights_follow_initializer_range_and_the_global_seed():
    torch.manual_seed(7)
    first = NorthModel(CONFIG)
    torch.manual_seed(7)
    second = NorthModel(CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    matrices = torch.cat([p.detach().flatten() for p in first.parameters() if p.dim() > 1])
    assert matrices.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.05)
    assert all(torch.equal(p, torch.ones_like(p)) for p in first.parameters() if p.dim() == 1)
