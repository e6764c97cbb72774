"""Whatever a model says ends in a typed outcome, and no token is ever tokenised again."""

import pytest
from fuzz import HARNESSES, fuzz


@pytest.mark.parametrize("name", HARNESSES)
def test_fuzzed_episodes_end_in_typed_outcomes_without_drift(name):
    report = fuzz(name, episodes=15, seed=1, min_outputs=40)
    assert report.drifted_tokens == 0
    assert report.multi_turn_episodes > 0
    assert set(report.turns) >= {"carried out", "rejected"}
    assert sum(report.turns.values()) == report.outputs
