"""One small checkpoint with tokenizer and tasks for all trials."""

from pathlib import Path

import pytest
from fault_trials import write_trial_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    write_trial_inputs(folder)
    return folder
