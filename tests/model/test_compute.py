"""Every way of computing the model gives transformers' numbers; checkpointing gives the same bits for less memory."""

import itertools

import pytest
import torch
from test_block_attention import flash_definition
from transformers_reference import (
    loss_of,
    make_reference,
    our_logits,
    ours_from,
    packed,
    random_documents,
    reference_gradients,
    reference_logits,
)

from north_lightning.errors import ConfigError
from north_lightning.model import ComputeConfig, NorthModel, attention, named_hf_tensors
from north_lightning.model.decoder import RMSNorm

WINDOW = 12
LENGTHS = [50, 1, 7, 12, 13, 80]  # shorter than the window, as long, one longer, several windows long
ATTENTION = ["plain", "blocks", "varlen"]
EXPERTS = ["plain", "batched", "grouped"]


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """Flash attention's documented meaning in place of its CUDA kernel."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_definition)
    monkeypatch.setattr(attention, "runs_varlen", lambda qkv: True)


def gradients_by_hf_name(model: NorthModel) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return {name: tensor.clone() for name, tensor in named_hf_tensors(model)}


@pytest.mark.parametrize("transformers_window", [True, False])
@pytest.mark.parametrize(
    ("attention_backend", "expert_backend"),
    [*zip(ATTENTION, EXPERTS, strict=True), ("blocks", "plain"), ("plain", "batched")],
)
def test_logits_and_gradients_equal_transformers(attention_backend, expert_backend, transformers_window, varlen_on_cpu):
    """In the sampler's reading of the window a token sees one key more than in transformers': told so, both agree."""
    compute = ComputeConfig(attention_backend, expert_backend)
    reference = make_reference(sliding_window=WINDOW)
    model = ours_from(reference, transformers_window=transformers_window, compute=compute)
    if not transformers_window:
        state = reference.state_dict()
        reference = make_reference(sliding_window=WINDOW + 1)
        reference.load_state_dict(state)
    documents = random_documents(LENGTHS)
    expected, actual = reference_logits(reference, documents), our_logits(model, documents)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    loss_of(expected, documents).backward()
    loss_of(actual, documents).backward()
    gradients = gradients_by_hf_name(model)
    for name, gradient in reference_gradients(reference).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


def test_the_named_back_end_is_the_one_that_runs(monkeypatch):
    """Each of them made unusable in turn: only the configuration that names it notices."""

    def unusable(*args, **kwargs):
        raise RuntimeError("this one ran")

    places = {
        "plain": (attention.Attention, "_plain_attention"),
        "blocks": (attention, "block_attention"),
        "varlen": (attention.Attention, "_varlen_attention"),
    }
    documents = random_documents([20])
    for broken, named in itertools.product(places, places):
        model = ours_from(make_reference(), compute=ComputeConfig(attention=named))
        with monkeypatch.context() as patch:
            patch.setattr(attention, "runs_varlen", lambda qkv: True)
            if named == "varlen":
                patch.setattr("torch.nn.attention.varlen.varlen_attn", flash_definition)
            patch.setattr(*places[broken], unusable)
            if broken == named:
                with pytest.raises(RuntimeError, match="this one ran"):
                    our_logits(model, documents)
            else:
                our_logits(model, documents)


def test_flash_attention_on_a_cpu_is_refused_and_so_are_unknown_names():
    model = ours_from(make_reference(), compute=ComputeConfig(attention="varlen"))
    with pytest.raises(ConfigError, match=r"compute\.attention.*float32 on cpu"):
        our_logits(model, random_documents([20]))
    for key in ("attention", "experts", "checkpointing"):
        with pytest.raises(ConfigError, match=rf"compute\.{key}.*'flesh'"):
            ComputeConfig(**{key: "flesh"})


# ---- checkpointing ---------------------------------------------------------------------------------------------------


def loss_gradients_and_kept_bytes(checkpointing):
    """One step of the same model; bytes that forward keeps for backward, parameters aside, every storage once."""
    reference = make_reference(num_experts_per_tok=8, intermediate_size=24)  # North's proportions to q, k and v
    model = ours_from(reference, compute=ComputeConfig(checkpointing=checkpointing))
    documents = random_documents([150, 30, 150])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(*packed(documents))
    loss = (hidden.square() * torch.linspace(-1, 1, hidden.shape[1])).mean()
    num_bytes = sum(size for size, _ in kept.values())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], num_bytes, hidden


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(checkpointing):
    loss, gradients, _, _ = loss_gradients_and_kept_bytes("none")
    other_loss, other_gradients, _, _ = loss_gradients_and_kept_bytes(checkpointing)
    assert torch.equal(loss, other_loss)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        assert torch.equal(gradient, other)


def test_full_checkpointing_keeps_the_inputs_of_the_layers_and_selective_is_between(monkeypatch):
    *_, everything, hidden = loss_gradients_and_kept_bytes("none")
    *_, selective, _ = loss_gradients_and_kept_bytes("selective")
    *_, full, _ = loss_gradients_and_kept_bytes("full")
    one_layer = hidden.numel() * hidden.element_size()
    assert 5 * one_layer <= full <= 7.5 * one_layer  # five inputs, the token ids, and the last norm's input
    assert full < 0.2 * everything
    assert 2 * full < selective < 0.6 * everything


def test_offload_hands_the_inputs_of_the_layers_and_nothing_else_to_the_host(monkeypatch):
    import torch.autograd.graph as graph

    from north_lightning.model import decoder

    handed_over = []

    class Recording(graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert pin_memory is False  # nothing to pin without CUDA
            super().__init__(lambda tensor: handed_over.append(tensor.clone()) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(decoder, "save_on_cpu", Recording)
    model = ours_from(make_reference(), compute=ComputeConfig(checkpointing="offload"))
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    model(*packed(random_documents([40, 30])))
    assert len(handed_over) == len(inputs) == 5
    assert all(torch.equal(ours, expected) for ours, expected in zip(handed_over, inputs, strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_routing_is_recorded_once_and_carries_gradient_under_any_checkpointing(checkpointing):
    model = ours_from(make_reference(), compute=ComputeConfig(checkpointing=checkpointing))
    routing = []
    hidden = model(*packed(random_documents([40, 30])), routing)
    auxiliary = sum(layer.logits.square().mean() for layer in routing)
    (hidden.mean() + auxiliary).backward()
    assert [layer.layer for layer in routing] == [1, 2, 3, 4]
    for layer in model.layers[1:]:
        assert layer.mlp.router.weight.grad.abs().sum() > 0


def test_the_norm_of_bfloat16_states_is_rounded_once():
    """Formed in float32 to the end, weight included; rounding before the weight changes about a tenth of the values."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(64, generator=generator))
    states = torch.randn(200, 64, generator=generator).bfloat16()
    for module in (norm, norm.bfloat16()):
        expected = states.double() * (states.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        expected = (expected * module.weight.double()).bfloat16()
        ours = module(states)
        assert ours.dtype == torch.bfloat16
        assert (ours == expected).float().mean() > 0.998
