"""Expert parallelism: tokens travel to the processes that hold their experts, and the results travel back.

In: the tokens of this process, with the router's weights and choices. Out: the experts' weighted sum for them. Each
process of the expert group holds E / n consecutive experts. No token is dropped and none is sent to a process twice for
the same expert; how many travel is known after one small exchange of counts, which waits for the device.

Shapes: T tokens of this process, K experts per token, D model, E experts, n processes; s = T * K slots (token-expert
pairs) of this process, S slots that arrive.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from north_lightning.model.experts import MoE
from north_lightning.parallel.exchange import exchange


class DispatchedExperts:
    """``MoE.mix`` for a process that holds a part of the experts."""

    def __init__(self, moe: MoE, num_experts: int, group: ProcessGroup) -> None:
        self._mix, self._group = moe.mix, group
        self._num_own = num_experts // dist.get_world_size(group)

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        num_tokens, top_k = expert_ids_TK.shape
        slots_s = expert_ids_TK.flatten().argsort(stable=True)  # by expert, and so by process
        counts = self._counts(expert_ids_TK)  # [2, n, E / n]
        send_counts, receive_counts = counts.sum(-1).tolist()

        def send(rows: Tensor) -> Tensor:
            return exchange(rows, send_counts, receive_counts, self._group)

        arrived_SD = send(x_TD[slots_s // top_k])
        weights_S1 = send(weights_TK.flatten()[slots_s, None])
        own = torch.arange(self._num_own, device=x_TD.device).repeat(len(send_counts))  # as they arrive: by sender
        ids_S1 = own.repeat_interleave(counts[1].flatten(), output_size=len(arrived_SD))[:, None]
        out_SD = self._mix(arrived_SD, weights_S1, ids_S1)
        out_sD = exchange(out_SD, receive_counts, send_counts, self._group)
        places = torch.empty_like(slots_s).scatter_(0, slots_s, torch.arange(len(slots_s), device=slots_s.device))
        return out_sD[places].unflatten(0, (num_tokens, top_k)).float().sum(1).to(x_TD.dtype)

    def _counts(self, expert_ids_TK: Tensor) -> Tensor:
        """[2, n, E / n] slots: sent to each process for each of its experts, received from each for each of ours."""
        num_processes = dist.get_world_size(self._group)
        sent = torch.bincount(expert_ids_TK.flatten(), minlength=num_processes * self._num_own)
        sent = sent.view(num_processes, self._num_own)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        return torch.stack([sent, received])
