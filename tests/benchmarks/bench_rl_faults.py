"""RL under planned faults: 1,000 of them over the whole table, and what is left where one sampler of ten fails.

    python tests/benchmarks/bench_rl_faults.py [faults] [useful]    (default: both, 8 minutes)
    python tests/benchmarks/bench_rl_faults.py SEED                 (one seed again)

``faults``: the real trainer, producer, queue, pool, client and push over a fake server, sandbox and verifier; seeds are
taken until 1,000 faults have struck. A step that takes longer than ``WATCHDOG_S`` ends the run with every thread's
stack. A seed that fails prints its schedule.

``useful``: ten servers of two slots. Useful are the seconds that a slot spent on a request of a rollout that was
trained; available are all seconds of all slots of the healthy nine. Retries, groups that were dropped, and slots that
had nothing to do are what is missing. Batches that lie across the ends of the measured time move it by two percent.

Writes runs/bench/rl_faults.json, each section as it is done.
"""

import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from fault_trials import (  # first: it knows where the other fakes are
    CAUSES,
    RATES,
    AllNaN,
    play_script,
    run_trial,
    train_while,
    write_trial_inputs,
)
from faulty_runner import pooled_runner
from rollout_fakes import make_task, make_tokenizer
from scripted_vllm import reply

from north_lightning.faults import FakeVLLM, FaultPlan
from north_lightning.rollout import ProducerSpec, RolloutProducer, WindowedFIFOQueue
from north_lightning.sampling.client import GENERATE_PATH
from north_lightning.seeds import derive_seed
from north_lightning.types import RolloutGroup

OUTPUT = Path("runs/bench/rl_faults.json")
NUM_FAULTS, NUM_STEPS, WATCHDOG_S = 1_000, 40, 60.0
NUM_SAMPLERS, NUM_SLOTS, SERVICE_S, TIMEOUT_S = 10, 2, 0.5, 5.0
WARM_UP_S, MEASURED_S = 5.0, 40.0


# ---- 1,000 faults --------------------------------------------------------------------------------------------------


def bench_faults() -> dict[str, Any]:
    """Seed after seed; one that does not end, or ends with a book that does not add up, ends the benchmark."""
    totals = {name: Counter[str]() for name in ("struck", "counts", "dropped", "wrong")}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        while totals["struck"].total() < NUM_FAULTS:
            results.append(try_seed(Path(scratch), seed=len(results)))
            for name, total in totals.items():
                total.update(results[-1][name])
            print(f"{len(results)} seeds, {totals['struck'].total()} faults", flush=True)
    return {
        "faults": totals["struck"].total(),
        "seeds": len(results),
        "steps": NUM_STEPS * len(results),
        "watchdog_s": WATCHDOG_S,
        "longest_step_s": round(max(result["longest_step_s"] for result in results), 1),
        "groups_trained": sum(result["trained"] for result in results),
        "groups_lost_or_ended_twice": totals["wrong"].total(),
        "answers_from_torn_weights": sum(result["torn_answers"] for result in results),
        "causes_without_a_type": sorted({name.split("/")[1] for name in totals["counts"]} - CAUSES),
        "groups_dropped_by_cause": totals["dropped"],
        "failures_by_cause": dict(sorted(totals["counts"].items())),
        "faults_by_kind": {kind: totals["struck"][kind] for kind in RATES},
    }


def try_seed(scratch: Path, seed: int) -> dict[str, Any]:
    """One trial in a process of its own; a failure ends the benchmark with the schedule that led to it."""
    inputs, folder, output = scratch / "inputs", scratch / f"seed{seed}", scratch / f"seed{seed}.json"
    if not inputs.exists():
        inputs.mkdir()
        assert in_fork(partial(write_trial_inputs, inputs)), "the inputs could not be written"

    def trial() -> None:
        sys.stderr = (scratch / "log").open("w")
        output.write_text(json.dumps(run_trial(inputs, folder, seed, NUM_STEPS, watchdog_s=WATCHDOG_S)))

    has_ended = in_fork(trial)
    result = json.loads(output.read_text()) if has_ended else {}
    if not has_ended or result["wrong"] or result["torn_answers"]:
        print((scratch / "log").read_text()[-5000:], result)
        raise SystemExit("\n".join([f"seed {seed} failed. What had struck:", *FaultPlan(folder / "faults").schedule()]))
    return result


def in_fork(work: Callable[[], None]) -> bool:
    """Whether it ended well, in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode == 0


# ---- one sampler of ten ----------------------------------------------------------------------------------------------


FAILURES: dict[str, Callable[[FakeVLLM], None]] = {
    "killed": lambda server: server.kill(),
    "hangs": lambda server: server.hang(),
    "answers_500": lambda server: setattr(server, "broken_route", GENERATE_PATH),
    "answers_nan": lambda server: None,  # is made so
}


def bench_useful() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch)
        make_tokenizer(inputs / "tokenizer")
        results: dict[str, Any] = {"nine_without_the_tenth": useful_share(inputs, None)}
        for failure in FAILURES:
            results[f"tenth_{failure}"] = useful_share(inputs, failure)
    return {
        "definition": "slot seconds on requests of rollouts that were trained / slot seconds of the healthy servers",
        "servers": NUM_SAMPLERS,
        "slots_per_server": NUM_SLOTS,
        "service_s": SERVICE_S,
        "client_timeout_s": TIMEOUT_S,
        "measured_s": MEASURED_S,
        **results,
    }


def useful_share(inputs: Path, failure: str | None) -> dict[str, float]:
    """Nine healthy servers, beside one that fails from the beginning to the end."""
    play_script(inputs)
    make = partial(FakeVLLM, reply, delay_s=SERVICE_S, num_slots=NUM_SLOTS)
    with ExitStack() as running:
        healthy = [running.enter_context(make()) for _ in range(NUM_SAMPLERS - 1)]
        urls = [server.url for server in healthy]
        if failure is not None:
            tenth = running.enter_context((partial(AllNaN, reply) if failure == "answers_nan" else make)())
            FAILURES[failure](tenth)
            urls.insert(0, tenth.url)
        tasks = [make_task(inputs / f"task{index}", name=f"task{index}") for index in range(5)]
        queue = WindowedFIFOQueue(groups_per_batch=4, max_batches_ahead=4)
        spec = ProducerSpec(tasks, partial(pooled_runner, inputs / "tokenizer", urls, TIMEOUT_S), 4, 12)
        producer = RolloutProducer(queue, spec)
        producer.start()
        running.callback(producer.stop)
        train_for(queue, producer, WARM_UP_S)
        started = time.monotonic()
        trained = train_for(queue, producer, MEASURED_S)
        seconds = time.monotonic() - started
        stats = producer.stats()
    served = {seed: taken for server in healthy for seed, taken in server.served_s.items()}
    useful_s = sum(served[seed] for group in trained for seed in seeds_of(group))
    return {
        "useful": round(useful_s / (seconds * NUM_SLOTS * len(healthy)), 3),
        "groups_per_s": round(len(trained) / seconds, 2),
        **{name: count for name, count in stats.items() if name.startswith(("failures/", "retried/"))},
    }


def train_for(queue: WindowedFIFOQueue, producer: RolloutProducer, seconds: float) -> list[RolloutGroup]:
    end = time.monotonic() + seconds
    return train_while(queue, producer, lambda _: time.monotonic() < end)


def seeds_of(group: RolloutGroup) -> list[int]:
    """Of all requests that the group's rollouts were sampled with."""
    return [derive_seed(rollout.seed, "turn", turn) for rollout in group.rollouts for turn in range(len(rollout.turns))]


SECTIONS = {"faults": bench_faults, "useful": bench_useful}


def main() -> None:
    # A rollout process, which is spawned, would run this script's imports again, and needs none of them.
    vars(sys.modules["__main__"]).update(__file__=None, __spec__=None)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if sys.argv[1:] and sys.argv[1].isdigit():
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(try_seed(Path(scratch), int(sys.argv[1])), indent=2))
        return
    for name in sys.argv[1:] or SECTIONS:
        result = SECTIONS[name]()
        results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
        OUTPUT.write_text(json.dumps(results | {name: result}, indent=2) + "\n")
        print(name, json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
