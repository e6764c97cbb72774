"""SFTModule: optimizer steps equal a hand-written loop, and a resumed run equals one that was never interrupted."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import JSONLHistory
from north_lightning.chat import train_tokenizer
from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.errors import CheckpointError, ConfigError, TokenizerError, TrainingError
from north_lightning.history import read_history
from north_lightning.model import ComputeConfig, NorthConfig, NorthModel
from north_lightning.modules import SFTModule, WarmupSchedule
from north_lightning.types import PackedBatch

LR = 3e-3
EPS = 1e-4  # large: Adam turns rounding errors of gradients that are nearly 0 into whole steps


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def make_data(inputs: Path, **settings: object) -> SFTDataModule:
    sources = {name: SFTSource([inputs / f"{name}.jsonl"], 0.5) for name in ("names", "sums")}
    return SFTDataModule(inputs / "tokenizer", sources, 256, **settings)


def make_module(inputs: Path, lr: float = LR, max_grad_norm: float = 0.5, **settings: object) -> SFTModule:
    seed_everything(3, verbose=False)
    return SFTModule(
        config=inputs / "model.json",
        tokenizer=inputs / "tokenizer",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, eps=EPS),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=3),
        max_grad_norm=max_grad_norm,
        **settings,
    )


def parameters_of(module: SFTModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def written_by_hand(
    inputs: Path, batches: list[PackedBatch], micro_batches: int, loss_mean: str = "tokens"
) -> dict[str, torch.Tensor]:
    """The same training without Lightning or anything of ours but the model: whole logits, one sum, one division."""
    seed_everything(3, verbose=False)
    model = NorthModel(NorthConfig.load(inputs / "model.json"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, eps=EPS)
    for step in range(len(batches) // micro_batches):
        total, count = 0.0, 0
        for batch in batches[step * micro_batches : (step + 1) * micro_batches]:
            logits = model(batch.token_ids, batch.cu_seqlens) @ model.embedding_weight.T
            logprobs = logits[:-1].log_softmax(-1).gather(-1, batch.token_ids[1:, None])[:, 0]
            if loss_mean == "tokens":
                total = total - logprobs[batch.loss_mask[1:]].sum()
                count += int(batch.loss_mask.sum())
            for start, end in pairwise(batch.cu_seqlens.tolist()) if loss_mean == "conversations" else ():
                total = total - logprobs[start : end - 1][batch.loss_mask[start + 1 : end]].mean()
                count += 1
        (total / count).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.5 / float(norm))
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("micro_batches", "loss_mean"), [(1, "tokens"), (2, "tokens"), (2, "conversations")])
def test_sft_equals_a_hand_written_loop(inputs: Path, tmp_path: Path, micro_batches: int, loss_mean: str) -> None:
    module, data = make_module(inputs, loss_mean=loss_mean), make_data(inputs)
    trainer = quiet_trainer(tmp_path, max_steps=4, accumulate_grad_batches=micro_batches)
    trainer.fit(module, datamodule=data)
    loader = iter(data.train_dataloader())
    reference = written_by_hand(inputs, [next(loader) for _ in range(4 * micro_batches)], micro_batches, loss_mean)
    for name, parameter in parameters_of(module).items():
        torch.testing.assert_close(parameter, reference[name], rtol=0, atol=1e-6)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[PackedBatch]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedBatch:
        return self.rows[index]


class Gradients(Callback):
    """What an optimizer step sees, before clipping."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: object) -> None:
        self.seen = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def test_one_step_is_the_same_however_its_rows_are_split_into_micro_batches(inputs: Path, tmp_path: Path) -> None:
    """The same two unequal rows, as two micro-batches of one step and as one; the gradients before clipping, too."""
    long, short = row([40, 30], trained=50, total=60), row([20], trained=10, total=60)
    whole = joined(long, short)
    results, gradients = [], []
    for rows in ([long, short], [whole]):
        module = make_module(inputs, max_grad_norm=1e9)
        gradients.append(Gradients())
        trainer = quiet_trainer(tmp_path, max_steps=1, accumulate_grad_batches=len(rows), callbacks=[gradients[-1]])
        trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(Rows(rows), batch_size=None))
        results.append(parameters_of(module))
    for name in results[0]:
        torch.testing.assert_close(gradients[0].seen[name], gradients[1].seen[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-6)


def test_the_loss_is_scaled_by_the_means_that_lightning_takes(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(inputs)
    module.trainer = Trainer(accumulate_grad_batches=5, accelerator="cpu", logger=False, enable_progress_bar=False)
    assert module.gradient_scale() == 5.0
    monkeypatch.setattr("north_lightning.modules.base.rows_at_once", lambda trainer: (3, 1))
    assert module.gradient_scale() == 15.0


def row(lengths: list[int], trained: int, total: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    token_ids = torch.randint(10, 300, (sum(lengths),), generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    mask[starts[:-1]] = False
    mask[mask.nonzero()[trained:]] = False
    return PackedBatch(token_ids, starts.int(), mask, total, ["names"] * len(lengths))


def joined(first: PackedBatch, second: PackedBatch) -> PackedBatch:
    return PackedBatch(
        torch.cat([first.token_ids, second.token_ids]),
        torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1]]),
        torch.cat([first.loss_mask, second.loss_mask]),
        first.num_trained_tokens,
        first.sources + second.sources,
    )


def test_logged_losses_are_means_over_the_whole_step_and_per_source(inputs: Path, tmp_path: Path) -> None:
    module, data = make_module(inputs), make_data(inputs)
    logger = JSONLHistory(tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, logger=logger)
    trainer.fit(module, datamodule=data)
    first = read_history(tmp_path / "history.jsonl")[0]

    loader = iter(data.train_dataloader())
    seed_everything(3, verbose=False)
    model = NorthModel(NorthConfig.load(inputs / "model.json"))
    losses: dict[str, list[float]] = {}
    for batch in (next(loader), next(loader)):
        logits = model(batch.token_ids, batch.cu_seqlens) @ model.embedding_weight.T
        logprobs = logits[:-1].log_softmax(-1).gather(-1, batch.token_ids[1:, None])[:, 0]
        for source, start, end in zip(batch.sources, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            mask = batch.loss_mask[start + 1 : end]
            losses.setdefault(source, []).extend((-logprobs[start : end - 1][mask]).tolist())
    for source, values in losses.items():
        assert first[f"train/loss/{source}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    everything = [value for values in losses.values() for value in values]
    assert first["train/loss"] == pytest.approx(sum(everything) / len(everything), rel=1e-5)


def test_every_step_has_its_own_line_and_values_that_a_step_lacks_are_not_repeated(
    inputs: Path, tmp_path: Path
) -> None:
    module = make_module(inputs, log_experts_every_n_steps=3)
    trainer = quiet_trainer(tmp_path, max_steps=5, logger=JSONLHistory(tmp_path))
    trainer.fit(module, datamodule=make_data(inputs))
    history = read_history(tmp_path / "history.jsonl")
    assert [line["step"] for line in history] == [0, 1, 2, 3, 4]
    assert ["experts/layer1/entropy" in line for line in history] == [True, False, False, True, False]
    assert all({"train/loss", "train/grad_norm", "train/lr"} <= line.keys() for line in history)
    assert history[0]["train/lr"] == pytest.approx(LR / 3)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    steps_per_pass = len(make_loader(inputs))
    stop, end = steps_per_pass - 1, steps_per_pass + 2  # across the end of a pass
    whole = make_module(inputs)
    quiet_trainer(tmp_path, max_steps=end).fit(whole, datamodule=make_data(inputs))
    first = quiet_trainer(tmp_path, max_steps=stop)
    first.fit(make_module(inputs), datamodule=make_data(inputs))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module(inputs)
    second = quiet_trainer(tmp_path, max_steps=end)
    second.fit(resumed, datamodule=make_data(inputs), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second.global_step == end
    expected = parameters_of(whole)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters_of(resumed).items())


def make_loader(inputs: Path) -> object:
    data = make_data(inputs)
    data.setup("fit")
    return data.train_dataloader()


def test_resuming_with_another_learning_rate_is_refused(inputs: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(make_module(inputs), datamodule=make_data(inputs))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match=r"optimizer\.lr: the checkpoint has 0\.003, the config 0\.5"):
        quiet_trainer(tmp_path, max_steps=2).fit(
            make_module(inputs, lr=0.5),
            datamodule=make_data(inputs),
            ckpt_path=tmp_path / "one.ckpt",
            weights_only=True,
        )


def test_a_loss_that_is_not_finite_ends_training_before_the_step(inputs: Path, tmp_path: Path) -> None:
    batch = row([10], trained=5, total=5)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)

    class Poisoned(SFTModule):
        def configure_model(self) -> None:
            super().configure_model()
            with torch.no_grad():
                self.model.embedding.weight[batch.token_ids[0]] = math.nan

    poisoned = Poisoned(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    with pytest.raises(TrainingError, match="step 0 was not taken: the loss is nan"):
        quiet_trainer(tmp_path, max_steps=1).fit(poisoned, train_dataloaders=loader)
    assert poisoned.global_step == 0


def test_validation_reports_the_loss_per_source(inputs: Path, tmp_path: Path) -> None:
    module = make_module(inputs)
    data = make_data(inputs, validation_files=[inputs / "sums.jsonl", inputs / "names.jsonl"])
    results = quiet_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    assert results["val/loss"] == pytest.approx(math.log(400), rel=0.05)  # an untrained model knows nothing
    assert {"val/loss/sums", "val/loss/names"} <= results.keys()


def test_a_frozen_router_does_not_move(inputs: Path, tmp_path: Path) -> None:
    module = make_module(inputs, freeze_router=True)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, datamodule=make_data(inputs))
    seed_everything(3, verbose=False)
    before = dict(NorthModel(NorthConfig.load(inputs / "model.json")).named_parameters())
    moved = {name: not torch.equal(before[name.removeprefix("model.")], p) for name, p in module.named_parameters()}
    routers = {name for name in moved if "router" in name}
    assert len(routers) == 2
    assert not any(moved[name] for name in routers)
    assert all(moved[name] for name in moved.keys() - routers)


def test_a_tokenizer_of_another_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    train_tokenizer(["quite other words than those of the model, many of them " * 3], [], 410, tmp_path / "other")
    module = make_module(inputs)
    data = make_data(inputs)
    data.tokenizer = tmp_path / "other"
    with pytest.raises(TokenizerError):
        quiet_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match="no/such/folder"):
        SFTModule(checkpoint=Path("no/such/folder"))


def test_the_schedule_warms_up_and_then_follows_a_cosine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = WarmupSchedule(optimizer, warmup_steps=4, total_steps=12, final_fraction=0.25)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))  # half way down
    assert rates[12:] == pytest.approx([0.5, 0.5])


def test_compute_reaches_the_model_and_changes_no_step(inputs: Path, tmp_path: Path) -> None:
    compute = ComputeConfig(attention="plain", experts="plain", checkpointing="full")
    trained = []
    for name, settings in {"default": {}, "named": {"compute": compute}}.items():
        module = make_module(inputs, **settings)
        quiet_trainer(tmp_path / name, max_steps=3).fit(module, make_data(inputs))
        trained.append(parameters_of(module))
    layer = module.model.layers[1]
    assert (layer.attention.backend, layer.mlp.backend, layer.checkpointing) == ("plain", "plain", "full")
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, atol=2e-6, rtol=1e-4)


def test_the_end_of_a_cosine_that_there_is_not_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="final_fraction: expected total_steps beside it, got 0.2"):
        WarmupSchedule(optimizer, warmup_steps=4, final_fraction=0.2)
    assert WarmupSchedule(optimizer, total_steps=4).final_fraction == 0.1
