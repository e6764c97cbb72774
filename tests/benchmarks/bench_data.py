"""The SFT data pipeline: how exact its mix is, how full its rows, how fast it prepares, whether it resumes exactly.

    python tests/benchmarks/bench_data.py [--conversations 24] [--kills 50] [--trl FOLDER]

Mixture and packing: synthetic lengths, log-normal and cut at the row as a length filter does. Preparation: the same
trajectories of 100 to 200 turns through ours and through TRL's ``SFTTrainer._prepare_dataset``, in one process, taking
turns; where TRL cannot be imported (``--trl`` adds a folder to the path) its side is "not measured". Resume: a child
process that makes batches is killed (SIGKILL) again and again, and its successor, with other numbers of workers and
ranks, goes on from the last state that it reported.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from north_lightning.chat import ChatFormat, train_tokenizer
from north_lightning.chat.template import CHAT_TEMPLATE
from north_lightning.data import BestFitPacker, StepStream
from north_lightning.data.loader import SFTLoader
from north_lightning.data.store import TokenStore
from north_lightning.data.stream import attention_cost
from north_lightning.types import Message, TokenizedSample, ToolCall, ToolSpec

SHAPES = {  # share, log-normal mean and deviation of the lengths, fraction of the tokens that is trained
    "agentic": (0.43, 9.6, 0.9, 0.2),
    "code": (0.27, 7.6, 0.9, 0.8),
    "reasoning": (0.18, 8.0, 0.9, 0.9),
    "chat": (0.12, 6.3, 0.9, 0.6),
}
SHARES = {name: shape[0] for name, shape in SHAPES.items()}
K64, K128 = 65536, 131072


def synthetic(num_samples, row_tokens, seed):
    """Lengths [S], trained tokens [S] and the sources' numbers; samples longer than a row are dropped, as are 3% more
    (filters)."""
    generator = np.random.default_rng(seed)
    lengths, trained, sources, first = [], [], {}, 0
    for name, (_, mean, deviation, fraction) in SHAPES.items():
        drawn = generator.lognormal(mean, deviation, num_samples // len(SHAPES)).astype(np.int64).clip(16)
        kept = drawn[(drawn <= row_tokens) & (generator.random(len(drawn)) > 0.03)]
        lengths.append(kept)
        trained.append(np.maximum((kept * fraction * generator.uniform(0.6, 1.0, len(kept))).astype(np.int64), 1))
        sources[name] = np.arange(first, first + len(kept))
        first += len(kept)
    return np.concatenate(lengths), np.concatenate(trained), sources


# ---- mixture -------------------------------------------------------------------------------------------------------


def mixture_errors(seeds, budget=100_000_000):
    """Largest distance of a source from its share, in percentage points, in the rows up to 100M trainable tokens."""
    results = {}
    for row_tokens in (K64, K128):
        errors, sampled = [], []
        for seed in seeds:
            lengths, trained, sources = synthetic(60_000, row_tokens, seed)
            stream = StepStream(lengths, trained, sources, SHARES, row_tokens, seed)
            owner = np.repeat(list(sources), [len(numbers) for numbers in sources.values()])
            tokens, total = dict.fromkeys(sources, 0), 0
            while total < budget:
                for number in stream.next_step()[0]:
                    tokens[owner[number]] += trained[number]
                    total += trained[number]
            errors.append(100 * max(abs(tokens[name] / total - share) for name, share in SHARES.items()))
            sampled.append(sampling_error(trained, sources, seed, budget))
        results[f"{row_tokens}"] = {
            "error_pp_by_seed": [round(float(error), 5) for error in errors],
            "error_pp_largest": round(float(max(errors)), 5),
            "drawing_by_share_error_pp": round(float(statistics.mean(sampled)), 2),
        }
    return results


def sampling_error(trained, sources, seed, budget):
    """The same for samples drawn with probabilities equal to the shares."""
    generator = np.random.default_rng(seed)
    names = list(sources)
    picked = generator.choice(len(names), size=budget // 500, p=list(SHARES.values()))
    tokens = np.array([trained[generator.choice(sources[names[i]], int((picked == i).sum()))].sum() for i in range(4)])
    return 100 * max(abs(tokens / tokens.sum() - np.array(list(SHARES.values()))))


# ---- packing -------------------------------------------------------------------------------------------------------


def packing(num_samples=200_000):
    """Utilisation while streaming against best fit over 4096 in the order drawn; how mixed steps of 8 rows are."""
    results = {}
    for row_tokens in (K64, K128):
        lengths, trained, sources = synthetic(num_samples, row_tokens, 0)
        owner = np.repeat(np.arange(len(sources)), [len(numbers) for numbers in sources.values()])
        stream = StepStream(lengths, trained, sources, SHARES, row_tokens, 0)
        num_rows = 8000
        rows = [stream.next_step()[0] for _ in range(num_rows)]
        started = time.process_time()
        again = StepStream(lengths, trained, sources, SHARES, row_tokens, 0)._rows
        planned = sum(len(next(again)) for _ in range(num_rows))
        seconds = time.process_time() - started
        drawn = [number for row in rows for number in row]
        tokens = int(lengths[drawn].sum())
        packer = BestFitPacker(row_tokens, 4096)
        best_fit = list(packer.pack((number, int(lengths[number])) for number in drawn))
        balanced = StepStream(lengths, trained, sources, SHARES, row_tokens, 0, rows_per_step=32)
        steps = [balanced.next_step() for _ in range(100)]
        shuffled = [random.Random(0).sample(step, len(step)) for step in steps]
        results[f"{row_tokens}"] = {
            "utilisation": tokens / (num_rows * row_tokens),
            "of_bound": -(-tokens // row_tokens) / num_rows,
            "best_fit_4096_utilisation": packer.utilisation,
            "truncated": sum(int(lengths[row].sum()) > row_tokens for row in rows),
            "samples_per_s_of_cpu": round(planned / seconds),
            "step_share_distance": step_distance(rows, trained, owner),
            "best_fit_4096_step_share_distance": step_distance(best_fit, trained, owner),
            "attention_max_over_mean_8_ranks": imbalance(steps, lengths),
            "attention_max_over_mean_8_ranks_unordered": imbalance(shuffled, lengths),
        }
    return results


def step_distance(rows, trained, owner, rows_per_step=8):
    """Of steps of 8 rows: the mean largest distance of a source's share of the step from its target."""
    target = np.array(list(SHARES.values()))
    distances = []
    for start in range(0, len(rows) - rows_per_step + 1, rows_per_step):
        numbers = [number for row in rows[start : start + rows_per_step] for number in row]
        shares = np.bincount(owner[numbers], trained[numbers], len(target)) / trained[numbers].sum()
        distances.append(np.abs(shares - target).max())
    return round(float(np.mean(distances)), 4)


def imbalance(steps, lengths, ranks=8):
    """Time of the slowest rank over the mean, if time is attention and ranks wait after every micro-batch."""
    slowest = mean = 0.0
    for step in steps:
        costs = np.array([attention_cost(lengths[row]).sum() for row in step], dtype=float).reshape(-1, ranks)
        slowest, mean = slowest + costs.max(1).sum(), mean + costs.mean(1).sum()
    return round(float(slowest / mean), 3)


# ---- preparation ---------------------------------------------------------------------------------------------------

BASH = ToolSpec(
    "bash",
    "Run a command in the terminal.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)


def source_lines():
    files = sorted((Path(__file__).parents[2] / "north_lightning").rglob("*.py"))
    return [line for file in files for line in file.read_text().splitlines() if line.strip() and "<" not in line]


def trajectory(lines, seed):
    """An agent's conversation of 100 to 200 turns whose texts are lines of source code."""
    generator = random.Random(seed)
    task = "Fix this:\n" + "\n".join(generator.sample(lines, 40))
    messages = [Message("system", "You are an agent."), Message("user", task)]
    for turn in range(generator.randint(100, 200)):
        call = ToolCall(str(turn), "bash", {"command": "\n".join(generator.sample(lines, generator.randint(1, 6)))})
        messages.append(Message("assistant", reasoning=" ".join(generator.sample(lines, 2)), tool_calls=(call,)))
        result = "\n".join(generator.sample(lines, generator.randint(2, 30)))
        messages.append(Message("tool", result, tool_call_id=str(turn)))
    return (*messages, Message("assistant", "Done: " + generator.choice(lines), reasoning="All tests pass."))


class Stages:
    """Seconds of wall and CPU of named stages."""

    def __init__(self):
        self.seconds = {}

    def time(self, name, work):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.seconds[name] = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        return result


def prepare_ours(chat, conversations, row_tokens):
    """Per stage, and the packed tokens."""
    stages, store = Stages(), TokenStore()

    def tokenise_and_mask():
        for messages in conversations:
            store.add(chat.encode_conversation(messages, (BASH,), "agentic"))

    stages.time(
        "render (also part of the next)", lambda: [chat.segments(messages, (BASH,)) for messages in conversations]
    )
    stages.time("render, tokenise, mask", tokenise_and_mask)

    def pack():
        numbers = range(len(store))
        stream = StepStream(store.lengths, store.trained_tokens, {"agentic": numbers}, None, row_tokens, 0)
        return [store.pack(stream.next_step()[0]) for _ in range(stream.plan_pass().num_rows)]

    rows = stages.time("pack", pack)
    tokens, trained = sum(len(row.token_ids) for row in rows), sum(int(row.loss_mask.sum()) for row in rows)
    return stages.seconds, tokens, trained


def prepare_trl(trl_parts, tokenizer_dir, conversations, row_tokens, num_processes=None):
    """TRL's own preparation: messages to packed rows with an assistant mask, without a trainer around it.

    CPU seconds are this process's: with ``num_processes`` only the wall time says something.
    """
    datasets, sft_trainer, pack_dataset, transformers = trl_parts
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    template = template_with_generation()
    records = [
        {"messages": [openai_message(message) for message in messages], "tools": json.dumps([openai_tool()])}
        for messages in conversations
    ]
    dataset = datasets.Dataset.from_list(records)
    stages = Stages()
    stages.time(
        "render (also part of the next)",
        lambda: [
            tokenizer.apply_chat_template(row["messages"], [openai_tool()], chat_template=template, tokenize=False)
            for row in dataset
        ],
    )
    owner = type("Owner", (), {})()
    owner.chat_template, owner._tokenizer, owner.completion_only_loss = template, tokenizer, False
    arguments = type("Arguments", (), {})()
    settings = {
        "dataset_num_proc": num_processes, "dataset_text_field": "text", "assistant_only_loss": True,
        "max_length": row_tokens, "shuffle_dataset": False, "seed": 0, "packing_strategy": "bfd",
        "truncation_mode": "keep_start",
    }  # fmt: skip
    vars(arguments).update(settings | {"max_length": None})
    prepare = sft_trainer.SFTTrainer._prepare_dataset
    tokenised = stages.time(
        "render, tokenise, mask", lambda: prepare(owner, dataset, tokenizer, arguments, False, None, "train")
    )
    packed = stages.time(
        "pack", lambda: pack_dataset(tokenised.select_columns(["input_ids", "labels"]), row_tokens, "bfd")
    )
    tokens = sum(len(row["input_ids"]) for row in packed)
    trained = sum(label != -100 for row in packed for label in row["labels"])
    return stages.seconds, tokens, trained


def template_with_generation():
    """Our template with the marks that transformers makes assistant masks from."""
    opening = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>\n{{- message.reasoning_content"
    assert opening in CHAT_TEMPLATE
    marked = CHAT_TEMPLATE.replace(opening, opening.replace("\n{{-", "{%- generation -%}{{-"), 1)
    ending = "{%- endif -%}\n<|END_OF_TURN_TOKEN|>\n{%- elif message.role"
    assert ending in marked
    return marked.replace(ending, "{%- endif -%}\n<|END_OF_TURN_TOKEN|>{%- endgeneration -%}\n{%- elif message.role", 1)


def openai_tool():
    return {
        "type": "function",
        "function": {"name": BASH.name, "description": BASH.description, "parameters": dict(BASH.parameters)},
    }


def openai_message(message):
    record = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        record["reasoning_content"] = message.reasoning
    if message.tool_calls:
        call = message.tool_calls[0]
        function = {"name": call.name, "arguments": dict(call.arguments)}
        record["tool_calls"] = [{"id": call.id, "type": "function", "function": function}]
    if message.tool_call_id is not None:
        record["tool_call_id"] = message.tool_call_id
    return record


def import_trl(folder):
    """What is used of TRL, or why there is nothing."""
    if folder is not None:
        sys.path.append(str(folder))
    try:
        import datasets
        import transformers
        from trl.data_utils import pack_dataset
        from trl.trainer import sft_trainer
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    datasets.disable_progress_bars()
    datasets.disable_caching()
    return datasets, sft_trainer, pack_dataset, transformers


def preparation(num_conversations, rounds, trl_folder):
    lines = source_lines()
    conversations = [trajectory(lines, seed) for seed in range(num_conversations)]
    trl_parts = import_trl(trl_folder)
    with tempfile.TemporaryDirectory() as directory:
        chat = ChatFormat(train_tokenizer(lines, [], 8192, directory), reasoning=True)
        ours, theirs, theirs_two = [], [], []
        for _ in range(rounds):
            ours.append(prepare_ours(chat, conversations, K128))
            if not isinstance(trl_parts, str):
                theirs.append(prepare_trl(trl_parts, directory, conversations, K128))
                theirs_two.append(prepare_trl(trl_parts, directory, conversations, K128, num_processes=2))
    result = {"conversations": num_conversations, "rounds": rounds, "tokens": ours[0][1], "trained_tokens": ours[0][2]}
    result["ours"] = median_stages(ours)
    if not theirs:
        return result | {"trl": f"not measured: {trl_parts}"}
    result["trl"] = median_stages(theirs) | {"tokens": theirs[0][1], "trained_tokens": theirs[0][2]}
    result["ours_faster_by"] = {
        stage: {
            kind: round(result["trl"][stage][kind] / result["ours"][stage][kind], 2) for kind in ("wall_s", "cpu_s")
        }
        for stage in result["ours"]
    }
    two = {stage: times["wall_s"] for stage, times in median_stages(theirs_two).items()}
    result["trl_two_processes"] = {"wall_s": two}
    result["ours_faster_than_two_processes_by"] = {
        stage: round(wall / result["ours"][stage]["wall_s"], 2) for stage, wall in two.items()
    }
    return result


def median_stages(runs):
    stages = {
        stage: {kind: round(statistics.median(run[0][stage][kind] for run in runs), 4) for kind in ("wall_s", "cpu_s")}
        for stage in runs[0][0]
    }
    counted = [times for stage, times in stages.items() if "also part" not in stage]
    total = {kind: round(sum(times[kind] for times in counted), 4) for kind in ("wall_s", "cpu_s")}
    return stages | {"all": total}


# ---- kill and resume -----------------------------------------------------------------------------------------------

ROWS_PER_STEP = 4
SPLITS = ((4, 1), (2, 2), (1, 4))  # micro-batches, ranks


def small_store(num_samples=1200):
    generator = np.random.default_rng(0)
    store, sources = TokenStore(), {"a": [], "b": [], "c": []}
    for number in range(num_samples):
        name = "abc"[number % 3]
        length = int(np.clip(generator.lognormal(5.5, 0.8), 8, 2048))
        mask = [False, *(generator.random(length - 1) < 0.5).tolist()]
        mask[-1] = True
        store.add(TokenizedSample(generator.integers(10, 8000, length).tolist(), mask, name))
        sources[name].append(number)
    return store, sources


def loaders(store, sources, split, num_workers):
    accumulate, world_size = split
    for rank in range(world_size):
        shares = {"a": 0.5, "b": 0.3, "c": 0.2}
        stream = StepStream(store.lengths, store.trained_tokens, sources, shares, 2048, 0, ROWS_PER_STEP)
        yield SFTLoader(store, stream, accumulate, world_size, rank, num_workers)


def report_steps(store, sources, split, num_workers, state, pipe):
    """Run all ranks in lock-step; after every step write its digest and the state. Ends only by being killed."""
    ranks = list(loaders(store, sources, split, num_workers))
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(state)
    while True:
        digest, rows = hashlib.sha256(), 0
        for batches in zip(*ranks, strict=True):
            for batch in batches:
                labels = torch.where(batch.loss_mask, batch.token_ids, -100)
                for tensor in (batch.token_ids, labels, batch.cu_seqlens):
                    digest.update(tensor.numpy().tobytes())
                digest.update(str((batch.num_trained_tokens, batch.num_documents)).encode())
                rows += 1
            if rows == ROWS_PER_STEP:
                line = {"sha256": digest.hexdigest(), "state": ranks[0].state_dict()}
                os.write(pipe, (json.dumps(line) + "\n").encode())
                digest, rows = hashlib.sha256(), 0


def run_and_kill(store, sources, split, num_workers, state, num_steps):
    """(digests, state) of the first steps of a child that is then killed while it goes on."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            report_steps(store, sources, split, num_workers, state, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as lines:
        steps = [json.loads(lines.readline()) for _ in range(num_steps)]
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return [step["sha256"] for step in steps], steps[-1]["state"]


def kills(num_kills):
    store, sources = small_store()
    generator = random.Random(0)
    results = {}
    for num_workers in (0, 1, 2):
        lengths = [generator.randint(1, 6) for _ in range(num_kills)]
        digests, state = [], None
        splits = [SPLITS[generator.randrange(len(SPLITS))] for _ in lengths]
        for num_steps, split in zip(lengths, splits, strict=True):
            new, state = run_and_kill(store, sources, split, num_workers, state, num_steps)
            digests += new
        whole, _ = run_and_kill(store, sources, SPLITS[0], 0, None, len(digests))
        results[f"{num_workers} workers"] = {
            "kills": num_kills,
            "steps": len(digests),
            "changes_of_data_parallel_size": sum(a != b for a, b in pairwise(splits)),
            "identical": digests == whole,
            "sha256_of_all": hashlib.sha256("".join(digests).encode()).hexdigest(),
        }
    return results


def resume_of_a_million():
    lengths, trained, sources = synthetic(1_060_000, K64, 0)
    stream = StepStream(lengths, trained, sources, SHARES, K64, 0, rows_per_step=64)
    for _ in range(20):
        stream.next_step()
    state = {"stream": stream.fingerprint, "position": stream.state_dict()}
    expected = stream.next_step()
    wall = time.perf_counter()
    resumed = StepStream(lengths, trained, sources, SHARES, K64, 0, rows_per_step=64)
    assert resumed.fingerprint == state["stream"]
    resumed.load_state_dict(state["position"])
    step = resumed.next_step()
    seconds = time.perf_counter() - wall
    return {
        "samples": len(lengths),
        "resume_s": round(seconds, 3),
        "state_bytes": len(json.dumps(state)),
        "identical": step == expected,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--trl",
        type=Path,
        default=None,
        help="folder named site-packages (dill asks for that name) with trl, datasets and what they need",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench/data.json"))
    arguments = parser.parse_args()
    report = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for name, measure in {
        "kill_and_resume": lambda: kills(arguments.kills),  # first: it forks, before anything has started threads
        "resume_of_a_million": resume_of_a_million,
        "mixture": lambda: mixture_errors(range(arguments.seeds)),
        "packing": packing,
        "preparation": lambda: preparation(arguments.conversations, arguments.rounds, arguments.trl),
    }.items():
        report[name] = measure()
        print(name, json.dumps(report[name], indent=2), flush=True)
    report["load_after"] = os.getloadavg()[0]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
