"""A sharded checkpoint is overwritten for ever by processes that are killed: the last complete one loads."""

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from north_lightning.parallel.checkpoints import ShardedCheckpoints
from north_lightning.run_folders import SHARDED_REST as REST

NUM_KILLS = 4


def load_then_overwrite(folder: Path, rendezvous: Path, answer: Connection) -> None:
    """Send what is in ``folder``; then save, for ever, larger and larger numbers there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    checkpoints, value = ShardedCheckpoints(), torch.zeros(300_000)
    if folder.exists():
        checkpoints.load({"value": value}, folder)
        rest = torch.load(folder / REST, weights_only=True)
        answer.send((rest["number"], value.unique().tolist()))
    while True:
        value += 1
        checkpoints.save({"value": value}, {"number": int(value[0])}, folder)
        checkpoints.wait()
        answer.send((int(value[0]), value.unique().tolist()))


def test_a_kill_at_any_moment_of_a_sharded_write_leaves_the_last_complete_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "north_lightning.modules"])
    noise, written = random.Random(0), 0
    for life in range(NUM_KILLS + 1):
        answers, theirs = context.Pipe(duplex=False)
        arguments = tmp_path / "last.ckpt", tmp_path / f"rendezvous{life}", theirs
        process = context.Process(target=load_then_overwrite, args=arguments, daemon=True)
        process.start()
        theirs.close()
        assert answers.poll(60)
        number, values = answers.recv()
        assert values == [number]
        # The last that is known to be complete, or one that was complete before the kill could be told of.
        assert number in (written, written + 1)
        time.sleep(noise.uniform(0.0, 0.06))
        process.kill()
        written = number
        try:
            while True:
                written, _ = answers.recv()
        except EOFError:
            process.join()
