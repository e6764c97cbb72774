"""Training speed of the quickstart model: ours against transformers, on the same documents, in one process.

    python tests/benchmarks/bench_sft_step.py [--threads 1 2] [--rounds 12] [--output runs/bench/sft_step.json]

One step is forward, next-token cross entropy, backward and AdamW, in float32. Ours takes the documents as one packed
row, transformers as a padded batch; tokens per second count the documents' tokens only. The implementations take turns
within each round, so a busy machine slows all of them; CPU time is what to compare where it is not idle. Both compute
the same loss (checked before anything is timed).
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from north_lightning.losses import token_logprobs
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart" / "model.json"
ROW_TOKENS = 4096


def make_documents(shortest: int, longest: int, vocab_size: int) -> list[Tensor]:
    """Documents of uniformly drawn lengths, about ``ROW_TOKENS`` tokens in all; the last one is cut."""
    generator = torch.Generator().manual_seed(0)
    documents, left = [], ROW_TOKENS
    while left > 1:
        length = min(left, int(torch.randint(shortest, longest + 1, (), generator=generator)))
        documents.append(torch.randint(10, vocab_size, (length,), generator=generator))
        left -= length
    return documents


def our_step(model: NorthModel, documents: list[Tensor]) -> Callable[[], Tensor]:
    token_ids = torch.cat(documents)
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    is_last = torch.zeros_like(token_ids, dtype=torch.bool)
    is_last[bounds[1:].long() - 1] = True
    rows = (~is_last).nonzero()[:, 0]
    targets = token_ids[rows + 1]

    def loss() -> Tensor:
        hidden = model(token_ids, bounds)
        logprobs, _ = token_logprobs(hidden[rows], model.embedding_weight, targets, model.config.logit_scale)
        return -logprobs.mean()

    return training_step(model, loss)


def their_step(directory: str, experts: str, documents: list[Tensor]) -> Callable[[], Tensor]:
    model = transformers.Cohere2MoeForCausalLM.from_pretrained(
        directory, experts_implementation=experts, attn_implementation="sdpa"
    )
    input_ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    is_token = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    labels = input_ids.masked_fill(is_token == 0, -100)
    attention_mask = None if bool(is_token.all()) else is_token

    def loss() -> Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss

    return training_step(model, loss)


def training_step(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(documents: list[Tensor], num_rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step and speed of each implementation, and ours relative to the others."""
    torch.manual_seed(0)
    # transformers' reading of the window: both must do the same work.
    config = NorthConfig.load(CONFIG, sliding_window_includes_current=True)
    reference = transformers.Cohere2MoeForCausalLM(transformers.Cohere2MoeConfig(**config.to_hf()))
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        steps = {
            "ours": our_step(load_checkpoint(directory, sliding_window_includes_current=True), documents),
            "transformers_eager": their_step(directory, "eager", documents),
            "transformers_grouped_mm": their_step(directory, "grouped_mm", documents),
        }
    losses = {name: step().item() for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"not the same training step: {losses}")

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    num_tokens = sum(map(len, documents))
    results = {}
    for name, pairs in times.items():
        wall_s, cpu_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        results[name] = {"step_s": wall_s, "cpu_s": cpu_s, "tokens_per_s": num_tokens / wall_s}
    for name in steps:
        for clock, column in (("wall", 0), ("cpu", 1)):
            pairs = zip(times[name], times["ours"], strict=True)
            ratio = statistics.median(theirs[column] / ours[column] for theirs, ours in pairs)
            results[name][f"ours_faster_by_{clock}"] = ratio
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/sft_step.json"))
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    vocab_size = NorthConfig.load(CONFIG).vocab_size
    workloads = {
        "equal documents of 256 tokens": make_documents(256, 256, vocab_size),
        "documents of 150 to 450 tokens": make_documents(150, 450, vocab_size),
        "documents of 1024 tokens": make_documents(1024, 1024, vocab_size),
    }
    measurements = []
    for num_threads in arguments.threads:
        torch.set_num_threads(num_threads)
        for workload, documents in workloads.items():
            results = measure(documents, arguments.rounds)
            measurements.append({"threads": num_threads, "workload": workload, "results": results})
            print(f"{num_threads} thread(s), {workload}")
            for name, result in results.items():
                print(
                    f"  {name:24s} {result['tokens_per_s']:7.0f} tokens/s   ours faster by "
                    f"{result['ours_faster_by_wall']:.2f} (wall) {result['ours_faster_by_cpu']:.2f} (CPU time)",
                    flush=True,
                )
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "versions": versions, "row_tokens": ROW_TOKENS, "measurements": measurements}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}")


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
