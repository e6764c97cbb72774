"""What every way of training North shares: the model and where it comes from, the optimizer, clipping, release.

In: a checkpoint or a config. Out: a LightningModule whose ``model`` maps packed rows to hidden states, and
``save_hf(directory)``. Not here: any objective.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from north_lightning.chat import NorthTokenizer
from north_lightning.data.batches import Batch, keep_predicted_from, rows_at_once
from north_lightning.errors import CheckpointError, ConfigError, TokenizerError, TrainingError
from north_lightning.losses import token_logprobs, trained_positions
from north_lightning.model import (
    ComputeConfig,
    LoRAConfig,
    NorthConfig,
    NorthModel,
    Routing,
    RoutingRecord,
    adapter_state_dict,
    add_adapters,
    fingerprint,
    load_adapter,
    load_checkpoint,
    named_hf_tensors,
    save_adapter,
    save_checkpoint,
)
from north_lightning.model.files import stored_dtype
from north_lightning.model.precision import BYTES, Precision, canonical, choose_precision
from north_lightning.modules.resuming import FORMAT, KEY, describe_part, flatten, read_settings, refuse_changes
from north_lightning.modules.schedule import StepPlateau, check_rates, scheduler_config
from north_lightning.parallel import NorthStrategy, clip_grad_norm, parameter_groups
from north_lightning.types import PackedBatch, Positive, Whole

_ACCUMULATE = "accumulate_grad_batches"
_AVERAGED = "current_model_state"
_WEIGHTS = {"state_dict", _AVERAGED}
"""Where checkpoints hold weights; with a ``WeightAveraging`` the first holds averages, the second what is trained."""


def adamw(parameters: Iterable[Any]) -> Optimizer:
    """AdamW with learning rate 1e-3, betas 0.9 and 0.95, and no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)


class NorthModule(LightningModule):
    """A North model and how it is optimized; subclasses add the objective.

    Weights and gradients are float32, whatever dtype the checkpoint is stored in, under ``trainer.precision`` 32-true
    and bf16-mixed, which computes in bfloat16. bf16-true keeps bfloat16 weights and needs an optimizer that rounds
    stochastically. Below adapters a bfloat16 checkpoint stays bfloat16. ``NorthStrategy`` has two dtypes of its own.

    Args:
        checkpoint: Folder of a Hugging Face ``cohere2_moe`` checkpoint to start from.
        config: A ``config.json`` to start from with random weights; give this or ``checkpoint``.
        tokenizer: Folder of the tokenizer that belongs to the model, checked against it and released with it; the
            checkpoint's own by default.
        optimizer: Makes the optimizer from the parameters that are trained.
        lr_scheduler: Makes the schedule, stepped once per optimizer step; constant by default. A
            ``lightning.pytorch.cli.ReduceLROnPlateau`` is stepped when its ``monitor`` is new: after an optimizer step,
            or after a validation if the name begins with ``val``.
        max_grad_norm: Gradients are scaled down to this total norm.
        freeze_router: Keep the experts' routers as they are.
        lora: Train low-rank adapters and nothing else. Checkpoints then hold the adapters only; a release is the merged
            model, with the adapters beside it in ``adapter/``, as PEFT reads them.
        adapter: Folder of adapters to go on training, written by an earlier run or by PEFT; in place of ``lora``.
        log_experts_every_n_steps: How often the routers' load and entropy are logged; 0 for never.
        compute: Implementations of attention and experts, and activation checkpointing.
    """

    def __init__(
        self,
        checkpoint: Path | None = None,
        config: Path | None = None,
        tokenizer: Path | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: Positive = 1.0,
        freeze_router: bool = False,
        lora: LoRAConfig | None = None,
        adapter: Path | None = None,
        log_experts_every_n_steps: Whole = 20,
        compute: ComputeConfig | None = None,
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (config is None):
            raise ConfigError(f"model: expected either checkpoint or config, got {checkpoint=!s}, {config=!s}")
        if checkpoint is not None and not (checkpoint / "config.json").is_file():
            raise CheckpointError(
                f"model.checkpoint: expected a folder with a config.json, got '{checkpoint}'; a stage writes one if"
                " HFCheckpoint is among its callbacks: run the stage before this one first"
            )
        if config is not None and not config.is_file():
            raise ConfigError(f"model.config: expected a file, got '{config}'")
        if max_grad_norm <= 0:
            raise ConfigError(f"model.max_grad_norm: expected more than 0, got {max_grad_norm}")
        if lora is not None and adapter is not None:
            raise ConfigError(f"model: expected either lora or adapter, got both ({adapter=!s})")
        self.checkpoint = checkpoint
        self.config_path = config
        self.tokenizer_dir = tokenizer or checkpoint
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.freeze_router = freeze_router
        self.lora = lora
        self.adapter = adapter
        self.strict_loading = lora is None and adapter is None
        self.log_experts_every_n_steps = log_experts_every_n_steps
        self.compute = compute
        self.model: NorthModel | None = None
        self.run_settings: dict[str, Any] = {}  # of the config, for checkpoints
        self._settings: dict[str, Any] | None = None
        self._tokenizer: NorthTokenizer | None = None
        self._base: str | None = None  # fingerprint of the weights below adapters
        self._recorded: dict[str, float] = {}

    # ---- the model ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model once, and refuse a tokenizer that does not belong to it."""
        if self.model is not None:
            return
        self.check_run(self.trainer, self, getattr(self.trainer, "datamodule", None))
        strategy = self.trainer.strategy
        if isinstance(strategy, NorthStrategy):
            source = self.checkpoint or self.config_path
            assert source is not None
            self.model = strategy.build_model(NorthConfig.load(source), self.checkpoint, self.compute)
        elif self.checkpoint is not None:
            precision = self.precision()
            dtype = getattr(torch, precision.base or precision.weights)
            self.model = load_checkpoint(self.checkpoint, dtype=dtype, compute=self.compute)
        else:
            assert self.config_path is not None
            self.model = NorthModel(NorthConfig.load(self.config_path), self.compute)
        if self.freeze_router:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(".router." not in f".{name}.")
        if self.lora is not None or self.adapter is not None:
            self._base = fingerprint(self.model)
        if self.adapter is not None:
            self.lora = load_adapter(self.model, self.adapter, self.checkpoint)
        elif self.lora is not None:
            add_adapters(self.model, self.lora)
        self.model.train()

    def precision(self) -> Precision:
        """The dtypes of this run.

        Raises:
            ConfigError: a precision that this module cannot train in, or bfloat16 weights without stochastic rounding.
        """
        strategy = self.trainer.strategy
        asked = self.run_settings.get("trainer.precision")  # Lightning makes bf16-mixed of 16-mixed on a CPU
        name = canonical(self.trainer.precision if asked is None else asked)
        if not isinstance(strategy, NorthStrategy):
            stored = None if self.checkpoint is None else stored_dtype(self.checkpoint)
            chosen = choose_precision(name, stored, self.lora is not None or self.adapter is not None)
        elif name == "32-true":
            chosen = strategy.precision
        else:
            raise ConfigError(
                f"trainer.precision: expected 32-true with NorthStrategy, got {name}; set trainer.strategy's "
                "compute_dtype: bfloat16 to compute in bfloat16"
            )
        optimizer = self._sample_optimizer()
        betas = optimizer.defaults.get("betas", (0.0,))
        if chosen.weights == "bfloat16" and not getattr(optimizer, "bf16_stochastic_round", False):
            raise ConfigError(
                "model.optimizer: expected one that rounds stochastically, because bfloat16 weights lose small updates "
                "(torchao.optim._AdamW or AdamW8bit with bf16_stochastic_round: true), got "
                f"{type(optimizer).__name__}; or keep float32 weights: trainer.precision bf16-mixed, or "
                "NorthStrategy's parameter_dtype: float32"
            )
        if chosen.moments(type(optimizer).__name__) == "bfloat16" and max(betas) > 1 - 2**-8:
            raise ConfigError(
                f"model.optimizer.betas: expected at most 1 - 1/256 where moments are bfloat16, got {list(betas)}; "
                "0.9 and 0.95 are usual"
            )
        return chosen

    def _sample_optimizer(self) -> Optimizer:
        """One like the run's, of a parameter that stands for all: for what it is, not for a step."""
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        is_grouped = isinstance(self.trainer.strategy, NorthStrategy)
        return self.optimizer_factory([{"params": [parameter]}] if is_grouped else [parameter])

    def check_run(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """Refuse a tokenizer that does not belong to the model, other data's tokenizer, and rows that are too long.

        Raises:
            CheckpointError, ConfigError, TokenizerError: before anything is built.
        """
        if isinstance(trainer, Trainer):
            self.trainer = trainer
            varlen = self.compute is not None and self.compute.attention == "varlen"
            if varlen and isinstance(trainer.accelerator, CPUAccelerator):
                raise ConfigError("model.compute.attention: expected auto or blocks on a CPU, got varlen, for CUDA")
        self.precision()
        source = self.checkpoint or self.config_path
        assert source is not None
        config = NorthConfig.load(source)
        if self.checkpoint is not None and not any(self.checkpoint.glob("*.safetensors")):
            raise CheckpointError(f"model.checkpoint: expected *.safetensors in the folder, found none in '{source}'")
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise CheckpointError(f"model.adapter: expected a folder with an adapter_config.json, got '{self.adapter}'")
        folders = [folder for folder in (self.tokenizer_dir, getattr(data, "tokenizer", None)) if folder is not None]
        tokenizers = [NorthTokenizer.load(folder) for folder in folders]
        self._tokenizer = tokenizers[0] if tokenizers else None
        for tokenizer in tokenizers:
            tokenizer.check(config.to_hf(), f"the model ({source})")
            if tokenizer.fingerprint != tokenizers[0].fingerprint:
                raise TokenizerError(
                    f"data.tokenizer: expected the model's ('{folders[0]}'), got another ('{folders[1]}')"
                )
        row, longest = getattr(data, "row_tokens", 0), config.max_position_embeddings
        if row > longest:
            raise ConfigError(
                f"data.row_tokens: expected at most the model's max_position_embeddings, {longest}, got {row}"
            )

    def save_hf(self, directory: Path, dtype: str | None = None) -> None:
        """Write the model as a Hugging Face checkpoint, with its tokenizer and the base checkpoint's licenses. Called
        by every process, written by one.

        Args:
            directory: where to.
            dtype: of the tensors; default: the base checkpoint's, or the weights' own where training began at random.
        """
        assert self.model is not None, "configure_model has not run"
        if dtype is None and self.checkpoint is not None and (stored := stored_dtype(self.checkpoint)) in BYTES:
            dtype = stored
        if self.trainer.is_global_zero:
            save_checkpoint(
                self.model,
                directory,
                dtype=None if dtype is None else getattr(torch, dtype),
                tokenizer_dir=self.tokenizer_dir,
                base=self.checkpoint,
            )
            if self.lora is not None:
                save_adapter(self.model, directory / "adapter", self.lora, self.checkpoint, self._base)
        elif isinstance(self.trainer.strategy, NorthStrategy):
            for _ in named_hf_tensors(self.model):  # gathered for the one that writes
                pass

    def keep_predicted_here(self, batch: Batch) -> Batch:
        """Where processes share a row: the batch with the tokens that others predict taken out of ``loss_mask``."""
        assert self.model is not None, "configure_model has not run"
        return keep_predicted_from(batch, self.model.tokens_held(len(batch.token_ids)))

    def trained_logprobs(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        with_entropy: bool = False,
        routed_experts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [R] and, if wanted, entropies [R] of the tokens under ``loss_mask``, in their order.

        All of these have to be predicted by this process; see ``keep_predicted_here``.
        ``routed_experts`` [T, L, K] are replayed, see ``NorthModel``.
        """
        assert self.model is not None, "configure_model has not run"
        every = self.log_experts_every_n_steps
        routing = RoutingRecord() if self.training and every and self.global_step % every == 0 else None
        first = self.model.tokens_held(len(batch.token_ids)).start
        hidden = self.model(
            batch.token_ids, batch.cu_seqlens, routing, routed_experts
        )  # [T, D], of the tokens held here
        for layer in routing or ():
            self._log_experts(layer)
        sources, targets = trained_positions(batch.token_ids, batch.cu_seqlens, batch.loss_mask)  # [R], [R]
        return token_logprobs(
            hidden[sources - first],
            self.model.embedding_weight,
            targets,
            logit_scale=self.model.config.logit_scale,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    def _log_experts(self, routing: Routing) -> None:
        """Of one layer: the busiest expert's share of the tokens times E (1 is balanced), idle experts, entropy, and
        the share of replayed choices that the router would not make itself."""
        load = routing.tokens_per_expert()
        name = f"experts/layer{routing.layer}"
        self.record(
            {
                f"{name}/max_load": float(load.max() * len(load) / load.sum()),
                f"{name}/idle": float((load == 0).sum()),
                f"{name}/entropy": float(routing.entropy()),
                f"{name}/replayed_differently": float(routing.replayed_differently()),
            }
        )

    # ---- optimization ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(parameter_groups(self))
        if self.lr_scheduler_factory is None:
            return optimizer
        schedule = self.lr_scheduler_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": scheduler_config(schedule, self.automatic_optimization)}

    def configure_callbacks(self) -> list[Callback]:
        """Before Lightning's checkpoints, so that they hold what a schedule has made of the step's metrics."""
        return [StepPlateau()]

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            optimizer = type(self.trainer.optimizers[0]).__name__
            print(f"precision: {self.precision().describe(optimizer)}", flush=True)

    def on_train_start(self) -> None:
        if self.lr_scheduler_factory is not None:
            check_rates(self.lr_scheduler_factory(self._sample_optimizer()), self.trainer.estimated_stepping_batches)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip to ``max_grad_norm``; log the norm before that. ``TrainingError`` if it is not finite."""
        norm = clip_grad_norm(self.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingError(f"step {self.global_step} was not taken: the gradient norm is {norm.item()}")
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of a model with adapters only the adapters: the rest is as it was in ``model.checkpoint``."""
        assert self.model is not None, "configure_model has not run"
        checkpoint[_ACCUMULATE] = self.trainer.accumulate_grad_batches
        origin = {
            "config": json.dumps(self.model.config.to_hf()),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint.resolve()),
            "tokenizer": None if self.tokenizer_dir is None else str(self.tokenizer_dir.resolve()),
            "lora": None if self.lora is None else json.dumps(asdict(self.lora)),
        }
        checkpoint[KEY] = {"format": FORMAT, "settings": self.settings(), "origin": origin}
        if self.lora is not None:
            adapters = adapter_state_dict(self).keys()
            for part in checkpoint.keys() & _WEIGHTS:
                checkpoint[part] = {name: checkpoint[part][name] for name in adapters}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse settings that the checkpoint was not trained with; adapt the count of finished micro-batches where a
        step now has another number of them (another world size)."""
        trains = self.trainer.state.fn == "fit"
        changed = refuse_changes(read_settings(checkpoint), self.settings(), trains)
        if trains and self.trainer.is_global_zero:
            taken = f"; changed, and taken from the config: {', '.join(changed[:8])}" if changed else ""
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            print(
                f"resume: step {checkpoint['global_step']}; weights, moments, schedule, data position and random "
                f"numbers are the checkpoint's{taken}{more}",
                flush=True,
            )
        if self.lora is not None and _AVERAGED in checkpoint:  # a callback that restores whole models
            for part in _WEIGHTS:
                checkpoint[part] = self.state_dict() | checkpoint[part]
        now, then = self.trainer.accumulate_grad_batches, checkpoint.get(_ACCUMULATE)
        if then in (None, now) or "loops" not in checkpoint:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            ready = counts["ready"]  # the others are as many, or one less where the last batch was still at its end
            counts.update({name: ready * now // then - (ready - count) for name, count in counts.items()})

    def settings(self) -> dict[str, Any]:
        """What this run is made of, as checkpoints keep it; see ``resuming``."""
        if self._settings is not None:
            return self._settings
        assert self.model is not None, "configure_model has not run"
        optimizer = self._sample_optimizer()
        facts: dict[str, Any] = {
            "config": {key: value for key, value in self.model.config.to_hf().items() if key != "initializer_range"},
            "optimizer": describe_part(optimizer, optimizer.defaults),
            "lr_scheduler": {"class_path": "none"},
            "lora": {"rank": "none"} if self.lora is None else asdict(self.lora) | {"base": self._base},
        }
        if self.lr_scheduler_factory is not None:
            schedule = self.lr_scheduler_factory(optimizer)
            facts["lr_scheduler"] = describe_part(schedule, schedule.state_dict())
        if self._tokenizer is not None:
            facts["tokenizer"] = self._tokenizer.fingerprint
        self._settings = dict(flatten({"model": {"facts": facts}})) | self.run_settings
        return self._settings

    def record(self, metrics: Mapping[str, float]) -> None:
        """Log numbers that not every step has. (``self.log`` repeats the last value until the epoch ends.)"""
        self._recorded |= metrics

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After all callbacks, in steps that are logged: hand what was recorded since the last one to the loggers."""
        is_step_complete = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._recorded and is_step_complete and every and self.trainer.global_step % every == 0:
            for logger in self.trainer.loggers:
                logger.log_metrics(self._recorded, step=self.trainer.global_step - 1)
            self._recorded = {}

    def gradient_scale(self) -> float:
        """What a loss is multiplied by so that gradients *add up* over micro-batches and over processes with different
        rows, where Lightning and its strategies take means."""
        return float(self.trainer.accumulate_grad_batches * rows_at_once(self.trainer)[0])
