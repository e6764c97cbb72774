"""Held-out pass@1 beside training: one version a point, nothing mixed after a kill, and no failure reaches training."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_trials import PUSH_EVERY_K, make_task, play_script
from faulty_runner import one_server_runner
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rollout_fakes import EchoHarness, FakeVerifier, by_index
from scripted_vllm import reply
from small_runs import quiet_trainer

from north_lightning.callbacks import (
    JSONLHistory,
    OnlineEvaluation,
    RolloutProducerCallback,
    SidecarCallback,
    WeightSyncCallback,
)
from north_lightning.data import RolloutDataModule
from north_lightning.errors import ConfigError, SidecarError
from north_lightning.evaluation.attempts import read_attempts
from north_lightning.evaluation.online import OnlineEvaluator, PointSpec, Snapshot, choose_tasks, keep_points
from north_lightning.evaluation.statistics import rate_interval
from north_lightning.faults import FakeSidecar, FakeVLLM, NoSandboxes
from north_lightning.history import read_history
from north_lightning.losses import CISPOLoss
from north_lightning.modules import CISPOModule
from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.types import Task

NUM_TASKS, NUM_SAMPLES = 5, 2


class Served(FakeVLLM):
    """Calls ``on_choice`` with itself and the number of the request before it answers."""

    def __init__(self, on_choice: Callable[[FakeVLLM, int], None], **settings: Any) -> None:
        super().__init__(reply, **settings)
        self.on_choice, self.num_choices = on_choice, 0

    def choice(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.num_choices += 1
        self.on_choice(self, self.num_choices)
        return super().choice(request)


class OwnSidecar(FakeSidecar):
    """The evaluation's server; ``servers`` are all that were started."""

    def __init__(self, model_dir: Path, log_path: Path, on_choice: Callable[[FakeVLLM, int], None]) -> None:
        super().__init__(model_dir, log_path, max_model_len=2000)
        self.on_choice, self.servers = on_choice, list[Served]()

    def make_server(self, port: int) -> FakeVLLM:
        self.servers.append(Served(self.on_choice, port=port))
        return self.servers[-1]


def nothing(server: FakeVLLM, number: int) -> None: ...


@pytest.fixture
def evaluator(inputs: Path, tmp_path: Path) -> Iterator[Callable[..., OnlineEvaluator]]:
    """Makes evaluators that write in the same folder."""
    play_script(inputs)
    made: list[OnlineEvaluator] = []

    def make(on_choice: Callable[[FakeVLLM, int], None] = nothing) -> OnlineEvaluator:
        tasks = [make_task(inputs / f"task{index}", name=f"task{index}") for index in range(NUM_TASKS)]
        make_runner = partial(one_server_runner, inputs / "tokenizer")
        spec = PointSpec(tasks, make_runner, NUM_SAMPLES, concurrency=2, seed=0)
        sidecar = OwnSidecar(inputs / "checkpoint", tmp_path / "vllm.log", on_choice)
        made.append(OnlineEvaluator(sidecar, SharedMemoryTransport, spec, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.stop()
    assert not multiprocessing.active_children()


def weights(value: float, step: int = 8, version: int = 2) -> Snapshot:
    return Snapshot(step, version, [("one", torch.full((3, 2), value)), ("other", torch.arange(4.0))])


def server_of(evaluator: OnlineEvaluator) -> Served:
    sidecar: Any = evaluator._sidecar
    return sidecar.servers[-1]


def test_a_point_is_of_the_pushed_weights_and_belongs_to_their_step(
    evaluator: Callable[..., OnlineEvaluator], tmp_path: Path
) -> None:
    one = evaluator()
    one.begin(weights(0.5))
    assert one.finish(60)
    (point,) = one.take()
    assert one.take() == []
    low, high = rate_interval([0.5] * NUM_TASKS)  # of each task's two attempts the second succeeds
    assert (point["step"], point["eval/policy_version"]) == (8, 2)
    assert (point["eval/pass@1"], point["eval/pass@1/low"], point["eval/pass@1/high"]) == (0.5, low, high)
    assert point["eval/terminal/pass@1"] == 0.5
    assert (point["eval/num_tasks"], point["eval/num_attempts"], point["eval/num_errors"]) == (5, 10, 0)
    assert read_history(tmp_path / "points.jsonl") == [point]
    server = server_of(one)
    assert server.weights["one"] == torch.full((3, 2), 0.5).numpy().tobytes()
    assert server.version == "2"
    attempts = read_attempts(tmp_path / "attempts.jsonl")
    assert {attempt.weights for attempt in attempts} == {weights(0.5).digest()} == {point["weights"]}
    one.begin(weights(0.25, step=16, version=4))
    assert one.finish(60)
    assert server.version == "4"
    assert [point["step"] for point in one.take()] == [16]


def test_attempts_of_other_weights_never_count(
    evaluator: Callable[..., OnlineEvaluator], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def push_of_another(server: FakeVLLM, number: int) -> None:
        if number == 6:
            server.version = "77"

    one = evaluator(push_of_another)
    one.begin(weights(0.5))
    assert one.finish(60)
    assert [point["eval/num_errors"] for point in one.take()] == [0]  # pushed again, and those attempts made again
    assert "policy version 2 only, got [77]" in caplog.text
    assert "tried again" in caplog.text


@pytest.mark.parametrize("killed", ["server", "process"])
def test_a_point_goes_on_after_a_death(
    killed: str, evaluator: Callable[..., OnlineEvaluator], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    struck: list[int] = []

    def strike(server: FakeVLLM, number: int) -> None:
        if number == 12 and not struck:
            struck.append(len(read_attempts(tmp_path / "attempts.jsonl")))
            if killed == "server":
                server.kill()
            else:
                (process,) = multiprocessing.active_children()
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)

    one = evaluator(strike)
    one.begin(weights(0.5))
    assert one.finish(90)
    (point,) = one.take()
    assert (point["eval/pass@1"], point["eval/num_attempts"], point["eval/num_errors"]) == (0.5, 10, 0)
    assert struck
    assert 0 < struck[0] < 10
    assert "it is tried again" in caplog.text
    scored = [attempt.key for attempt in read_attempts(tmp_path / "attempts.jsonl") if attempt.error is None]
    assert len(scored) == len(set(scored)) == 10  # what was recorded is not made again


def test_a_cut_off_point_goes_on_with_the_same_weights_only(
    evaluator: Callable[..., OnlineEvaluator], tmp_path: Path
) -> None:
    one = evaluator(lambda server, number: time.sleep(0.05))
    one.begin(weights(0.5))
    while len(read_attempts(tmp_path / "attempts.jsonl")) < 3:
        time.sleep(0.01)
    one.stop()
    assert one.take() == []
    earlier = len(read_attempts(tmp_path / "attempts.jsonl"))
    assert earlier < 10
    assert not any(attempt.error for attempt in read_attempts(tmp_path / "attempts.jsonl"))
    for value, num_new in ((0.5, 10 - earlier), (0.75, 10)):
        before = len(read_attempts(tmp_path / "attempts.jsonl"))
        again = evaluator()
        again.begin(weights(value))
        assert again.finish(60)
        assert [point["eval/num_attempts"] for point in again.take()] == [10]
        assert len(read_attempts(tmp_path / "attempts.jsonl")) - before == num_new


def test_a_point_that_fails_twice_is_lost_and_said(
    evaluator: Callable[..., OnlineEvaluator], caplog: pytest.LogCaptureFixture
) -> None:
    one = evaluator()
    starts: list[int] = []

    def start() -> None:
        starts.append(1)
        raise SidecarError("no memory")

    one._sidecar.start = start  # type: ignore[method-assign]
    one.begin(weights(0.5))
    assert one.finish(60)
    assert (one.take(), len(starts)) == ([], 2)
    assert "evaluation of step 8: SidecarError: no memory; the point is lost" in caplog.text


def test_after_a_resume_the_points_of_lost_steps_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    assert keep_points(path, 10) == []
    path.write_text('{"step": 0}\n{"step": 8}\n{"step": 16}\n{"ste')
    assert keep_points(path, 8) == read_history(path) == [{"step": 0}, {"step": 8}]


def test_a_subset_is_taken_evenly_from_all_families() -> None:
    def task(family: str, index: int) -> Task:
        return Task(f"{family}-{index}", "terminal", family, "", Path(), 1)

    tasks = [*(task("a", i) for i in range(60)), *(task("b", i) for i in range(30)), task("c", 0)]
    chosen = choose_tasks(tasks[::-1], 31)
    assert chosen == choose_tasks(tasks, 31)
    assert [sum(one.family == family for one in chosen) for family in "abc"] == [20, 10, 1]
    assert len(choose_tasks(tasks, None)) == 91
    with pytest.raises(ConfigError, match="num_tasks: expected at most the 91"):
        choose_tasks(tasks, 92)


# ---- in the trainer --------------------------------------------------------------------------------------------------


class WaitsForPoints(Callback):
    """So that a loop of fakes, which is over at once, skips none."""

    def __init__(self, evaluation: OnlineEvaluation) -> None:
        self.evaluation = evaluation

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.evaluation._evaluator is not None:
            assert self.evaluation._evaluator.finish(60)


class Kills(Callback):
    """Ends the run with an error after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("far enough")


class Recorder(Callback):
    """What monitors see after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["eval/pass@1"]))


def write_tasks(folder: Path, count: int) -> Path:
    for index in range(count):
        task = make_task(folder / f"{folder.name}{index}", name=f"{folder.name}{index}")
        (task.directory / "instruction.md").write_text(task.instruction)
        (task.directory / "tests").mkdir(exist_ok=True)
        (task.directory / "tests" / "test.sh").write_text("exit 0\n")
        (task.directory / "task.toml").write_text('[metadata]\nfamily = "echo"\nenvironment = "terminal"\n')
    return folder


def settings() -> RolloutSettings:
    return RolloutSettings(
        harnesses={"terminal": EchoHarness()},
        verifier=FakeVerifier(by_index),
        sandboxes=NoSandboxes(),
        max_turn_tokens=200,
        max_context_tokens=1900,
    )


def fit(inputs: Path, run_dir: Path, further: list[Callback], resume: Path | None = None, **trainer: Any) -> Trainer:
    play_script(inputs)
    seed_everything(0, verbose=False)
    training, heldout = write_tasks(run_dir.parent / "train", 3), write_tasks(run_dir.parent / "heldout", 4)
    sidecar = partial(OwnSidecar, on_choice=nothing)
    evaluation = OnlineEvaluation([heldout], 4, sidecar, num_samples=NUM_SAMPLES)
    callbacks = [
        SidecarCallback(sidecar),
        WeightSyncCallback(PUSH_EVERY_K),
        RolloutProducerCallback([training], settings(), group_size=2, max_concurrent_groups=2),
        evaluation,
        WaitsForPoints(evaluation),
        *further,
    ]
    module = CISPOModule(CISPOLoss(), checkpoint=inputs / "checkpoint", optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
    data = RolloutDataModule(WindowedFIFOQueue(2, 1), 2, max_row_tokens=4000, num_batches=10)
    made = quiet_trainer(
        run_dir, max_steps=10, callbacks=callbacks, logger=JSONLHistory(run_dir), enable_checkpointing=True, **trainer
    )
    for callback in callbacks:
        if hasattr(callback, "check_run"):
            callback.check_run(made, module, data)
    made.fit(module, data, ckpt_path=resume)
    return made


def test_points_are_logged_monitored_and_kept_by_a_resume(inputs: Path, tmp_path: Path) -> None:
    run_dir, recorder = tmp_path / "run", Recorder()
    saved = partial(ModelCheckpoint, tmp_path / "saved", monitor="eval/pass@1", mode="max", every_n_train_steps=1)
    with pytest.raises(KeyError, match="far enough"):
        fit(inputs, run_dir, [recorder, first := saved(save_top_k=2, filename="{step}"), Kills(7)])
    points = read_history(run_dir / "eval" / "points.jsonl")
    assert [(point["step"], point["eval/policy_version"]) for point in points] == [(0, 0), (4, 2)]
    assert [value == value for value in recorder.seen] == [False] + [True] * 6  # the first step does not wait
    assert first.best_model_score is not None
    assert float(first.best_model_score) == 0.5
    logged = [line for line in read_history(run_dir / "history.jsonl") if "eval/pass@1" in line]
    assert [line["eval/step"] for line in logged] == [0, 4]
    assert all(line["step"] >= line["eval/step"] for line in logged)

    checkpoint = tmp_path / "last.ckpt"
    resumed = fit(
        inputs, run_dir, [ModelCheckpoint(tmp_path, filename="last")], sorted((tmp_path / "saved").glob("*"))[-1]
    )
    assert resumed.global_step == 10
    assert checkpoint.exists()
    again = read_history(run_dir / "eval" / "points.jsonl")
    assert [point["step"] for point in again][:2] == [0, 4][: len(again)]
    assert {point["step"] for point in again} >= {0, 8}
    assert points[0] == again[0]
    assert not multiprocessing.active_children()


def test_a_trial_run_evaluates_nothing(inputs: Path, tmp_path: Path) -> None:
    fit(inputs, tmp_path / "run", [], fast_dev_run=True)
    assert not (tmp_path / "run" / "eval").exists()


class NotFree:
    step = 0
    is_free = False


def test_a_point_that_is_due_too_early_is_skipped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = OnlineEvaluation([Path()], 4)
    evaluation._evaluator, evaluation._step = NotFree(), 4  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        assert not evaluation._is_free()
    assert "the evaluation of step 4 is skipped: that of step 0 is not over" in caplog.text


@pytest.mark.parametrize(
    ("every", "heldout", "is_first", "message"),
    [
        (6, "heldout", False, r"every_n_steps: expected a multiple of WeightSyncCallback.every_n_steps, 4, got 6"),
        (4, "train", False, r"task_sets: expected held-out tasks, got 3 that are trained on, such as train0"),
        (4, "heldout", True, r"expected the OnlineEvaluation after the WeightSyncCallback"),
    ],
)
def test_what_would_make_the_points_worthless_is_refused(
    every: int, heldout: str, is_first: bool, message: str, inputs: Path, tmp_path: Path
) -> None:
    write_tasks(tmp_path / "train", 3)
    write_tasks(tmp_path / "heldout", 3)
    evaluation = OnlineEvaluation([tmp_path / heldout], every, partial(OwnSidecar, on_choice=nothing))
    callbacks: list[Any] = [WeightSyncCallback(4), RolloutProducerCallback([tmp_path / "train"], settings())]
    callbacks.insert(0 if is_first else 2, evaluation)
    trainer: Any = SimpleNamespace(callbacks=callbacks, is_global_zero=True, default_root_dir=tmp_path / "run")
    module: LightningModule = CISPOModule(CISPOLoss(), checkpoint=inputs / "checkpoint")
    with pytest.raises(ConfigError, match=message):
        evaluation.check_run(trainer, module, None)
