"""CISPOModule: one optimizer step per RolloutStep, equal to the formula written out, and what it logs."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import JSONLHistory
from north_lightning.data.rollouts import RolloutStep, make_step
from north_lightning.errors import TrainingError
from north_lightning.history import read_history
from north_lightning.losses import CISPOLoss, GSPOLoss
from north_lightning.model import NorthConfig, NorthModel, Routing
from north_lightning.modules import CISPOModule
from north_lightning.rollout import rloo_advantages
from north_lightning.types import NOT_SAMPLED, Reward, Rollout, RolloutGroup, Turn

LR = 1e-3
EPS = 1e-4  # large: Adam turns rounding errors of gradients that are nearly 0 into whole steps
MAX_WEIGHT = 1.5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def make_module(inputs: Path, **settings: object) -> CISPOModule:
    seed_everything(5, verbose=False)
    return CISPOModule(
        loss=CISPOLoss(MAX_WEIGHT),
        config=inputs / "model.json",
        tokenizer=inputs / "tokenizer",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, eps=EPS),
        max_grad_norm=0.3,
        **settings,
    )


def make_groups(
    seed: int, rewards: tuple[tuple[float, ...], ...] = ((1, 0, 0), (0, 0, 0), (1, 1, 0))
) -> list[RolloutGroup]:
    """Two environments; prompts of 5 to 9 tokens, then two turns with an observation between."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(10, 390, (length,), generator=generator).tolist()

    groups = []
    for group_id, rewards_of_group in enumerate(rewards):
        environment = ("terminal", "swe")[group_id % 2]
        group = RolloutGroup(group_id, f"task{group_id}", environment, [])
        for index, (reward, advantage) in enumerate(
            zip(rewards_of_group, rloo_advantages(rewards_of_group), strict=True)
        ):
            rollout = Rollout(group.task_id, environment, "family", group_id, index, 0, advantage=advantage)
            for sampled in (False, True, False, True):
                part = tokens(5, 10)
                rollout.turns += [Turn(len(rollout.token_ids), len(rollout.token_ids) + len(part), "stop")] * sampled
                rollout.token_ids += part
                rollout.loss_mask += [sampled] * len(part)
                noise = torch.randn(len(part), generator=generator).tolist()
                rollout.rollout_logprobs += [-6.0 + x if sampled else 0.0 for x in noise]
                rollout.policy_versions += [0 if sampled else NOT_SAMPLED] * len(part)
            rollout.reward = Reward(float(reward))
            group.rollouts.append(rollout)
        groups.append(group)
    return groups


def fit(module: CISPOModule, steps: list[RolloutStep], tmp_path: Path, **settings: object) -> None:
    loader = torch.utils.data.DataLoader(steps, batch_size=None)
    quiet_trainer(tmp_path, max_epochs=1, **settings).fit(module, train_dataloaders=loader)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_training_equals_the_formula_written_out(inputs: Path, tmp_path: Path, temperature: float) -> None:
    module = make_module(inputs, temperature=temperature)
    batches = [make_groups(seed) for seed in range(3)]
    fit(module, [make_step(groups, max_row_tokens=80) for groups in batches], tmp_path)
    assert module.global_step == 3

    seed_everything(5, verbose=False)
    model = NorthModel(NorthConfig.load(inputs / "model.json"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, eps=EPS)
    for groups in batches:
        total, count = torch.zeros(()), 0
        for group in groups:
            mean = sum(group.rewards) / len(group.rewards)
            for rollout in group.rollouts:  # every rollout, alone in its row; those without advantage too
                ids = torch.tensor(rollout.token_ids)
                logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32)) @ model.embedding_weight.T
                logprobs = (logits[:-1] / temperature).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
                ratio = (logprobs.detach() - torch.tensor(rollout.rollout_logprobs)[1:]).exp()
                others = (mean * len(group.rewards) - rollout.reward.value) / (len(group.rewards) - 1)
                mask = torch.tensor(rollout.loss_mask)[1:]
                total = total - (ratio.clamp(max=MAX_WEIGHT) * (rollout.reward.value - others) * logprobs)[mask].sum()
                count += int(mask.sum())
        (total / count).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.3 / norm)
        optimizer.step()
        optimizer.zero_grad()
    reference = dict(model.named_parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, reference[name], rtol=0, atol=1e-6)


def test_a_step_is_the_same_in_one_row_and_in_many(inputs: Path, tmp_path: Path) -> None:
    results = []
    for max_row_tokens in (40, 4000):
        module = make_module(inputs)
        step = make_step(make_groups(7), max_row_tokens)
        assert (len(step.micro_batches) == 1) == (max_row_tokens == 4000)
        fit(module, [step], tmp_path)
        results.append(module.model)
    for (name, one), many in zip(results[0].named_parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-6, msg=name)


def test_a_batch_without_signal_counts_as_a_step_and_moves_nothing(inputs: Path, tmp_path: Path) -> None:
    module = make_module(inputs)
    fit(module, [make_step(make_groups(7, ((1, 1, 1), (0, 0, 0))), 4000)], tmp_path)
    assert module.global_step == 1
    seed_everything(5, verbose=False)
    fresh = NorthModel(NorthConfig.load(inputs / "model.json"))
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), fresh.parameters(), strict=True))


def record_routing(groups: list[RolloutGroup], model: NorthModel) -> None:
    """As a sampler with ``model``'s routers reports it: all layers, the last token not read, dense layers zero."""
    config = model.config
    for group in groups:
        for rollout in group.rollouts:
            routing: list[Routing] = []
            ids = torch.tensor(rollout.token_ids)
            model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), routing)
            experts = torch.zeros(len(ids), config.num_hidden_layers, config.num_experts_per_tok, dtype=torch.uint8)
            for layer in routing:
                experts[:, layer.layer] = layer.expert_ids
            rollout.routed_experts = experts[:-1].numpy()


def test_router_replay_makes_the_trainer_visit_the_samplers_experts(inputs: Path, tmp_path: Path) -> None:
    """The sampler's routers were other ones: live routing differs from its choices, replay is told them."""
    module = make_module(inputs, router_replay=True, log_experts_every_n_steps=1)
    seed_everything(99, verbose=False)
    groups = make_groups(7)
    record_routing(groups, NorthModel(NorthConfig.load(inputs / "model.json")))
    step = make_step(groups, 4000)
    (row,) = step.micro_batches
    assert row.routed_experts is not None
    ends = row.cu_seqlens[1:].long() - 1
    assert (row.routed_experts[ends] == -1).all()  # never read by the sampler
    assert int((row.routed_experts < 0).any(-1).any(-1).sum()) == len(ends)
    fit(module, [step], tmp_path, logger=JSONLHistory(tmp_path))
    (line,) = read_history(tmp_path / "history.jsonl")
    assert line["experts/layer1/replayed_differently"] > 0.1

    live, replayed = make_module(inputs), make_module(inputs, router_replay=True)
    outputs = []
    for each in (live, replayed):
        each.trainer = quiet_trainer(tmp_path)
        each.configure_model()
        outputs.append(float(each.policy_loss(row).loss))
    model = replayed.model
    hidden = model(row.token_ids, row.cu_seqlens, None, row.routed_experts)
    logprobs = (hidden @ model.embedding_weight.T).log_softmax(-1)[:-1].gather(-1, row.token_ids[1:, None])[:, 0]
    log_ratio = logprobs - row.rollout_logprobs[1:]
    mask = row.loss_mask[1:]
    expected = -(log_ratio.detach().exp().clamp(max=MAX_WEIGHT) * row.advantages[1:] * logprobs)[mask].sum()
    assert outputs[1] == pytest.approx(float(expected) / row.num_trained_tokens, rel=1e-4)
    assert abs(outputs[0] - outputs[1]) > 1e-6


def test_router_replay_without_recorded_experts_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="router_replay: expected rollouts with the sampler's routed experts"):
        fit(make_module(inputs, router_replay=True), [make_step(make_groups(7), 4000)], tmp_path)


def test_a_frozen_router_stays_as_it_is_and_the_experts_learn(inputs: Path, tmp_path: Path) -> None:
    module = make_module(inputs, freeze_router=True)
    fit(module, [make_step(make_groups(7), 4000)], tmp_path)
    seed_everything(5, verbose=False)
    fresh = dict(NorthModel(NorthConfig.load(inputs / "model.json")).named_parameters())
    moved = {name for name, parameter in module.model.named_parameters() if not torch.equal(parameter, fresh[name])}
    assert moved == {name for name in fresh if "router" not in name}


def test_a_loss_over_whole_sequences_is_refused_where_processes_share_a_row(inputs: Path, tmp_path: Path) -> None:
    class HalfARow(NorthModel):
        def tokens_held(self, num_tokens: int) -> slice:
            return slice(0, num_tokens // 2)

    module = make_module(inputs)
    module.loss = GSPOLoss()
    fit(module, [make_step(make_groups(1), 200)], tmp_path / "whole")  # this process has all tokens
    module.model.__class__ = HalfARow
    with pytest.raises(TrainingError, match=r"several processes share a row .*strategy\.context.*, got GSPOLoss"):
        fit(module, [make_step(make_groups(1), 200)], tmp_path / "shared")


def test_a_non_finite_log_probability_of_the_sampler_ends_training_before_the_step(
    inputs: Path, tmp_path: Path
) -> None:
    groups = make_groups(7)
    poisoned = groups[0].rollouts[0]
    poisoned.rollout_logprobs[poisoned.loss_mask.index(True)] = math.nan
    module = make_module(inputs)
    with pytest.raises(TrainingError, match=r"step 0 was not taken: .*rollout_logprobs has 1 of"):
        fit(module, [make_step(groups, 4000)], tmp_path)
    assert module.global_step == 0


def test_it_logs_what_tells_whether_training_works(inputs: Path, tmp_path: Path) -> None:
    module = make_module(inputs)
    steps = [make_step(make_groups(1), 60, wait_s=1.25), make_step(make_groups(2, ((1, 0, 0),)), 60)]
    fit(module, steps, tmp_path, logger=JSONLHistory(tmp_path))
    first, second = read_history(tmp_path / "history.jsonl")
    assert first["rollout/pass@1"] == pytest.approx(3 / 9)
    assert first["rollout/solve_none"] == pytest.approx(1 / 3)
    assert first["rollout/terminal/pass@1"] == pytest.approx(3 / 6)
    assert first["rollout/swe/pass@1"] == 0.0
    assert "rollout/swe/pass@1" not in second  # no such task in that batch
    assert first["speed/wait_s"] == 1.25
    expected = {"mismatch_kl", "mismatch_abs_max", "entropy", "clip_fraction_positive", "clip_fraction_negative"}
    assert {f"train/{name}" for name in expected | {"loss", "grad_norm", "lr"}} <= first.keys()
    assert first["train/entropy"] == pytest.approx(math.log(400), rel=0.05)
    assert first["rollout/turns"] == 2.0
