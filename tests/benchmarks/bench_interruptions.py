"""Runs struck by SIGTERM, SIGUSR1, Ctrl-C and SIGKILL at every moment, and started again by the same command.

    python tests/benchmarks/bench_interruptions.py [--strikes 300] [--seed 0] [SECTION]...    (25 minutes, two cores)

Every run's config says ``resume: auto``. ``sft``: the weights and losses at the end are those of a run that nobody
struck, bit for bit. ``rl`` (real rollout process, sandboxes and push; a server that plays a script): after every strike
the ledger of the newest checkpoint is that of an independent book, and at the end every group has ended once.
``imports``: SFT in new processes, struck while they import. ``vllm``: RL with the real server. Nothing may be left over
(processes, /dev/shm, mounts, temporary files), and exit codes are those that are documented; anything else ends the
benchmark. Root has mounts and /dev/shm of its own here, so that nobody else's count.

Writes runs/bench/interruptions.json, section by section.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.geteuid() == 0 and "NORTH_OWN_MOUNTS" not in os.environ:
    os.environ["NORTH_OWN_MOUNTS"] = "1"
    shell = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh", sys.executable, *sys.argv]
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *shell])

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("", "callbacks", "rollout"))]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:4], os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from scripted_vllm import play  # noqa: E402
from small_runs import sft_config, write_run_inputs  # noqa: E402
from struck_commands import strike_commands, write_rows  # noqa: E402
from struck_lives import IN_RL, IN_SFT, IN_VLLM, Striker  # noqa: E402

import north_lightning.lightning_cli  # noqa: E402, F401  (lives are forks that have imported it)
from north_lightning.chat import ChatFormat, NorthTokenizer  # noqa: E402
from north_lightning.history import read_history  # noqa: E402
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint  # noqa: E402
from north_lightning.rollout import WindowedFIFOQueue  # noqa: E402
from north_lightning.run_folders import newest_checkpoint  # noqa: E402
from north_lightning.tasks import load_task, solution_steps, write_task  # noqa: E402
from north_lightning.tasks.terminal import terminal_task  # noqa: E402
from north_lightning.types import AssistantAction, ToolCall  # noqa: E402

OUTPUT = Path("runs/bench/interruptions.json")
SHARES = {"sft": 0.4, "rl": 0.4, "imports": 0.1, "vllm": 0.1, "commands": 0.1}
"""Of the strikes; those of the commands are beside them."""
STRIKES_OF_A_RUN = 12
SCRIPTED = "struck_lives.SlowSidecar"
SFT_STEPS, RL_STEPS, GROUPS_PER_STEP = 12, 5, 2


def keep_checkpoints(every: int) -> dict[str, Any]:
    arguments = {"every_n_train_steps": every, "save_top_k": -1}
    return {"class_path": "ModelCheckpoint", "init_args": arguments}


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


def sft_run(inputs: Path, folder: Path) -> dict[str, Any]:
    config = sft_config(inputs, folder / "run", max_steps=SFT_STEPS)
    config["trainer"] |= {"check_val_every_n_epoch": None, "val_check_interval": 3}
    config["trainer"]["callbacks"].append(keep_checkpoints(2))
    config["data"]["init_args"]["validation_files"] = [str(inputs / "names.jsonl")]
    return config


def strike_sft(scratch: Path, num_strikes: int, seed: int, forks: bool) -> Iterator[dict[str, Any]]:
    inputs = prepared(scratch, write_run_inputs)
    striker = Striker(scratch, seed, IN_SFT, forks)
    whole, seconds = striker.whole(lambda folder: sft_run(inputs, folder))
    expected = load_file(whole / "run" / "checkpoint" / "model.safetensors")
    losses = {line["step"]: line["train/loss"] for line in read_history(whole / "run" / "history.jsonl")}
    missing = num_runs = 0
    while striker.num_strikes < num_strikes:
        wanted = min(STRIKES_OF_A_RUN, num_strikes - striker.num_strikes)
        folder = striker.run(lambda folder: sft_run(inputs, folder), wanted, seconds, lambda folder: None)
        num_runs += 1
        ours = load_file(folder / "run" / "checkpoint" / "model.safetensors")
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items()), f"{folder}: other weights"
        lines = [line for line in read_history(folder / "run" / "history.jsonl") if "train/loss" in line]
        assert all(losses[line["step"]] == line["train/loss"] for line in lines), f"{folder}: other losses"
        missing += len(losses) - len({line["step"] for line in lines})
        yield figures(striker) | {
            "runs": num_runs,
            "runs_bit_identical_to_the_whole_one": num_runs,
            "steps_without_a_line_in_the_history": missing,
        }


# ---- reinforcement learning ------------------------------------------------------------------------------------------


def write_rl_inputs(inputs: Path) -> None:
    write_run_inputs(inputs)
    sizes = json.loads((inputs / "model.json").read_text()) | {"hidden_size": 64, "head_dim": 32}  # vLLM's least
    (inputs / "model.json").write_text(json.dumps(sizes))
    torch.manual_seed(0)
    model = NorthModel(NorthConfig.load(inputs / "model.json"))
    save_checkpoint(model, inputs / "start", tokenizer_dir=inputs / "tokenizer")
    for index in range(4):
        write_task(terminal_task(index, 0, "train"), inputs / "tasks")


def script(inputs: Path) -> None:
    """What the scripted server says: the first task's solution."""
    task = load_task(sorted((inputs / "tasks").iterdir())[0])
    calls = [ToolCall(str(i), name, arguments) for i, (name, arguments) in enumerate(solution_steps(task))]
    turns = [*(AssistantAction(tool_calls=(call,)) for call in calls), AssistantAction(content="Done.")]
    chat = ChatFormat(NorthTokenizer.load(inputs / "tokenizer"), reasoning=False)
    play([chat.encode_action(turn) for turn in turns])


def attempts(server: str) -> dict[str, Any]:
    return {
        "harnesses": {"terminal": {"class_path": "north_lightning.harnesses.ReActTerminalHarness"}},
        "verifier": {"class_path": "rl_plugins.FirstTokenIsEven"},
        "sandboxes": {"class_path": "north_lightning.sandbox.BubblewrapProvider"},
        "max_turn_tokens": 100 if server == SCRIPTED else 8,
        "max_context_tokens": 2000,
        "reasoning": False,
    }


def rl_run(inputs: Path, server: str, folder: Path) -> dict[str, Any]:
    rollouts = attempts(server)
    producer = {"task_sets": [str(inputs / "tasks")], "rollouts": rollouts, "group_size": 2, "max_concurrent_groups": 2}
    sidecar = {"class_path": server, "init_args": {"max_model_len": 2000}}
    run = folder / "run"
    return {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "max_steps": RL_STEPS,
            "log_every_n_steps": 1,
            "logger": {"class_path": "JSONLHistory", "init_args": {"save_dir": str(run)}},
            "callbacks": [
                {"class_path": "SidecarCallback", "init_args": {"sidecar": sidecar}},
                {
                    "class_path": "WeightSyncCallback",
                    "init_args": {"every_n_steps": 2, "transport": {"class_path": "struck_lives.SlowTransport"}},
                },
                {"class_path": "RolloutProducerCallback", "init_args": producer},
                {"class_path": "HFCheckpoint"},
                keep_checkpoints(1),
            ],
        },
        "model": {
            "class_path": "CISPOModule",
            "init_args": {"checkpoint": str(inputs / "start"), "loss": {"class_path": "CISPOLoss"}},
        },
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "queue": {
                    "class_path": "WindowedFIFOQueue",
                    "init_args": {"groups_per_batch": GROUPS_PER_STEP, "max_batches_ahead": 1},
                },
                "groups_per_batch": GROUPS_PER_STEP,
                "max_row_tokens": 4000,
                "num_batches": RL_STEPS,
            },
        },
    }


def check_ledger(folder: Path) -> bool:
    """Whether there is a checkpoint. What it calls trained is in the book up to its step, and nothing else is."""
    run = folder / "run"
    newest = newest_checkpoint([run, run / "checkpoints"], quiet=True)
    if newest is None:
        return False
    state = torch.load(newest.path, weights_only=True)["RolloutDataModule"]["queue"]
    queue = WindowedFIFOQueue(GROUPS_PER_STEP, max_batches_ahead=1)
    queue.load_state_dict(state)
    book_file = folder / "book"
    lines = dict(line.split(" ", 1) for line in book_file.read_text().splitlines()) if book_file.exists() else {}
    book = [int(one) for number, groups in lines.items() if int(number) <= newest.step for one in groups.split()]
    trained = [group_id for group_id in range(state["next_id"]) if queue.end_of(group_id) == "trained"]
    assert sorted(book) == trained, f"{newest}: the book has {sorted(book)}, the ledger {trained}"
    assert len(trained) == GROUPS_PER_STEP * newest.step, f"{newest}: trained {trained}"
    assert not state["dropped"], f"{newest}: dropped {state['dropped']}"
    return True


def check_rollouts(folder: Path) -> None:
    """The rollouts of every group that was trained are in the file, once."""
    records = [json.loads(line) for line in (folder / "run" / "rollouts.jsonl").read_text().splitlines()]
    keys = [(record["group_id"], record["index"]) for record in records]
    assert len(keys) == len(set(keys)), f"{folder}: rollouts twice"
    lines = dict(line.split(" ", 1) for line in (folder / "book").read_text().splitlines())
    trained = {int(one) for groups in lines.values() for one in groups.split()}
    assert trained <= {group_id for group_id, _ in keys}, f"{folder}: rollouts lost"


def strike_rl(scratch: Path, num_strikes: int, seed: int, server: str) -> Iterator[dict[str, Any]]:
    inputs = prepared(scratch, write_rl_inputs)
    if server == SCRIPTED:
        script(inputs)
    striker = Striker(scratch, seed, IN_RL if server == SCRIPTED else IN_VLLM)
    whole, seconds = striker.whole(lambda folder: rl_run(inputs, server, folder))
    ledgers = [check_ledger(whole)]
    num_runs = 0

    def check(folder: Path) -> None:
        ledgers.append(check_ledger(folder))

    while striker.num_strikes < num_strikes:
        wanted = min(STRIKES_OF_A_RUN, num_strikes - striker.num_strikes)
        folder = striker.run(lambda folder: rl_run(inputs, server, folder), wanted, seconds, check)
        check_rollouts(folder)
        num_runs += 1
        yield figures(striker) | {"runs": num_runs, "exact_ledgers": sum(ledgers), "ledgers_not_exact": 0}


# ---- other commands --------------------------------------------------------------------------------------------------


def strike_others(scratch: Path, num_strikes: int, seed: int) -> Iterator[dict[str, Any]]:
    inputs = prepared(scratch, lambda inputs: (write_rl_inputs(inputs), write_rows(inputs)))
    script(inputs)
    striker = Striker(scratch, seed, ())
    for struck in strike_commands(striker, inputs, num_strikes, sft_config(inputs, inputs / "run"), attempts(SCRIPTED)):
        yield figures(striker) | {"commands": struck}


# ---- all -------------------------------------------------------------------------------------------------------------


def prepared(scratch: Path, write: Callable[[Path], object]) -> Path:
    """Inputs, written by a process of its own: this one must not have computed anything when it forks."""
    inputs = scratch / "inputs"
    inputs.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        write(inputs)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the inputs could not be written, see above"
    return inputs


def figures(striker: Striker) -> dict[str, Any]:
    counts = {name: dict(sorted(counter.items())) for name, counter in striker.struck.items()}
    return {"strikes": striker.num_strikes, **counts, "left_over": 0}


def strike(section: str, scratch: Path, num_strikes: int, seed: int) -> Iterator[dict[str, Any]]:
    """The figures so far, after every run."""
    if section in ("sft", "imports"):
        return strike_sft(scratch, num_strikes, seed, forks=section == "sft")
    if section == "commands":
        return strike_others(scratch, num_strikes, seed)
    server = SCRIPTED if section == "rl" else "north_lightning.sampling.sidecar.Sidecar"
    return strike_rl(scratch, num_strikes, seed, server)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=list(SHARES))
    parser.add_argument("--strikes", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60.0, help="no further run of a section after that")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for number, section in enumerate(arguments.sections):
        started = time.monotonic()
        print(f"{section}: seed {arguments.seed + number}", flush=True)
        scratch = Path(tempfile.mkdtemp(prefix="struck-"))  # no context: a fork that ends would delete it
        scratch.chmod(0o755)  # users of sandboxes go through it
        share = SHARES[section] / sum(SHARES[name] for name in arguments.sections)
        num_strikes = round(arguments.strikes * share)
        for result in strike(section, scratch, num_strikes, arguments.seed + number):
            result["seconds"] = round(time.monotonic() - started)
            results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
            results[section] = result
            results["strikes"] = sum(results[name]["strikes"] for name in SHARES if name in results)
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
            if result["seconds"] > 60 * arguments.minutes:
                break
        shutil.rmtree(scratch)
        print(section, json.dumps(result, indent=2), flush=True)


if __name__ == "__main__":
    main()
