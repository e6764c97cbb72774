"""The plain policy gradient: no importance weight, right where sampler and trainer are one policy."""

from __future__ import annotations

from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses.cispo import refuse_unusable


class PolicyGradientLoss(PolicyLoss):
    """REINFORCE (Williams 1992) over tokens: ``-1/num_trained_tokens * sum_t A_t log pi_trainer(t)``.

    Differs from CISPO: staleness and numerical mismatch are not corrected.
    """

    is_zero_without_advantage = True

    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        refuse_unusable(inputs)
        mask = inputs.loss_mask
        objective = (inputs.advantages[mask] * inputs.trainer_logprobs[mask]).sum()
        return PolicyLossOutputs(-objective / max(inputs.num_trained_tokens, 1), {"num_tokens": float(mask.sum())})
