"""WeightSyncCallback and SidecarCallback: when weights are pushed, how old tokens are, what a failure does."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import quiet_trainer, write_run_inputs
from torch import Tensor

from north_lightning.callbacks import HFCheckpoint, JSONLHistory, SidecarCallback, TimeAccounts, WeightSyncCallback
from north_lightning.callbacks.sidecar import running_sidecar
from north_lightning.data import RolloutDataModule
from north_lightning.errors import ConfigError, SidecarError, TrainingError, WeightPushError
from north_lightning.history import read_history
from north_lightning.interfaces import RolloutQueue, WeightTransport
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, named_hf_tensors, save_checkpoint
from north_lightning.modules import CISPOModule
from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.types import NOT_SAMPLED, Reward, Rollout, RolloutGroup, Turn


class FakeSidecar:
    """Nothing runs; it remembers whether it was started and stopped, and dies when told to."""

    can_return_routed_experts = False

    def __init__(self, model_dir: Path, log_path: Path) -> None:
        self.model_dir, self.log_path = model_dir, log_path
        self.url = "http://127.0.0.1:1"
        self.vocab_size: int | None = None
        self.environment: dict[str, str] = {}
        self.events: list[str] = []
        self.is_dead = False
        self.can_be_revived = True

    def start(self) -> None:
        self.events.append("start")
        self.is_dead = self.is_dead and not self.can_be_revived

    def stop(self, timeout_s: float = 10.0) -> None:
        self.events.append("stop")

    def dies_and_is_up_again(self) -> None:
        """Returns when it is: so long takes what the trainer does meanwhile."""
        num_starts = self.events.count("start")
        self.is_dead = True
        while self.events.count("start") == num_starts:
            time.sleep(0.001)

    def check_alive(self) -> None:
        if self.is_dead:
            raise SidecarError("the vLLM sidecar was killed by SIGKILL")


class FakeTransport(WeightTransport):
    """Keeps what was pushed; the pushes whose numbers are in ``failing`` fail."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = failing
        self.attempts = 0
        self.pushed: list[tuple[int, dict[str, Tensor]]] = []

    @property
    def served(self) -> int:
        return self.pushed[-1][0] if self.pushed else 0

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.attempts += 1
        content = {name: tensor.detach().clone() for name, tensor in tensors}
        if self.attempts in self.failing:
            raise WeightPushError("not confirmed")
        self.pushed.append((version, content))


class InstantQueue(WindowedFIFOQueue):
    """Every free slot is filled at once with a group sampled from what the transport serves at that moment."""

    def __init__(
        self,
        transport: FakeTransport,
        max_batches_ahead: int = 2,
        make: Callable[[int, int], RolloutGroup] | None = None,
    ) -> None:
        super().__init__(groups_per_batch=2, max_batches_ahead=max_batches_ahead, window=2)
        self.transport = transport
        self.make = make or make_group
        self.fill()

    def fill(self) -> None:
        while (group_id := self.admit()) is not None:
            self.complete(self.make(group_id, self.transport.served))

    def release(self, group_ids: Iterable[int]) -> None:
        super().release(group_ids)
        self.fill()


def make_group(group_id: int, version: int) -> RolloutGroup:
    generator = torch.Generator().manual_seed(group_id)
    group = RolloutGroup(group_id, f"task{group_id}", "terminal", [])
    for index, reward in enumerate((1.0, 0.0)):
        tokens = torch.randint(10, 390, (12,), generator=generator).tolist()
        rollout = Rollout(group.task_id, "terminal", "family", group_id, index, 0, tokens)
        rollout.loss_mask = [False] * 6 + [True] * 6
        rollout.rollout_logprobs = [0.0] * 6 + [-6.0] * 6
        rollout.policy_versions = [NOT_SAMPLED] * 6 + [version] * 6
        rollout.turns = [Turn(6, 12, "stop")]
        rollout.reward, rollout.advantage = Reward(reward), 2 * reward - 1
        group.rollouts.append(rollout)
    return group


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_run_inputs(folder)
    model = NorthModel(NorthConfig.load(folder / "model.json"))
    save_checkpoint(model, folder / "checkpoint", tokenizer_dir=folder / "tokenizer")
    return folder / "checkpoint"


class Run:
    """One RL run with fakes."""

    def __init__(self, checkpoint: Path, run_dir: Path, transport: FakeTransport, **settings: object) -> None:
        self.checkpoint, self.run_dir, self.transport = checkpoint, run_dir, transport
        self.sidecars: list[FakeSidecar] = []
        self.sync = WeightSyncCallback(every_n_steps=4, transport=lambda url: transport, **settings)
        self.module = CISPOModule(loss=CISPOLoss(), checkpoint=checkpoint)

    def fit(self, steps: int, *callbacks: Callback, queue: WindowedFIFOQueue | None = None, **settings: object) -> None:
        queue = queue or InstantQueue(self.transport)
        data = RolloutDataModule(queue, groups_per_batch=2, max_row_tokens=100, num_batches=1000)
        trainer = quiet_trainer(
            self.run_dir,
            max_steps=steps,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            logger=JSONLHistory(self.run_dir),
            callbacks=[SidecarCallback(self.make_sidecar, look_every_s=0.001), self.sync, *callbacks],
        )
        trainer.fit(self.module, datamodule=data, **settings)

    def make_sidecar(self, model_dir: Path, log_path: Path) -> FakeSidecar:
        self.sidecars.append(FakeSidecar(model_dir, log_path))
        return self.sidecars[-1]


def test_weights_are_pushed_every_k_optimizer_steps_and_are_the_trained_ones(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())
    run.fit(9)
    assert [version for version, _ in run.transport.pushed] == [1, 2]
    assert run.sync.published_at == {0: 0, 1: 4, 2: 8}
    start = dict(named_hf_tensors(load_checkpoint(checkpoint)))
    _, pushed = run.transport.pushed[0]
    assert pushed.keys() == start.keys()
    assert any(not torch.equal(pushed[name], start[name]) for name in start)


@pytest.mark.parametrize("solves", [False, True])
def test_a_run_in_which_nothing_could_be_learned_says_so(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, solves: bool
) -> None:
    def group_of_equals(group_id: int, version: int) -> RolloutGroup:
        group = make_group(group_id, version)
        for rollout in group.rollouts:
            rollout.reward, rollout.advantage = Reward(0.0), 0.0
        return make_group(group_id, version) if solves and group_id == 1 else group

    run = Run(checkpoint, tmp_path, FakeTransport())
    queue = InstantQueue(run.transport, make=group_of_equals)
    run.fit(2, queue=queue)
    said = "nothing was learned: in each of the 4 groups that were trained, all attempts had the same reward"
    assert (said in caplog.text) is not solves


def test_policy_lag_counts_optimizer_steps_since_publication_and_stays_within_the_queues_bound(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())
    run.fit(16)
    history = read_history(tmp_path / "history.jsonl")
    # Three batches fill the slots before step 0. A slot freed by step m is sampled from the weights of step
    # 4 * (m // 4) and trained in step m + 2, because releasing comes after pushing.
    expected = [float(step if step < 3 else step - 4 * ((step - 2) // 4)) for step in range(16)]
    assert [line["policy_lag/max"] for line in history] == expected
    bound = InstantQueue(FakeTransport()).max_policy_lag(4)
    assert {line["policy_lag/bound"] for line in history} == {bound}
    assert max(expected) <= bound


def test_a_batch_older_than_the_bound_is_refused_and_its_group_named(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport(), max_policy_lag=2)
    with pytest.raises(
        TrainingError, match=r"group 6 \(task task6\): expected tokens at most 2 optimizer steps old, got 3"
    ):
        run.fit(16)


def test_tokens_of_weights_that_were_never_published_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())
    run.transport.pushed.append((7, {}))
    with pytest.raises(TrainingError, match=r"never published \(versions \[7\]\)"):
        run.fit(4)


def test_a_failed_push_is_tried_again_under_the_same_version(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport(failing=(1, 2)))
    run.fit(9)
    assert [version for version, _ in run.transport.pushed] == [1, 2]
    assert run.transport.attempts == 4


def test_a_push_that_keeps_failing_ends_training_and_stops_the_sidecar(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport(failing=(1, 2, 3)))
    with pytest.raises(WeightPushError):
        run.fit(9)
    assert run.sync.version == 0
    assert run.sidecars[0].events == ["start", "stop"]


def test_groups_are_released_after_the_push_and_before_a_checkpoint_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())
    run.fit(8, ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1))
    for path in (tmp_path / "saved").iterdir():
        saved = torch.load(path, weights_only=True)
        state = saved["RolloutDataModule"]["queue"]
        assert state["num_trained"] == 2 * saved["global_step"]  # every group that was trained counts as trained


def test_a_resumed_run_pushes_its_weights_under_the_next_version_before_it_trains(
    checkpoint: Path, tmp_path: Path
) -> None:
    first = Run(checkpoint, tmp_path, FakeTransport())
    first.fit(6, ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, filename="six"))
    transport = FakeTransport()
    second = Run(checkpoint, tmp_path, transport)
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=2, window=2)

    class FillAfterStart(Callback):
        """The producer starts at the same moment."""

        def on_train_start(self, trainer: object, pl_module: object) -> None:
            while (group_id := queue.admit()) is not None:
                queue.complete(make_group(group_id, transport.served))

    second.fit(8, FillAfterStart(), queue=queue, ckpt_path=tmp_path / "saved" / "six.ckpt", weights_only=True)
    assert [version for version, _ in transport.pushed] == [2, 3]  # on resuming, and after step 8
    assert second.sync.published_at == {0: 0, 1: 4, 2: 6, 3: 8}
    trained = dict(named_hf_tensors(first.module.model))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in transport.pushed[0][1].items())


class SidecarDies(Callback):
    """In the step after step 3, at the end of which a push is due; the step takes until another one is up."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: object) -> None:
        events = self.run.sidecars[0].events
        running_sidecar(trainer).around_restart(lambda: events.append("suspend"), lambda: events.append("resume"))

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            self.run.sidecars[0].dies_and_is_up_again()


def test_a_server_that_dies_in_a_step_is_up_at_its_end_and_gets_the_weights_of_now_before_it_is_sampled_from(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())

    class TellsOfPushes(FakeTransport):
        def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
            super().push(tensors, version)
            run.sidecars[0].events.append(f"version {version}")

    run.transport = transport = TellsOfPushes()
    run.sync = WeightSyncCallback(every_n_steps=4, transport=lambda url: transport)
    run.fit(9, SidecarDies(run))
    events = run.sidecars[0].events
    before = ["start", "suspend", "stop", "start", "version 1", "resume"]
    assert events == [*before, "version 2", "version 3", "stop"]  # the push of step 4 was due all the same
    assert run.sync.published_at == {0: 0, 1: 4, 2: 4, 3: 8}
    first, second = (content for _, content in run.transport.pushed[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_push_that_fails_because_the_sidecar_died_goes_to_the_new_one_once(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())

    class DiesInThePush(FakeTransport):
        def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
            if not self.attempts:
                run.sidecars[0].is_dead = True
                self.failing = (1,)
            super().push(tensors, version)

    run.transport = transport = DiesInThePush()
    run.sync = WeightSyncCallback(every_n_steps=4, transport=lambda url: transport)
    run.fit(9)
    assert run.sidecars[0].events == ["start", "stop", "start", "stop"]
    assert [version for version, _ in transport.pushed] == [1, 2]
    assert run.sync.published_at == {0: 0, 1: 4, 2: 8}


def test_a_sidecar_that_dies_again_and_again_ends_training_with_its_own_error(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())

    class KillsTheSidecar(Callback):
        def on_train_start(self, trainer: object, pl_module: object) -> None:
            run.sidecars[0].is_dead, run.sidecars[0].can_be_revived = True, False

    never_filled = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=2)
    with pytest.raises(SidecarError, match="killed by SIGKILL"):
        run.fit(4, KillsTheSidecar(), queue=never_filled)
    assert run.sidecars[0].events == ["start", *["stop", "start"] * 3, "stop"]


def test_the_sidecar_serves_the_modules_checkpoint_and_is_stopped_at_the_end(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())
    run.fit(2)
    (sidecar,) = run.sidecars
    assert sidecar.model_dir == checkpoint
    assert sidecar.log_path == tmp_path / "sidecar.log"
    assert sidecar.vocab_size == 400
    assert sidecar.events == ["start", "stop"]


def test_reinforcement_learning_from_random_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    run = Run(checkpoint, tmp_path, FakeTransport())
    run.module = CISPOModule(loss=CISPOLoss(), config=checkpoint / "config.json", tokenizer=checkpoint)
    with pytest.raises(ConfigError, match=r"model\.checkpoint: expected a folder"):
        run.fit(2)


class SlowTransport(FakeTransport):
    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().push(tensors, version)
        time.sleep(0.2)


class WallClock(Callback):
    """Measured beside the accounts, from outside."""

    def on_train_start(self, *_: object) -> None:
        self.started = time.monotonic()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.started


def test_the_accounts_of_time_add_up_to_the_wall_time_and_every_step_to_one(checkpoint: Path, tmp_path: Path) -> None:
    run, accounts, clock = Run(checkpoint, tmp_path, SlowTransport()), TimeAccounts(), WallClock()
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4)
    run.fit(9, HFCheckpoint(every_n_steps=3), accounts, clock, saving)
    written = json.loads((tmp_path / "time.json").read_text())["trainer_s"]
    assert sum(written.values()) == pytest.approx(clock.seconds, abs=0.3)  # less than the pushes took
    assert all(seconds >= 0 for seconds in written.values())
    assert written["push"] >= 2 * 0.2
    assert written["checkpoint"] > 0
    assert written["forward_backward"] > 0
    assert written["optimizer"] > 0
    for line in read_history(tmp_path / "history.jsonl"):
        assert sum(value for name, value in line.items() if name.startswith("time/")) == pytest.approx(1)
    with_push = [line["time/push"] for line in read_history(tmp_path / "history.jsonl")]
    assert [share > 0 for share in with_push] == [step in (3, 7) for step in range(9)]


def test_one_server_is_started_for_each_environment_and_the_transport_knows_all(
    checkpoint: Path, tmp_path: Path
) -> None:
    run, urls = Run(checkpoint, tmp_path, FakeTransport()), []

    def make(model_dir: Path, log_path: Path) -> FakeSidecar:
        sidecar = run.make_sidecar(model_dir, log_path)
        sidecar.url = f"http://127.0.0.1:{len(run.sidecars)}"
        return sidecar

    def make_transport(given: list[str]) -> FakeTransport:
        urls.extend(given)
        return run.transport

    class KillsTheSecond(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 3:
                run.sidecars[1].dies_and_is_up_again()

    run.sync = WeightSyncCallback(every_n_steps=4, transport=make_transport)
    data = RolloutDataModule(InstantQueue(run.transport), 2, max_row_tokens=100, num_batches=1000)
    environments = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    callbacks = [SidecarCallback(make, environments=environments, look_every_s=0.001), run.sync, KillsTheSecond()]
    quiet_trainer(tmp_path, max_steps=5, callbacks=callbacks).fit(run.module, datamodule=data)
    first, second = run.sidecars
    assert [first.environment, second.environment] == environments
    assert [first.log_path.name, second.log_path.name] == ["sidecar.log", "sidecar1.log"]
    assert urls == [first.url, second.url]
    assert first.events == ["start", "stop"]  # not touched by the other's death
    assert second.events == ["start", "stop", "start", "stop"]
    assert run.sync.published_at == {0: 0, 1: 4, 2: 4}  # to all when the second was up again, and as was due
    with pytest.raises(ConfigError, match="environments: expected an entry for every server"):
        SidecarCallback(environments=[])


def test_a_queue_that_says_nothing_of_its_bound_is_refused_before_a_server_starts() -> None:
    class Silent(WindowedFIFOQueue):
        max_policy_lag = RolloutQueue.max_policy_lag

    data = RolloutDataModule(Silent(2, 1))
    with pytest.raises(ConfigError, match="max_policy_lag: expected a number .* the queue Silent does not say"):
        WeightSyncCallback().check_run(None, None, data)
    WeightSyncCallback(max_policy_lag=3).check_run(None, None, data)
    WeightSyncCallback().check_run(None, None, RolloutDataModule(WindowedFIFOQueue(2, 1)))
