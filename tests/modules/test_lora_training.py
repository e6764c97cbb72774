"""Training adapters: only they move, checkpoints hold only them, a release is the merged model with them beside it."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import HFCheckpoint
from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.errors import ConfigError
from north_lightning.model import LoRAConfig, NorthConfig, NorthModel, load_adapter, load_checkpoint, save_checkpoint
from north_lightning.modules import SFTModule

LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, and a checkpoint to adapt in ``base``."""
    folder = write_run_inputs(tmp_path_factory.mktemp("inputs"))
    seed_everything(3, verbose=False)
    save_checkpoint(
        NorthModel(NorthConfig.load(folder / "model.json")), folder / "base", tokenizer_dir=folder / "tokenizer"
    )
    return folder


def make_module(inputs: Path, **settings: object) -> SFTModule:
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)  # noqa: E731
    return SFTModule(checkpoint=inputs / "base", optimizer=optimizer, **{"lora": LORA, **settings})


def fit(module: SFTModule, inputs: Path, run_dir: Path, num_steps: int, **settings: object) -> None:
    sources = {"names": SFTSource([inputs / "names.jsonl"])}
    data = SFTDataModule(inputs / "tokenizer", sources, 256)
    seed_everything(3, verbose=False)  # of the adapters, made when fitting begins
    trainer = quiet_trainer(run_dir, max_steps=num_steps, callbacks=[HFCheckpoint()])
    trainer.fit(module, datamodule=data, **settings)
    trainer.save_checkpoint(run_dir / "last.ckpt")


def test_a_run_trains_stores_and_releases_adapters(inputs: Path, tmp_path: Path) -> None:
    module = make_module(inputs)
    fit(module, inputs, tmp_path, 3)
    model = module.model
    assert model is not None

    released = load_checkpoint(tmp_path / "checkpoint")
    again = load_checkpoint(inputs / "base")
    assert load_adapter(again, tmp_path / "checkpoint" / "adapter") == LORA
    base = dict(load_checkpoint(inputs / "base").named_parameters())
    adapted = {name for name, tensor in released.named_parameters() if not torch.equal(tensor, base[name])}
    expected = {f"layers.{i}.attention.{name}.weight" for i in range(3) for name in ("qkv_proj", "o_proj")}
    assert adapted == expected | {f"layers.{i}.mlp.{name}" for i in (1, 2) for name in ("gate_up_proj", "down_proj")}
    tokens, bounds = torch.arange(10, 60), torch.tensor([0, 20, 50], dtype=torch.int32)
    hidden = model(tokens, bounds)
    assert torch.equal(again(tokens, bounds), hidden)
    assert torch.equal(released(tokens, bounds), hidden)

    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    adapters = load_file(tmp_path / "checkpoint" / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in adapters.values())


def test_a_resumed_run_equals_one_that_was_not_interrupted(inputs: Path, tmp_path: Path) -> None:
    straight, first, resumed = make_module(inputs), make_module(inputs), make_module(inputs)
    fit(straight, inputs, tmp_path / "straight", 4)
    fit(first, inputs, tmp_path / "first", 2)
    fit(resumed, inputs, tmp_path / "resumed", 4, ckpt_path=tmp_path / "first" / "last.ckpt", weights_only=True)
    expected = dict(straight.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_adapters_of_an_earlier_run_are_trained_on(inputs: Path, tmp_path: Path) -> None:
    first = make_module(inputs)
    fit(first, inputs, tmp_path / "first", 2)
    second = make_module(inputs, lora=None, adapter=tmp_path / "first" / "checkpoint" / "adapter")
    fit(second, inputs, tmp_path / "second", 1)
    assert second.lora == LORA
    stored = load_file(tmp_path / "second" / "checkpoint" / "adapter" / "adapter_model.safetensors")
    before = load_file(tmp_path / "first" / "checkpoint" / "adapter" / "adapter_model.safetensors")
    change = max(float((stored[name] - before[name]).abs().max()) for name in before)
    assert 0 < change <= 1.1e-2  # one step of AdamW at 1e-2 from there, not from fresh adapters


def test_a_checkpoint_without_adapters_is_not_resumed_from_in_silence(inputs: Path, tmp_path: Path) -> None:
    plain = make_module(inputs, lora=None)
    fit(plain, inputs, tmp_path / "plain", 1)
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: the checkpoint has none, the config 4"):
        fit(make_module(inputs), inputs, tmp_path, 2, ckpt_path=tmp_path / "plain" / "last.ckpt", weights_only=True)


def test_fresh_and_stored_adapters_exclude_each_other(inputs: Path) -> None:
    with pytest.raises(ConfigError, match="expected either lora or adapter"):
        make_module(inputs, adapter=inputs)
