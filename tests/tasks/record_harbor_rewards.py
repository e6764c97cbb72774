"""Asks Harbor itself what reward files say: a JSON list of numbers by name, or null where it has no verdict.

python3.12 -m venv peer && peer/bin/pip install harbor==0.25.0
peer/bin/python tests/tasks/record_harbor_rewards.py tests/tasks/harbor_rewards.json
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from harbor.models.trial.paths import TrialPaths
from harbor.models.verifier.result import VerifierResult
from harbor.verifier.verifier import Verifier
from harbor_rewards import files


def verdict(row: dict[str, bytes]) -> dict[str, float] | None:
    with tempfile.TemporaryDirectory() as folder:
        paths = TrialPaths(Path(folder))
        paths.verifier_dir.mkdir(parents=True)
        for name, content in row.items():
            (paths.verifier_dir / name).write_bytes(content)
        asked = SimpleNamespace(trial_paths=paths)
        try:  # the end of Verifier.verify
            if paths.reward_json_path.exists():
                rewards = Verifier._parse_reward_json(asked)
            elif paths.reward_text_path.exists():
                rewards = Verifier._parse_reward_text(asked)
            else:
                return None
            return VerifierResult(rewards=rewards).rewards
        except Exception:  # the trial has no reward
            return None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([verdict(row) for row in files(2000)]) + "\n")
