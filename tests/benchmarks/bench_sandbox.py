"""What a sandbox costs on this machine: CPU and wall time of each step, one after the other and 32 at a time.

    python tests/benchmarks/bench_sandbox.py [--count 100] [--output runs/bench/sandbox.json]

CPU counts this process and everything it started. The bare start is the same command line by ``subprocess``.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from north_lightning.sandbox import BubblewrapProvider, Shell, Terminal


class Stopwatch:
    """Milliseconds per operation, CPU (own and children's) and wall."""

    def __init__(self):
        self.results = {}

    @contextlib.contextmanager
    def measured(self, name, count):
        cpu, wall = self._cpu_s(), time.monotonic()
        yield
        cpu, wall = self._cpu_s() - cpu, time.monotonic() - wall
        self.results[name] = {"cpu_ms": round(1000 * cpu / count, 2), "wall_ms": round(1000 * wall / count, 2)}
        print(f"{name:40} {self.results[name]['cpu_ms']:8.2f} ms CPU {self.results[name]['wall_ms']:8.2f} ms wall")

    @staticmethod
    def _cpu_s():
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare_starts(sandbox, count):
    for _ in range(count):
        filter_fd = sandbox._launcher.open_filter()
        fds = () if filter_fd is None else (filter_fd,)
        subprocess.run(
            sandbox._launcher.argv(["bash", "-c", ":"], filter_fd),
            stdout=subprocess.DEVNULL,
            env={},
            pass_fds=fds,
            check=True,
        )
        for fd in fds:
            os.close(fd)


def make_images(directory):
    """An empty image, and one of 200 files of 2 kB in 20 directories."""
    empty, tree = directory / "empty", directory / "tree"
    empty.mkdir()
    for number in range(200):
        path = tree / f"d{number % 20}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 2000)
    return empty, tree


async def episode(provider, image):
    sandbox = await provider.open(image)
    terminal = Terminal(sandbox)
    await terminal.start()
    for turn in range(5):
        assert await terminal.send(f"echo {turn}", 30) == f"{turn}\n"
    await sandbox.close()


async def measure(count):
    provider = BubblewrapProvider()
    provider.check()
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as directory:
        empty, tree = make_images(Path(directory))
        for name, image in (("open + close, empty image", empty), ("open + close, 200 files", tree)):
            with watch.measured(name, count):
                for _ in range(count):
                    await (await provider.open(image)).close()

        sandbox = await provider.open(empty)
        with watch.measured("bare start of bash, by subprocess", count):
            bare_starts(sandbox, count)
        with watch.measured("run ':'", count):
            for _ in range(count):
                await sandbox.run(":", 30)
        shell = Shell(sandbox)
        await shell.run(":", 30)
        with watch.measured("shell: run ':'", count):
            for _ in range(count):
                await shell.run(":", 30)
        terminal = Terminal(sandbox)
        with watch.measured("terminal: start + close", count):
            for _ in range(count):
                terminal = Terminal(sandbox)
                await terminal.start()
                await terminal.close()
        terminal = Terminal(sandbox)
        await terminal.start()
        with watch.measured("terminal: send ':'", count):
            for _ in range(count):
                await terminal.send(":", 30)
        await sandbox.close()

        with watch.measured("open + terminal + 5 commands + close", count):
            for _ in range(count):
                await episode(provider, empty)
        with watch.measured("the same, 32 at a time", 32 * max(count // 32, 1)):
            for _ in range(max(count // 32, 1)):
                await asyncio.gather(*(episode(provider, empty) for _ in range(32)))
    return {
        "count": count,
        "num_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "limits": provider.describe(),
        **watch.results,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/sandbox.json"))
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments.count))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
