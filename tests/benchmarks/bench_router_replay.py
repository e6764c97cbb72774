"""How far trainer and sampler drift apart when their routers read slightly different inputs: live routing and replay.

    python tests/benchmarks/bench_router_replay.py [--steps 200] [--output runs/bench/router_replay.json]

A North-shaped model (128 experts, top-8, tiny widths) is first trained on a random grammar, so that its routers are not
random ones. Sampler and trainer then have the same weights, and Gaussian noise is added to what the *trainer's* routers
read, as another kernel or dtype would: small against the input's own size. Reported for each noise level: the share of
expert choices that noise changes, and the mismatch, exact KL(sampler || trainer) over the vocabulary, mean over
positions, with live routing and with the sampler's choices replayed (the trainer's scores stay noisy in both).
Published anchor (facts of Qwen3-30B-A3B, bf16 trainer and vLLM): about 10% of choices differ, and replay takes the
mismatch KL from 1.5e-3 to 2e-4..5e-4.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from north_lightning.losses import token_logprobs
from north_lightning.model import NorthConfig, NorthModel, Routing
from north_lightning.model.experts import Router

CONFIG = NorthConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=128,
    num_experts_per_tok=8,
    prefix_dense_intermediate_size=256,
    sliding_window=63,
    initializer_range=0.09,
)
DOCUMENT_TOKENS, NUM_DOCUMENTS = 128, 16


class Grammar:
    """A random language: each token has four possible successors, which depend on the two tokens before."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.successors = torch.randint(CONFIG.vocab_size, (CONFIG.vocab_size, 4, 4), generator=generator)
        self.odds = torch.tensor([0.6, 0.2, 0.15, 0.05])

    def documents(self) -> tuple[Tensor, Tensor]:
        """A packed row of ``NUM_DOCUMENTS``: token ids and boundaries."""
        tokens = torch.randint(CONFIG.vocab_size, (NUM_DOCUMENTS, 2), generator=self.generator)
        while tokens.shape[1] < DOCUMENT_TOKENS:
            choice = torch.multinomial(self.odds, NUM_DOCUMENTS, replacement=True, generator=self.generator)
            new = self.successors[tokens[:, -1], tokens[:, -2] % 4, choice]
            tokens = torch.cat([tokens, new[:, None]], 1)
        bounds = torch.arange(0, tokens.numel() + 1, DOCUMENT_TOKENS, dtype=torch.int32)
        return tokens.flatten(), bounds


def train(model: NorthModel, grammar: Grammar, num_steps: int) -> float:
    """AdamW on next tokens; the last step's mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    loss = torch.zeros(())
    for _ in range(num_steps):
        tokens, bounds = grammar.documents()
        is_last = torch.zeros_like(tokens, dtype=torch.bool)
        is_last[bounds[1:].long() - 1] = True
        sources = (~is_last).nonzero()[:, 0]
        hidden = model(tokens, bounds)
        logprobs, _ = token_logprobs(hidden[sources], model.embedding_weight, tokens[sources + 1])
        loss = -logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@contextmanager
def noisy_router_inputs(model: NorthModel, noise: float, seed: int) -> Iterator[None]:
    """What routers read gets noise of ``noise`` times its own root mean square; experts and attention do not."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0]
        size = x.square().mean(-1, keepdim=True).sqrt()
        return (x + noise * size * torch.randn(x.shape, generator=generator), *arguments[1:])

    handles = [m.register_forward_pre_hook(add_noise) for m in model.modules() if isinstance(m, Router)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def log_distribution(
    model: NorthModel, row: tuple[Tensor, Tensor], routing: list[Routing] | None, replayed: Tensor | None
) -> Tensor:
    """[T, V] float64."""
    hidden = model(*row, routing, replayed)
    return (hidden @ model.embedding_weight.T).double().log_softmax(-1)


def measure(model: NorthModel, row: tuple[Tensor, Tensor], noise: float, seed: int) -> dict[str, float]:
    routing: list[Routing] = []
    sampler = log_distribution(model, row, routing, None)
    shape = (row[0].shape[0], CONFIG.num_hidden_layers, CONFIG.num_experts_per_tok)
    choices = torch.full(shape, -1, dtype=torch.int16)
    for layer in routing:
        choices[:, layer.layer] = layer.expert_ids.to(torch.int16)
    kl, changed = {}, 0.0
    for name, replayed in (("live", None), ("replay", choices)):
        recorded: list[Routing] = []
        with noisy_router_inputs(model, noise, seed):
            trainer = log_distribution(model, row, recorded, replayed)
        kl[name] = float((sampler.exp() * (sampler - trainer)).sum(-1).mean())
        if replayed is not None:
            changed = sum(float(layer.replayed_differently()) for layer in recorded) / len(recorded)
    return {"noise": noise, "choices_changed": changed, "kl_live": kl["live"], "kl_replay": kl["replay"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/router_replay.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, grammar = NorthModel(CONFIG), Grammar(torch.Generator().manual_seed(0))
    loss = train(model, grammar, arguments.steps)
    print(f"trained for {arguments.steps} steps to a loss of {loss:.3f} (the grammar's entropy is 1.06)")

    row = grammar.documents()
    rows = []
    for noise in arguments.noise:
        seeds = [measure(model, row, noise, seed) for seed in range(4)]
        result = {name: sum(each[name] for each in seeds) / len(seeds) for name in seeds[0]}
        result["live_over_replay"] = result["kl_live"] / result["kl_replay"]
        rows.append(result)
        print(
            f"noise {noise:4.2f}: {result['choices_changed']:6.1%} of choices change, mismatch KL "
            f"{result['kl_live']:.2e} live, {result['kl_replay']:.2e} replayed: 1/{result['live_over_replay']:.1f}",
            flush=True,
        )
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "training": {"steps": arguments.steps, "loss": loss},
        "noise_levels": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
