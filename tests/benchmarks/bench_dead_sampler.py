"""A real RL run whose vLLM server is killed, or stopped, again and again: when it is found, and samples again.

    python tests/benchmarks/bench_dead_sampler.py [--quickstart runs/quickstart] [--kills 3] [--output FILE]

The run is the quickstart's RL stage from the checkpoint of a finished quickstart, in its own process, with everything
real. Half of the servers are killed (SIGKILL to the whole group), the others stopped (SIGSTOP: the port stays open, the
engine answers no more). Times are those of the lines that the run prints. "samples_again_s" is from the moment the new
server is up to the weights pushed and sampling resumed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from bench_weight_push import summary

ROOT = Path(__file__).parents[2]
FOUND, UP, AGAIN = "; starting it again", "generating at", "samples again"
STEPS_BETWEEN, PATIENCE_S = 3, 180.0


class Run:
    """The RL stage, in a folder that links to what the quickstart's earlier stages made."""

    def __init__(self, folder, quickstart, num_steps):
        (folder / "runs" / "quickstart").mkdir(parents=True)
        for made in quickstart.resolve().iterdir():
            if made.name != "rl":
                (folder / "runs" / "quickstart" / made.name).symlink_to(made)
        (folder / "configs").symlink_to(ROOT / "configs")
        self.folder = folder
        command = [sys.executable, "-m", "north_lightning", "fit", "--config", "configs/quickstart/rl.yaml"]
        command += [f"--trainer.max_steps={num_steps}", f"--data.num_batches={num_steps}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def wait_for_line(self, text):
        """When the next line with ``text`` came."""
        deadline = time.monotonic() + PATIENCE_S
        for line in self.process.stdout:
            if text in line:
                return time.monotonic()
            if time.monotonic() > deadline:
                break
        raise RuntimeError(f"expected a line with {text!r}; the run is in {self.folder}")

    def num_steps(self):
        history = self.folder / "runs" / "quickstart" / "rl" / "history.jsonl"
        return history.read_text().count('"train/loss"') if history.exists() else 0

    def wait_for_steps(self, num_steps):
        deadline = time.monotonic() + PATIENCE_S
        while self.num_steps() < num_steps:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"expected {num_steps} optimizer steps, got {self.num_steps()}")
            time.sleep(0.05)

    def server_group(self):
        """Process group of the server that is running."""
        for child in psutil.Process(self.process.pid).children():
            if "north_lightning.sampling.launch" in child.cmdline():
                return os.getpgid(child.pid)
        raise RuntimeError("expected a running server, found none")


def strike(run, signal_number):
    """Seconds until it was found, until a new server was up, and from then until it sampled the newest weights."""
    run.wait_for_steps(run.num_steps() + STEPS_BETWEEN)
    begun = time.monotonic()
    os.killpg(run.server_group(), signal_number)
    found, up, again = run.wait_for_line(FOUND), run.wait_for_line(UP), run.wait_for_line(AGAIN)
    return {"found_s": found - begun, "new_server_s": up - found, "samples_again_s": again - up}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/dead_sampler.json"))
    arguments = parser.parse_args()
    if not (arguments.quickstart / "sft_stage2" / "checkpoint").is_dir():
        print(f"not measured: {arguments.quickstart} holds no finished quickstart (make quickstart)")
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), arguments.quickstart, num_steps=2 * arguments.kills * (STEPS_BETWEEN + 2) + 6)
        try:
            run.wait_for_line(UP)
            strikes = {
                name: [strike(run, number) for _ in range(arguments.kills)]
                for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP))
            }
            run.process.stdout.read()
            exit_code = run.process.wait()
        finally:
            run.process.kill()
        num_steps = run.num_steps()
    result = {
        name: {key: summary([times[key] for times in struck]) for key in struck[0]} for name, struck in strikes.items()
    }
    result |= {"strikes": 2 * arguments.kills, "optimizer_steps": num_steps, "exit_code": exit_code}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
