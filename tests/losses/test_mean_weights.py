"""Weights of the two means: against a loop over conversations, and however rows and processes share a step."""

from itertools import pairwise

import torch

from north_lightning.losses import conversation_mean_weights, token_mean_weights


def row(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss mask, bounds, trained tokens of each document)."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.rand(sum(lengths), generator=generator) < 0.6
    mask[bounds[:-1].long()] = False
    mask[bounds[1:].long() - 1] = True
    trained = torch.tensor([int(mask[start:end].sum()) for start, end in pairwise(bounds.tolist())])
    return mask, bounds, trained


def test_every_conversation_counts_the_same_however_the_step_is_split_into_rows_and_processes() -> None:
    rows = [row([9, 2, 30], 0), row([17], 1)]
    losses = [torch.rand(len(mask), generator=torch.Generator().manual_seed(7)) for mask, _, _ in rows]
    means = [
        loss[start:end][mask[start:end]].mean()
        for (mask, bounds, _), loss in zip(rows, losses, strict=True)
        for start, end in pairwise(bounds.tolist())
    ]
    expected = sum(means) / 4

    total = torch.tensor(0.0)
    for (mask, bounds, trained), loss in zip(rows, losses, strict=True):
        total += (conversation_mean_weights(mask, bounds, trained, 4) * loss[mask]).sum()
    torch.testing.assert_close(total, expected)

    shared = torch.tensor(0.0)
    for (mask, bounds, trained), loss in zip(rows, losses, strict=True):
        for part in (slice(0, 12), slice(12, None)):  # two processes, each with the tokens that it predicts
            held = torch.zeros_like(mask)
            held[part] = mask[part]
            shared += (conversation_mean_weights(held, bounds, trained, 4) * loss[held]).sum()
    torch.testing.assert_close(shared, expected)


def test_token_weights_give_the_mean_over_all_tokens_of_the_step() -> None:
    rows = [row([9, 2, 30], 0)[0], row([17], 1)[0]]
    count = sum(int(mask.sum()) for mask in rows)
    weights = torch.cat([token_mean_weights(mask, count) for mask in rows])
    assert weights.shape == (count,)
    torch.testing.assert_close(weights, torch.full((count,), 1 / count))
