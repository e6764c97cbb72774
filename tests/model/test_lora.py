"""Adapters against PEFT on transformers' model: files both ways, logits, gradients, merged weights."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Cohere2MoeForCausalLM
from transformers_reference import loss_of, make_reference, our_logits, ours_from, random_documents, reference_logits

from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.model import (
    LoRAConfig,
    NorthModel,
    add_adapters,
    load_adapter,
    named_hf_tensors,
    save_adapter,
    save_checkpoint,
)
from north_lightning.model.lora import adapter_state_dict, named_peft_tensors

LENGTHS = [30, 7, 20]
TARGETS = [("attention",), ("experts",), ("attention", "experts")]
CONFIG = LoRAConfig(rank=3, alpha=5.0)


def with_random_adapters(config: LoRAConfig = CONFIG) -> NorthModel:
    """The reference's weights and adapters that matter."""
    model = ours_from(make_reference())
    add_adapters(model, config)
    generator = torch.Generator().manual_seed(1)
    for _, tensor, _ in named_peft_tensors(model):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    return model


def on_transformers(directory: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_reference(), directory, is_trainable=True)


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_loads_what_we_write_and_computes_the_same_logits_and_gradients(targets, tmp_path):
    config = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    model, documents = with_random_adapters(config), random_documents(LENGTHS)
    save_adapter(model, tmp_path, config)
    reference = on_transformers(tmp_path)
    expected, actual = reference_logits(reference, documents), our_logits(model, documents)
    assert not torch.allclose(expected, reference_logits(make_reference(), documents), atol=0.05)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    loss_of(expected, documents).backward()
    loss_of(actual, documents).backward()
    # The files' names, once more, for the gradients: each takes the place of its matrix.
    holder = with_random_adapters(config)
    with torch.no_grad():
        for copy, parameter in zip(holder.parameters(), model.parameters(), strict=True):
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.requires_grad:
                copy.copy_(parameter.grad)
    save_adapter(holder, tmp_path / "gradients", config)
    gradients = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    trained = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name.replace(".default.", ".") for name in trained}
    for name, gradient in trained.items():
        torch.testing.assert_close(gradients[name.replace(".default.", ".")], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_we_load_what_peft_writes(tmp_path):
    peft_config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,  # random B
    )
    torch.manual_seed(0)
    reference = get_peft_model(make_reference(), peft_config)
    reference.save_pretrained(tmp_path)
    model, documents = ours_from(make_reference()), random_documents(LENGTHS)
    assert load_adapter(model, tmp_path) == LoRAConfig(4, 6.0)
    expected = reference_logits(reference, documents)
    assert not torch.allclose(expected, reference_logits(make_reference(), documents), atol=0.01)
    torch.testing.assert_close(our_logits(model, documents), expected, atol=1e-5, rtol=1e-5)


def test_an_export_is_the_merged_model(tmp_path):
    """Also what is pushed to the sampler: ``named_hf_tensors``."""
    model, documents = with_random_adapters(), random_documents([10])  # within the window: both conventions agree
    save_adapter(model, tmp_path / "adapter", CONFIG)
    save_checkpoint(model, tmp_path / "merged")
    merged = on_transformers(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    for name, tensor in named_hf_tensors(model):
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=name)
        assert not tensor.requires_grad
    loaded = Cohere2MoeForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reference_logits(loaded, documents), our_logits(model, documents), atol=1e-5, rtol=1e-5)


def test_fresh_adapters_change_nothing_and_only_they_are_trained():
    model, documents = ours_from(make_reference()), random_documents(LENGTHS)
    before = our_logits(model, documents)
    add_adapters(model, CONFIG)
    assert torch.equal(our_logits(model, documents), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == adapter_state_dict(model).keys()
    # 5 layers x (qkv: 3 pairs, o: 1 pair) and 4 sparse layers x 2 pairs
    assert len(trained) == 2 * (5 * 4 + 4 * 2)


def test_a_model_that_is_cut_over_processes_is_refused():
    model = ours_from(make_reference())
    model.embedding.weight.device_mesh = object()  # what distinguishes a distributed tensor
    with pytest.raises(ConfigError, match=r"leave trainer\.strategy out"):
        add_adapters(model, CONFIG)


def test_half_precision_weights_are_rounded_once():
    """bfloat16 weights with float32 adapters: the trained function is the exported one, whatever rounding does."""
    model = with_random_adapters()
    expected = dict(named_hf_tensors(model))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert next(iter(adapter_state_dict(model).values())).dtype == torch.float32
    for name, tensor in named_hf_tensors(model):
        assert tensor.dtype == torch.bfloat16, name
        torch.testing.assert_close(tensor.float(), expected[name], atol=0.02, rtol=0.02, msg=name)


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_dora": True}, ConfigError, "use_dora: only False is supported, got True"),
        ({"peft_type": "IA3"}, ConfigError, "peft_type: only 'LORA'"),
        ({"target_modules": ["q_proj"]}, ConfigError, "expected attention or experts as a whole"),
        ({"target_modules": "all-linear"}, ConfigError, "expected attention or experts as a whole"),
        ({"r": None}, CheckpointError, "expected PEFT's configuration"),
        ({"r": 2}, CheckpointError, r"expected \[2, 32\], got \[3, 32\]"),
        ({"target_parameters": None}, CheckpointError, "first base_model.model.model.layers.1.mlp"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes, error, message, tmp_path):
    save_adapter(with_random_adapters(), tmp_path, CONFIG)
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        load_adapter(ours_from(make_reference()), tmp_path)


def test_missing_and_broken_adapter_files_are_named(tmp_path):
    model = with_random_adapters()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(ours_from(make_reference()), tmp_path)
    save_adapter(model, tmp_path, CONFIG)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("base_model.model.model.layers.4.self_attn.o_proj.lora_B.weight")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"expected 56 tensors .* got 55; 1 differ, first .*layers\.4\.self_attn"):
        load_adapter(ours_from(make_reference()), tmp_path)
    weights.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: expected adapter weights"):
        load_adapter(ours_from(make_reference()), tmp_path)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": float("nan")}, {"targets": ()}, {"targets": ("router",)}])
def test_settings_that_cannot_work_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=f"lora.{next(iter(settings))}"):
        LoRAConfig(**settings)
