"""From a bfloat16 checkpoint a run trains what it trains from the same weights in float32, or says why it cannot."""

from pathlib import Path

import precision_runs
import pytest
import torch
from launch import run_processes
from precision_runs import LR, STEPS, adamw, moved
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.errors import ConfigError
from north_lightning.model import LoRAConfig, NorthConfig, NorthModel, load_checkpoint, save_checkpoint
from north_lightning.model.precision import MOMENT_BYTES, Precision, choose_precision
from north_lightning.modules import SFTModule
from north_lightning.parallel import NorthStrategy


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, and one checkpoint stored twice: ``bf16``, and the same values as ``fp32``."""
    folder = write_run_inputs(tmp_path_factory.mktemp("inputs"))
    torch.manual_seed(3)
    model = NorthModel(NorthConfig.load(folder / "model.json"))
    save_checkpoint(model, folder / "bf16", dtype=torch.bfloat16, tokenizer_dir=folder / "tokenizer")
    same = load_checkpoint(folder / "bf16")
    save_checkpoint(same, folder / "fp32", dtype=torch.float32, tokenizer_dir=folder / "tokenizer")
    return folder


def share_changed(moves: dict[str, torch.Tensor]) -> float:
    """Of the weights outside the embedding, whose rows for absent tokens have no gradient."""
    inside = [torch.as_tensor(move).flatten() for name, move in moves.items() if "embedding" not in name]
    return float((torch.cat(inside) != 0).double().mean())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_from_bfloat16_as_many_weights_change_as_from_float32(inputs: Path, precision: str) -> None:
    bf16, fp32 = (moved(inputs, base, precision=precision) for base in ("bf16", "fp32"))
    assert share_changed(bf16) == share_changed(fp32) > 0.99
    for name, move in fp32.items():
        assert torch.equal(bf16[name], move), name  # the same values, and so the same steps


def test_adapters_change_as_from_float32_on_a_base_that_stays_bfloat16(inputs: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8.0)
    bf16, fp32 = (moved(inputs, base, lora=lora) for base in ("bf16", "fp32"))
    assert share_changed(bf16) == pytest.approx(share_changed(fp32), abs=0.02)
    assert share_changed(bf16) > 0.9


@pytest.mark.parametrize("num_processes", [1, 2])
def test_north_strategy_changes_as_many_weights_from_either(inputs: Path, num_processes: int) -> None:
    moves = run_processes(num_processes, precision_runs.moved_by_strategy, inputs, num_processes)[0]
    assert share_changed(moves["bf16"]) == share_changed(moves["fp32"]) > 0.99


def test_pure_bfloat16_with_stochastic_rounding_moves_weights_as_far_as_float32(inputs: Path) -> None:
    """Each weight moves by whole units in its last place or not at all; together they go the same way, as far."""
    optim = pytest.importorskip("torchao.optim")

    def rounding(parameters: object) -> torch.optim.Optimizer:
        return optim._AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, bf16_stochastic_round=True)

    with torch.compiler.set_stance("force_eager"):
        bf16 = moved(inputs, "bf16", rounding, precision="bf16-true")
    fp32 = moved(inputs, "fp32")
    actual, expected = (torch.cat([moves[name].flatten() for name in fp32]) for moves in (bf16, fp32))
    along = float((actual @ expected) / (expected @ expected))
    assert along == pytest.approx(1.0, abs=0.1)
    assert expected.abs().max() < STEPS * LR * 1.01


# ---- what is refused -------------------------------------------------------------------------------------------------


def check(
    inputs: Path, optimizer: object = adamw, strategy: NorthStrategy | None = None, **trainer: object
) -> Precision:
    module = SFTModule(checkpoint=inputs / "bf16", optimizer=optimizer)  # type: ignore[arg-type]
    trainer_ = quiet_trainer(inputs / "run", **({"strategy": strategy} if strategy else {}), **trainer)
    module.check_run(trainer_, module, None)
    return module.precision()


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_a_precision_that_nothing_is_trained_in_is_refused(inputs: Path, precision: str) -> None:
    if precision == "16-mixed":
        with pytest.raises(ConfigError, match=r"trainer\.precision: expected one of 32-true, bf16-mixed, bf16-true"):
            choose_precision(precision, None, False)
        return
    with pytest.raises(ConfigError, match=r"trainer\.precision: expected one of 32-true, bf16-mixed, bf16-true"):
        check(inputs, precision=precision)


def test_bfloat16_weights_need_an_optimizer_that_rounds_stochastically(inputs: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds stochastically.*got AdamW.*bf16-mixed"):
        check(inputs, precision="bf16-true")
    with pytest.raises(ConfigError, match=r"rounds stochastically.*parameter_dtype: float32"):
        check(inputs, strategy=NorthStrategy(parameter_dtype="bfloat16"))
    optim = pytest.importorskip("torchao.optim")
    with pytest.raises(ConfigError, match=r"betas: expected at most 1 - 1/256 where moments are bfloat16.*0\.999"):
        check(inputs, lambda parameters: optim._AdamW(parameters, bf16_stochastic_round=True), precision="bf16-true")
    eight_bit = check(inputs, lambda p: optim.AdamW8bit(p, bf16_stochastic_round=True), precision="bf16-true")
    assert eight_bit == Precision("bfloat16", "bfloat16")


def test_north_strategy_says_dtypes_itself(inputs: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision: expected 32-true with NorthStrategy.*compute_dtype"):
        check(inputs, strategy=NorthStrategy(), precision="bf16-mixed")
    chosen = check(inputs, strategy=NorthStrategy(compute_dtype="bfloat16"))
    assert chosen == Precision("float32", "bfloat16")


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "stored", "lora", "optimizer", "line"),
    [
        ("32-true", "bfloat16", False, "AdamW", "weights float32, .* moments float32, compute float32; 16 bytes"),
        ("bf16-mixed", "bfloat16", False, "AdamW", "weights float32, .* moments float32, compute bfloat16; 16 bytes"),
        ("bf16-true", "bfloat16", False, "_AdamW", "weights bfloat16, .* moments bfloat16, compute bfloat16; 8 bytes"),
        ("32-true", "bfloat16", True, "AdamW", "compute bfloat16; 16 .*adapters on frozen bfloat16 weights"),
        ("32-true", "float32", True, "AdamW8bit", "moments 8-bit, compute float32; 10 .* frozen float32 weights"),
        (None, None, False, "Muon", "moments as Muon keeps them, compute float32$"),
    ],
)
def test_what_is_chosen_is_one_line(precision, stored, lora, optimizer, line) -> None:
    import re

    assert re.search(line, choose_precision(precision, stored, lora).describe(optimizer))
    assert MOMENT_BYTES["bfloat16"] == 4.0
