"""Lets Harbor itself run and grade our tasks of several steps and those with a separate verifier.

python3.12 -m venv peer && peer/bin/pip install harbor==0.25.0
PYTHONPATH=tests/tasks peer/bin/python tests/tasks/record_harbor_trials.py tests/tasks/harbor_trials.json

Harbor's own trial, verifier, artifact handler and oracle agent; only the environment is ours, because it needs no
container engine: a directory that bubblewrap shows as the root file system, ``environment/files`` at ``/work``.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.environments.capabilities import EnvironmentCapabilities
from harbor.models.trial.config import AgentConfig, EnvironmentConfig, TaskConfig, TrialConfig
from harbor.trial.trial import Trial
from harbor_trials import TRIALS, write_trial

_SYSTEM = [
    word for name in ("usr", "etc", "bin", "lib", "lib64", "sbin") for word in ("--ro-bind", f"/{name}", f"/{name}")
]


class DirectoryEnvironment(BaseEnvironment):
    @staticmethod
    def type():
        return "directory"

    @property
    def capabilities(self):
        return EnvironmentCapabilities()

    def _validate_definition(self):
        pass

    async def start(self, force_build):
        self.place = Path(tempfile.mkdtemp())
        for name in ("logs/agent", "logs/verifier", "logs/artifacts", "tests", "solution", "tmp"):
            (self.place / name).mkdir(parents=True)
        shutil.copytree(self.environment_dir / "files", self.place / "work")

    async def stop(self, delete):
        shutil.rmtree(self.place)

    def _here(self, path):
        return self.place / str(path).lstrip("/")

    async def upload_file(self, source_path, target_path):
        shutil.copy2(source_path, self._here(target_path))

    async def upload_dir(self, source_dir, target_dir):
        shutil.copytree(source_dir, self._here(target_dir), symlinks=True, dirs_exist_ok=True)

    async def download_file(self, source_path, target_path):
        shutil.copy2(self._here(source_path), target_path)

    async def download_dir(self, source_dir, target_dir):
        shutil.copytree(self._here(source_dir), target_dir, symlinks=True, dirs_exist_ok=True)

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        words = ["bwrap", "--bind", str(self.place), "/", *_SYSTEM, "--proc", "/proc", "--dev", "/dev"]
        for name, value in (env or {}).items():
            words += ["--setenv", name, value]
        words += ["--unshare-pid", "--chdir", cwd or "/work", "bash", "-c", command]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, timeout=timeout_sec)
        return ExecResult(stdout=done.stdout, stderr=done.stderr, return_code=done.returncode)


def rewards_of(result):
    return None if result is None else result.rewards


async def verdict(name):
    """What Harbor says of the solution, and of each step that it ran."""
    with tempfile.TemporaryDirectory() as parent:
        directory = write_trial(name, Path(parent))
        config = TrialConfig(
            task=TaskConfig(path=directory),
            trials_dir=Path(parent) / "trials",
            agent=AgentConfig(name="oracle"),
            environment=EnvironmentConfig(import_path="record_harbor_trials:DirectoryEnvironment"),
        )
        result = await (await Trial.create(config)).run()
        steps = {step.step_name: rewards_of(step.verifier_result) for step in result.step_results or ()}
        return {"rewards": rewards_of(result.verifier_result), "steps": steps}


def main():
    verdicts = {name: asyncio.run(verdict(name)) for name in TRIALS}
    Path(sys.argv[1]).write_text(json.dumps(verdicts, indent=1) + "\n")


if __name__ == "__main__":
    main()
