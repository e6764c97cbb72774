"""What a run promises of every fault, and the tests that hold it to that. Rows without a test elsewhere are below."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from fault_trials import AllNaN, make_task, play_script, train_while
from faulty_runner import faulty_runner
from rollout_fakes import image_of
from scripted_vllm import reply

from north_lightning.errors import InfrastructureError, WeightPushError
from north_lightning.faults import FakeVLLM, FaultPlan
from north_lightning.rollout import FailurePolicy, ProducerSpec, RolloutProducer, WindowedFIFOQueue
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.sandbox import memory_kills
from north_lightning.types import RolloutGroup

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "north_lightning"

TABLE = {
    "a sampler is killed: replaced, the weights of now pushed again, groups begun anew; none lost": [
        "sampling/test_sidecar.py::test_a_killed_server_is_reported_leaves_no_engine_and_restarts_at_the_same_url",
        "callbacks/test_weight_sync.py::test_a_server_that_dies_in_a_step_is_up_at_its_end_and_gets_the_weights_of_now_before_it_is_sampled_from",
        "faults/test_dead_servers.py::test_a_server_that_dies_in_a_long_step_costs_no_group_and_serves_the_right_version_after_it",
        "parallel/test_reinforcement.py::test_every_process_takes_part_in_the_push_to_a_server_that_was_started_again",
        "faults/test_planned_faults.py::test_a_run_survives_planned_faults_and_its_book_adds_up",
    ],
    "a sampler hangs: found; a busy one is never killed": [
        "sampling/test_sidecar.py::test_an_engine_that_hangs_is_found_and_a_busy_one_is_not_suspected",
    ],
    "log-probabilities are not finite: the group is rejected and counted; the run stops after some": [
        "faults/test_fault_table.py::test_a_sampler_of_non_finite_log_probabilities_trains_nothing_and_stops_the_run",
        "rollout/test_rollout_runner.py::test_a_broken_sampler_is_never_a_reward",
        "modules/test_cispo_module.py::test_a_non_finite_log_probability_of_the_sampler_ends_training_before_the_step",
    ],
    "a weight push fails after any tensor: the version does not advance, the engine is fenced and pushed to again": [
        "faults/test_fault_table.py::test_a_push_that_fails_after_any_tensor_fences_and_the_next_one_serves",
        "sampling/test_vllm_push.py::test_a_push_cut_off_after_any_tensor_is_refused_and_a_good_one_restores_everything",
        "callbacks/test_weight_sync.py::test_a_failed_push_is_tried_again_under_the_same_version",
        "callbacks/test_weight_sync.py::test_a_push_that_keeps_failing_ends_training_and_stops_the_sidecar",
    ],
    "a kill in a checkpoint write, or a full disk: the last complete checkpoint loads, the error is typed": [
        "callbacks/test_run_callbacks.py::test_a_kill_at_any_moment_of_a_write_leaves_a_whole_checkpoint",
        "callbacks/test_run_callbacks.py::test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it",
        "parallel/test_checkpoint_kills.py::test_a_kill_at_any_moment_of_a_sharded_write_leaves_the_last_complete_checkpoint",
        "parallel/test_parallel.py::test_a_full_disk_of_one_process_is_an_error_of_all_and_the_checkpoint_before_it_loads",
    ],
    "SIGTERM: saved, exit code 143, no orphans": [
        "test_cli.py::test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one",
        "rollout/test_rollout_producer.py::test_no_process_outlives_the_trainer",
    ],
    "a reward raises, hangs, is NaN or of a wrong type: an error, never 0, and left out of the baseline": [
        "rollout/test_rollout_runner.py::test_a_broken_verifier_is_never_a_reward",
        "faults/test_planned_faults.py::test_every_kind_of_fault_is_an_error_of_its_own_boundary",
        "faults/test_fault_table.py::test_a_group_with_an_ungraded_attempt_is_never_trained",
    ],
    "an environment cannot start: tried again, replaced, accounted for, and the run stops where all fail": [
        "faults/test_fault_table.py::test_groups_of_an_environment_that_cannot_start_are_replaced_and_accounted_for",
        "faults/test_fault_table.py::test_a_run_in_which_no_environment_starts_stops_and_says_why",
        "rollout/test_rollout_runner.py::test_a_passing_failure_is_tried_again_from_the_start",
    ],
    "a sandbox hangs, forks, floods, fills its disk, or leaves a daemon: killed in time, capped, no survivors": [
        "sandbox/test_bubblewrap.py::test_time_out_kills_background_children_too",
        "sandbox/test_bubblewrap.py::test_fork_bomb_is_bounded_and_killed_in_time",
        "sandbox/test_bubblewrap.py::test_endless_output_is_killed_early",
        "sandbox/test_bubblewrap.py::test_one_file_and_the_whole_disk_are_bounded",
        "sandbox/test_bubblewrap.py::test_daemon_ends_with_the_command_that_started_it",
        "sandbox/test_levels.py::test_sixty_attacks_fail_on_every_level",
        "faults/test_planned_faults.py::test_a_planned_hang_and_flood_are_ended_by_the_real_sandbox",
    ],
    "a line of data is broken: file and line are named; none is skipped unless a budget allows it": [
        "data/test_sources.py::test_a_line_that_is_no_sample_is_refused_with_file_and_line",
        "data/test_sources.py::test_so_many_broken_lines_are_skipped_as_the_budget_allows_and_are_listed",
    ],
    "a typo in a config: refused, with a suggestion": [
        "test_cli.py::test_a_mistake_in_the_config_is_explained_in_a_few_lines",
        "test_cli.py::test_an_unknown_command_gets_a_suggestion",
    ],
    "tokenizer, model or lengths do not fit the sampler: refused at the handshake": [
        "sampling/test_sidecar.py::test_a_checkpoint_of_another_tokenizer_is_refused_at_the_handshake",
        "sampling/test_sidecar.py::test_a_length_the_model_was_not_made_for_is_refused",
        "modules/test_sft_module.py::test_a_tokenizer_of_another_model_is_refused",
        "callbacks/test_asynchronous_rl.py::test_settings_that_cannot_be_trained_on_are_refused_before_anything_starts",
    ],
    "the clock jumps: nothing is measured by it": [
        "faults/test_fault_table.py::test_nothing_reads_a_clock_that_can_jump",
    ],
    "two trainers in one run directory: the second is refused": [
        "callbacks/test_run_callbacks.py::test_a_second_trainer_in_the_same_folder_is_refused_and_the_first_named",
    ],
    "the kernel kills for want of memory: named; a sandbox's is not the trainer's": [
        "faults/test_fault_table.py::test_a_kill_for_want_of_memory_is_named",
        "sandbox/test_bubblewrap.py::test_memory_of_a_process_is_bounded",
    ],
}


def test_every_row_of_the_table_has_tests_that_exist() -> None:
    for row, tests in TABLE.items():
        assert tests, row
        for file, name in (test.split("::") for test in tests):
            functions = [node.name for node in ast.parse((TESTS / file).read_text()).body if hasattr(node, "name")]
            assert name in functions, f"{row}: {file} has no {name}"


# ---- runs over a fake server -----------------------------------------------------------------------------------------


@contextmanager
def producing(
    inputs: Path, plan: FaultPlan, server: FakeVLLM, max_drops: int = 3, task_without_image: int | None = None
) -> Iterator[tuple[WindowedFIFOQueue, RolloutProducer]]:
    play_script(inputs)
    tasks = [make_task(inputs / name, name=name) for name in ("task0", "task1", "task2")]
    if task_without_image is not None:
        shutil.rmtree(image_of(tasks[task_without_image]))
    queue = WindowedFIFOQueue(groups_per_batch=2, max_batches_ahead=1)
    failures = FailurePolicy(2, redispatch_delay_s=0.01, max_consecutive_drops=max_drops)
    with server:
        make_runner = partial(faulty_runner, inputs / "tokenizer", [server.url], plan, timeout_s=60.0)
        producer = RolloutProducer(queue, ProducerSpec(tasks, make_runner, 2, max_concurrent_groups=2), failures)
        producer.start()
        try:
            yield queue, producer
        finally:
            producer.stop()


def train(queue: WindowedFIFOQueue, producer: RolloutProducer, num_groups: int) -> list[RolloutGroup]:
    """Waits as long as it takes: the limit of a test ends what hangs."""

    def goes_on(num_trained: int) -> bool:
        dropped = sum(count for name, count in queue.stats().items() if name.startswith("dropped/"))
        assert dropped < 100, "the run goes on although everything fails"
        return num_trained < num_groups

    return train_while(queue, producer, goes_on)


def test_a_sampler_of_non_finite_log_probabilities_trains_nothing_and_stops_the_run(
    inputs: Path, tmp_path: Path
) -> None:
    with producing(inputs, FaultPlan(tmp_path), AllNaN(reply)) as (queue, producer):
        with pytest.raises(InfrastructureError, match=r"3 groups in a row .*NonFiniteError.*log-probability nan"):
            train(queue, producer, 1000)
        stats = producer.stats()
    assert stats["failures/NonFiniteError"] >= 6
    assert queue.stats()["dropped/NonFiniteError"] == 3
    assert queue.stats()["trained"] == 0


def test_a_group_with_an_ungraded_attempt_is_never_trained(inputs: Path, tmp_path: Path) -> None:
    """Many verifications fail for good: what is trained has every attempt's own verdict."""
    rates = dict.fromkeys(("verifier_nan", "verifier_wrong_type", "verifier_raises"), 0.1)
    plan = FaultPlan(tmp_path, seed=3, rates=rates, lasting=1.0)
    with producing(inputs, plan, FakeVLLM(reply), max_drops=99) as (queue, producer):
        trained = train(queue, producer, 12)
    ungraded = {int(mark.split(" ")[1]) for mark in plan.schedule()}
    assert ungraded
    assert not ungraded & {group.group_id for group in trained}
    assert {queue.end_of(group_id) for group_id in ungraded} <= {"VerifierError", None}
    assert all(group.rewards == [0.0, 1.0] for group in trained)
    assert all([rollout.advantage for rollout in group.rollouts] == [-1.0, 1.0] for group in trained)


def test_groups_of_an_environment_that_cannot_start_are_replaced_and_accounted_for(
    inputs: Path, tmp_path: Path
) -> None:
    own = tmp_path / "inputs"
    shutil.copytree(inputs, own)
    plan = FaultPlan(tmp_path / "faults")
    with producing(own, plan, FakeVLLM(reply), max_drops=99, task_without_image=1) as (queue, producer):
        trained = train(queue, producer, 12)
        stats = dict(producer.stats())
    ends = {group_id: queue.end_of(group_id) for group_id in range(max(group.group_id for group in trained) + 1)}
    dropped = [group_id for group_id, end in ends.items() if end == "SandboxError"]
    assert len(trained) == 12
    assert {group.task_id for group in trained} == {"task0", "task2"}
    assert len(dropped) >= 3
    assert queue.stats()["dropped/SandboxError"] >= len(dropped)
    assert stats["failures/SandboxError"] >= 2 * len(dropped)  # each was dispatched twice


def test_a_run_in_which_no_environment_starts_stops_and_says_why(inputs: Path, tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path, rates={"sandbox_cannot_start": 1.0})
    with (
        producing(inputs, plan, FakeVLLM(reply)) as (queue, producer),
        pytest.raises(InfrastructureError, match=r"3 groups in a row .*SandboxError.*the sandbox cannot start"),
    ):
        train(queue, producer, 1000)


# ---- pushes ----------------------------------------------------------------------------------------------------------


def test_a_push_that_fails_after_any_tensor_fences_and_the_next_one_serves() -> None:
    tensors = {f"layer{index}": torch.full((3,), float(index)) for index in range(8)}
    with FakeVLLM() as server:
        transport = SharedMemoryTransport(server.url, timeout_s=60, max_staged_gib=1e-8)  # a file for each tensor
        for good, num_tensors in enumerate(range(len(tensors) + 1)):
            server.fail_push_after = num_tensors
            with pytest.raises(WeightPushError, match=f"version {good + 1} was not confirmed"):
                transport.push({name: tensor - 100.0 for name, tensor in tensors.items()}.items(), good + 1)
            assert (server.version, server.is_paused, transport.fenced) == (str(good), True, True)
            assert server.is_torn == (num_tensors > 0)
            server.fail_push_after = None
            transport.push(tensors.items(), good + 1)
            assert (server.version, server.is_paused, server.is_torn, transport.fenced) == (
                str(good + 1), False, False, False,
            )  # fmt: skip
            assert server.weights == {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        transport.close()


# ---- clocks and memory -----------------------------------------------------------------------------------------------


def test_nothing_reads_a_clock_that_can_jump() -> None:
    """Neither ``time.time`` nor the date decides anything: every wait and every duration is of the monotonic clock."""
    jumping = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "ctime"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in jumping:
                assert ast.unparse(node.value) not in ("time", "datetime", "date", "datetime.datetime"), (
                    f"{file.name}:{node.lineno} reads {ast.unparse(node)}"
                )
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not jumping & {alias.name for alias in node.names}, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("exit_code", "kills", "message"),
    [
        (-9, 2, r"was killed by SIGKILL, likely for want of memory \(the kernel has killed 2 processes"),
        (-9, 0, r"was killed by SIGKILL$"),
        (-11, 2, r"was killed by SIGSEGV$"),
        (3, 2, r"ended with exit code 3$"),
    ],
)
def test_a_kill_for_want_of_memory_is_named(
    exit_code: int, kills: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory_kills.num_memory_kills()  # of the real kernel
    assert before >= 0
    monkeypatch.setattr(memory_kills, "VMSTAT", tmp_path / "vmstat")
    (tmp_path / "vmstat").write_text(f"pgfault 17\noom_kill {before + kills}\n")
    with pytest.raises(InfrastructureError, match=message):
        raise InfrastructureError(memory_kills.how_it_ended(exit_code, before))
