"""RolloutDataModule: what reaches the loss, the denominator, waiting, and resume."""

import math
import threading
import time
from collections import deque
from itertools import pairwise

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException

from north_lightning.data.rollouts import RolloutDataModule, RolloutStep, make_step
from north_lightning.errors import ConfigError, DataError, InfrastructureError
from north_lightning.interfaces import PolicyLossInputs, RolloutQueue
from north_lightning.losses import CISPOLoss, token_logprobs, trained_positions
from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.types import NOT_SAMPLED, Message, Rollout, RolloutGroup, Turn


class ListQueue(RolloutQueue):
    """Groups in the order they were put in; remembers what was released."""

    def __init__(self, groups=()):
        self.groups = deque(groups)
        self.released = []
        self.taken = 0

    def admit(self):
        raise NotImplementedError

    def complete(self, group):
        self.groups.append(group)

    def drop(self, group_id, reason):
        raise NotImplementedError

    def take(self, num_groups):
        if len(self.groups) < num_groups:
            return None
        self.taken += num_groups
        return [self.groups.popleft() for _ in range(num_groups)]

    def release(self, group_ids):
        self.released += group_ids

    def end_of(self, group_id):
        return "trained" if group_id in self.released else None

    def stats(self):
        return {"depth": float(len(self.groups))}

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        for _ in range(state["taken"]):
            self.groups.popleft()
        self.taken = state["taken"]


def rollout(group_id, index, prompt, sampled, advantage, seed=0):
    """Prompt, sampled turn, observation of 2 tokens, sampled turn."""
    generator = torch.Generator().manual_seed(1000 * group_id + 10 * index + seed)
    pieces = [(prompt, False), (sampled, True), (2, False), (sampled, True)]
    mask = [trained for length, trained in pieces for _ in range(length)]
    ids = torch.randint(10, (len(mask),), generator=generator).tolist()
    logprobs = (-3 * torch.rand(len(mask), generator=generator)).tolist()
    return Rollout(
        task_id=f"task{group_id}",
        environment="terminal" if group_id % 2 else "swe",
        family="f",
        group_id=group_id,
        index=index,
        seed=0,
        token_ids=ids,
        loss_mask=mask,
        rollout_logprobs=[value if trained else 0.0 for value, trained in zip(logprobs, mask, strict=True)],
        policy_versions=[group_id if trained else NOT_SAMPLED for trained in mask],
        turns=[Turn(prompt, prompt + sampled, "stop")],
        messages=[Message("user", "hi")],
        advantage=advantage,
    )


def group(group_id, advantages, prompt=3, sampled=2):
    rollouts = [rollout(group_id, i, prompt + i, sampled + i, advantage) for i, advantage in enumerate(advantages)]
    return RolloutGroup(group_id, f"task{group_id}", "terminal", rollouts)


GROUPS = [group(0, [1.0, 0.0, -0.5]), group(1, [0.0, 0.0, 0.0]), group(2, [0.25, -0.25, 0.0])]


def split_documents(batch):
    bounds = batch.cu_seqlens.tolist()
    return [{name: getattr(batch, name)[start:end].tolist() for name in FIELDS} for start, end in pairwise(bounds)]


FIELDS = ("token_ids", "loss_mask", "rollout_logprobs", "policy_versions", "advantages")


def test_every_token_of_a_rollout_arrives_with_its_logprob_version_and_advantage():
    step = make_step(GROUPS, max_row_tokens=40)
    documents = [document for batch in step.micro_batches for document in split_documents(batch)]
    expected = [r for g in GROUPS for r in g.rollouts if r.advantage]
    assert len(documents) == len(expected) == 4
    for wanted in expected:
        (found,) = [d for d in documents if d["token_ids"] == wanted.token_ids]
        assert found["loss_mask"] == wanted.loss_mask
        assert found["policy_versions"] == wanted.policy_versions
        assert found["rollout_logprobs"] == pytest.approx(wanted.rollout_logprobs)
        assert found["advantages"] == [wanted.advantage if trained else 0.0 for trained in wanted.loss_mask]
    assert step.groups == GROUPS
    assert step.num_trained_tokens == sum(r.num_sampled_tokens for g in GROUPS for r in g.rollouts)
    assert {batch.num_trained_tokens for batch in step.micro_batches} == {step.num_trained_tokens}


def test_a_loss_that_has_more_than_advantages_sees_every_rollout():
    step = make_step(GROUPS, max_row_tokens=40, skip_zero_advantage=False)
    documents = [document for batch in step.micro_batches for document in split_documents(batch)]
    sampled = [r for g in GROUPS for r in g.rollouts if r.num_sampled_tokens]
    assert sorted(d["token_ids"] for d in documents) == sorted(r.token_ids for r in sampled)
    assert len(documents) > 4


def test_another_batch_size_than_the_queues_is_refused():
    with pytest.raises(ConfigError, match=r"data.groups_per_batch: expected the queue's groups_per_batch, 8, got 4"):
        RolloutDataModule(WindowedFIFOQueue(8, 1), groups_per_batch=4, max_row_tokens=40, num_batches=1)


def test_rows_have_the_documented_types_and_names_of_environments():
    for batch in make_step(GROUPS, 40).micro_batches:
        assert batch.token_ids.dtype == batch.policy_versions.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.loss_mask.dtype == torch.bool
        assert batch.rollout_logprobs.dtype == batch.advantages.dtype == torch.float32
        assert set(batch.sources) == {"swe"}
        assert len(batch.sources) == len(batch.cu_seqlens) - 1


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=4), min_size=1, max_size=5),
    extra=st.integers(0, 60),
    num_at_once=st.integers(2, 5),
)
def test_rows_come_in_as_many_as_are_computed_at_once_and_hold_the_same_rollouts(shapes, extra, num_at_once):
    groups = [group(i, advantages) for i, advantages in enumerate(shapes)]
    longest = max(len(r.token_ids) for g in groups for r in g.rollouts)
    alone, together = make_step(groups, longest + extra), make_step(groups, longest + extra, num_at_once=num_at_once)
    assert len(together.micro_batches) % num_at_once == 0
    assert all(len(batch.token_ids) <= longest + extra for batch in together.micro_batches)
    assert together.num_tokens == sum(len(batch.token_ids) for batch in together.micro_batches)
    trained, idle = [], []
    for batch in together.micro_batches:
        (trained if batch.loss_mask.any() else idle).append(batch)
        assert batch.num_trained_tokens == alone.num_trained_tokens
    assert len(idle) < num_at_once
    assert not any(batch.advantages.any() for batch in idle)
    documents = [
        sorted((d["token_ids"], d["advantages"]) for batch in batches for d in split_documents(batch))
        for batches in (alone.micro_batches, trained)
    ]
    assert documents[0] == documents[1]
    if idle:  # nothing was left to split
        assert all(len(batch.cu_seqlens) == 2 for batch in trained)
    lengths = [len(batch.token_ids) for batch in trained]
    assert lengths == sorted(lengths, reverse=True)


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=4), min_size=1, max_size=5),
    extra=st.integers(0, 60),
)
def test_micro_rows_never_overflow_and_hold_each_rollout_with_advantage_once(shapes, extra):
    groups = [group(i, advantages) for i, advantages in enumerate(shapes)]
    longest = max(len(r.token_ids) for g in groups for r in g.rollouts)
    step = make_step(groups, longest + extra)
    assert all(len(batch.token_ids) <= longest + extra for batch in step.micro_batches)
    with_advantage = sorted(r.token_ids for g in groups for r in g.rollouts if r.advantage)
    found = sorted(d["token_ids"] for batch in step.micro_batches for d in split_documents(batch))
    assert found == with_advantage or (not with_advantage and len(found) == 1)


# ---- the loss ------------------------------------------------------------------------------------------------------


def gradient(rows, total):
    """CISPO over rows through a model that sees one token."""
    torch.manual_seed(0)
    weight = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    loss = 0.0
    for batch in rows:
        source, targets = trained_positions(batch.token_ids, batch.cu_seqlens, batch.loss_mask)
        logprobs, _ = token_logprobs(weight[batch.token_ids][source], weight, targets)
        mask = batch.loss_mask
        inputs = PolicyLossInputs(
            logprobs, batch.rollout_logprobs[mask], batch.advantages[mask], torch.ones_like(targets).bool(), total
        )
        output = CISPOLoss(1.5)(inputs).loss
        output.backward()
        loss += output.item()
    return loss, weight.grad


@pytest.mark.parametrize("max_row_tokens", [15, 20, 40, 1000])
def test_leaving_out_rollouts_without_advantage_changes_neither_loss_nor_gradient(max_row_tokens):
    """Against every rollout in a row of its own, those without advantage included, divided by all sampled tokens."""
    from north_lightning.data.batches import pack_rollouts

    everything = [r for g in GROUPS for r in g.rollouts]
    total = sum(sum(r.loss_mask) for r in everything)
    expected_loss, expected_gradient = gradient([pack_rollouts([r], total) for r in everything], total)
    step = make_step(GROUPS, max_row_tokens)
    loss, got = gradient(step.micro_batches, step.num_trained_tokens)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(got, expected_gradient, rtol=1e-6, atol=1e-9)


def test_a_step_without_any_advantage_has_one_row_and_gradient_zero():
    step = make_step([GROUPS[1]], 40)
    assert len(step.micro_batches) == 1
    assert step.num_trained_tokens == sum(r.num_sampled_tokens for r in GROUPS[1].rollouts)
    loss, got = gradient(step.micro_batches, step.num_trained_tokens)
    assert loss == 0.0
    assert not got.any()


def test_rollouts_that_were_never_sampled_are_left_out_and_a_step_of_only_such_is_refused():
    empty = Rollout("t", "swe", "f", 9, 0, 0)
    step = make_step([GROUPS[0], RolloutGroup(9, "t", "swe", [empty])], 40)
    assert sum(len(batch.sources) for batch in step.micro_batches) == 2
    with pytest.raises(DataError, match="expected rollouts with tokens"):
        make_step([RolloutGroup(9, "t", "swe", [empty])], 40)


def test_a_rollout_longer_than_a_row_is_refused_naming_the_setting():
    with pytest.raises(ConfigError, match=r"max_row_tokens: expected at least .* 15 tokens \(task0\), got 8"):
        make_step(GROUPS, 8)


@pytest.mark.parametrize("name", ["loss_mask", "rollout_logprobs", "policy_versions"])
def test_misaligned_rollouts_are_refused_naming_the_field(name):
    broken = rollout(4, 0, 3, 2, 1.0)
    getattr(broken, name).pop()
    with pytest.raises(DataError, match=f"rollout 0 of group 4 .* {name} as long as its 9"):
        make_step([RolloutGroup(4, "t", "swe", [broken])], 40)


def test_a_trained_first_token_is_refused():
    broken = rollout(4, 0, 3, 2, 1.0)
    broken.loss_mask[0] = True
    with pytest.raises(DataError, match="expected a prompt before"):
        make_step([RolloutGroup(4, "t", "swe", [broken])], 40)


# ---- waiting -------------------------------------------------------------------------------------------------------


def test_the_loader_waits_for_groups_and_reports_how_long():
    queue = ListQueue()
    data = RolloutDataModule(queue, 2, 40, num_batches=1, poll_s=0.005)
    timer = threading.Timer(0.1, lambda: [queue.complete(g) for g in GROUPS[:2]])
    timer.start()
    (step,) = data.train_dataloader()
    assert 0.05 < step.wait_s < 2.0
    assert step.groups == GROUPS[:2]


def test_a_dead_producer_ends_the_wait():
    def dead():
        raise InfrastructureError("producer died")

    data = RolloutDataModule(ListQueue(), 2, 40, num_batches=1, poll_s=0.001, max_wait_s=5)
    data.add_check(lambda: None)
    data.add_check(dead)
    with pytest.raises(InfrastructureError, match="producer died"):
        next(iter(data.train_dataloader()))


def test_waiting_too_long_raises_with_the_queue_statistics():
    data = RolloutDataModule(ListQueue(GROUPS[:1]), 2, 40, num_batches=1, poll_s=0.001, max_wait_s=0.02)
    with pytest.raises(InfrastructureError, match=r"expected 2 groups within 0 s.*'depth': 1.0"):
        next(iter(data.train_dataloader()))


def test_a_termination_signal_ends_the_wait():
    class Trainer:
        received_sigterm = False

    data = RolloutDataModule(ListQueue(), 2, 40, num_batches=1, poll_s=0.001, max_wait_s=20)
    data.trainer = Trainer()
    threading.Timer(0.05, lambda: setattr(Trainer, "received_sigterm", True)).start()
    start = time.monotonic()
    with pytest.raises(SIGTERMException):
        next(iter(data.train_dataloader()))
    assert time.monotonic() - start < 5


def test_release_frees_every_group_of_the_step():
    queue = ListQueue(GROUPS)
    data = RolloutDataModule(queue, 3, 40, num_batches=1)
    (step,) = data.train_dataloader()
    assert queue.released == []
    data.release(step)
    assert queue.released == [0, 1, 2]


@pytest.mark.parametrize("name", ["groups_per_batch", "max_row_tokens", "num_batches"])
def test_settings_below_one_are_refused(name):
    settings = {"groups_per_batch": 1, "max_row_tokens": 1, "num_batches": 1} | {name: 0}
    with pytest.raises(ConfigError, match=name):
        RolloutDataModule(ListQueue(), **settings)


# ---- Lightning -----------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, data):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.data = data
        self.steps = []
        self.taken_at_step = []

    def training_step(self, step, batch_idx):
        assert isinstance(step, RolloutStep)
        self.steps.append([g.group_id for g in step.groups])
        self.taken_at_step.append(self.data.queue.taken)
        self.data.release(step)
        return self.weight.sum() * 0 + len(step.micro_batches)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(tmp_path, data, ckpt_path=None, **kwargs):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **{"max_epochs": 1} | kwargs,
    )
    module = Module(data)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def many(count):
    return [group(i, [1.0, -1.0]) for i in range(count)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_never_takes_a_batch_ahead_of_the_one_it_trains(tmp_path, precision):
    data = RolloutDataModule(ListQueue(many(12)), 2, 60, num_batches=5, max_wait_s=5)
    module = fit(tmp_path, data, precision=precision)
    assert module.steps == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert module.taken_at_step == [2, 4, 6, 8, 10]
    assert data.queue.released == list(range(10))


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 6}])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_trains_the_remaining_groups_and_no_others(tmp_path, cut, limit):
    path = tmp_path / "cut.ckpt"
    whole = fit(
        tmp_path, RolloutDataModule(ListQueue(many(12)), 2, 60, num_batches=6), callbacks=[SaveAt(cut, path)], **limit
    )
    resumed = fit(tmp_path, RolloutDataModule(ListQueue(many(12)), 2, 60, num_batches=6), path, **limit)
    assert resumed.steps == whole.steps[cut:]
    assert len(whole.steps) == 6


def test_accumulation_is_refused_because_a_batch_is_a_whole_step(tmp_path):
    data = RolloutDataModule(ListQueue(many(4)), 2, 60, num_batches=2)
    with pytest.raises(ConfigError, match="accumulate_grad_batches: expected 1"):
        fit(tmp_path, data, accumulate_grad_batches=2)


def test_moving_to_a_device_moves_tensors_and_shares_the_groups():
    data = RolloutDataModule(ListQueue(), 1, 60, num_batches=1)
    step = make_step(GROUPS, 60)
    moved = data.transfer_batch_to_device(step, torch.device("meta"), 0)
    assert all(batch.rollout_logprobs.device.type == "meta" for batch in moved.micro_batches)
    assert all(batch.cu_seqlens.device.type == "meta" for batch in moved.micro_batches)
    assert moved.groups[0] is GROUPS[0]
    assert math.isclose(moved.num_trained_tokens, step.num_trained_tokens)
