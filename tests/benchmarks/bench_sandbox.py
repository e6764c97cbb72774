"""What a sandbox costs and holds on this machine: time, memory, what 10,000 of them leave behind, attacks, late writes,
cheats; and how fast task directories are checked.

    python tests/benchmarks/bench_sandbox.py [steps] [levels] [live_terminals] [leftovers] [cheats] [checks]

Steps: CPU counts this process and everything it started; the bare start is the same command line by ``subprocess``.
Suites run on every isolation level that this machine has, and the file says which those were.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle as cycled
from pathlib import Path

import psutil

from north_lightning.sandbox import BubblewrapProvider, DockerProvider, Shell, Terminal
from north_lightning.sandbox.slots import UIDS_PER_PROCESS

sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("sandbox", "tasks", "verifiers"))
from attacks import ATTACKS, attack_all
from conformance import CASES, run_cases
from container_engine import container_engine
from harbor_directories import DIRECTORIES, write_directory
from late_write import graded, naively_graded, rewards
from pytest_cheats import PYTEST_CHEATS
from root_file_system import make_root_file_system
from test_pytest_tasks import make_pytest_task
from test_unit_tests import FIXED, SOFTWARE_CHEATS, TERMINAL_CHEATS, cheat_at, make_software, make_terminal, score

MIB = 1 << 20
SUITE_LIMITS = {"max_work_bytes": 64 * MIB, "max_file_bytes": 8 * MIB, "max_files": 5000, "max_processes": 64}


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


# ---- starting


async def starts(provider, image, count):
    """Milliseconds from ``open`` to the first program running, and to a terminal's first prompt; starts a second."""
    start_ms, terminal_ms = [], []
    for _ in range(count):
        begin = time.perf_counter()
        sandbox = await provider.open(image)
        await sandbox.spawn(["true"])
        start_ms.append(1000 * (time.perf_counter() - begin))
        await sandbox.close()
        begin = time.perf_counter()
        sandbox = await provider.open(image)
        terminal = Terminal(sandbox)
        await terminal.start()
        terminal_ms.append(1000 * (time.perf_counter() - begin))
        await terminal.close()
        await sandbox.close()
    begin = time.perf_counter()
    await at_once(4, [cycle(provider, image, ":") for _ in range(4 * count)])
    rate = 4 * count / (time.perf_counter() - begin)
    return {"start": quantiles(start_ms), "terminal": quantiles(terminal_ms), "starts_per_s": round(rate, 1)}


def quantiles(values):
    cuts = statistics.quantiles(values, n=20)
    return {"median_ms": round(statistics.median(values), 1), "p95_ms": round(cuts[18], 1), "count": len(values)}


async def cycle(provider, image, command):
    sandbox = await provider.open(image)
    try:
        await sandbox.run(command, 30)
    finally:
        await sandbox.close()


async def at_once(num, coroutines):
    gate = asyncio.Semaphore(num)

    async def one(coroutine):
        async with gate:
            return await coroutine

    return await asyncio.gather(*map(one, coroutines))


# ---- living


async def live_terminals(provider, image, count):
    """Memory of ``count`` open sandboxes with a terminal each: proportional set size, and what the kernel charges."""
    sandboxes = await at_once(8, [provider.open(image) for _ in range(count)])
    terminals = [Terminal(sandbox) for sandbox in sandboxes]
    await at_once(8, [terminal.start() for terminal in terminals])
    uids = {sandbox.uid for sandbox in sandboxes}
    pss = sum(proportional_bytes(pid) for pid in processes_of(uids))
    charged = [charged_bytes(sandbox) for sandbox in sandboxes]
    for sandbox in sandboxes:
        await sandbox.close()
    for terminal in terminals:
        await terminal.close()
    return {
        "count": count,
        "pss_mib_each": round(pss / count / MIB, 2),
        "cgroup_mib_each": None if None in charged else round(sum(charged) / count / MIB, 2),
    }


def processes_of(uids):
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.stat().st_uid in uids or int((entry / "status").read_text().split("Uid:")[1].split()[0]) in uids:
                yield int(entry.name)


def proportional_bytes(pid):
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
    return 0


def charged_bytes(sandbox):
    for directory in sandbox._host.cgroups.directories:
        for name in ("memory.current", "memory.usage_in_bytes"):
            path = directory / sandbox._slot.name / name
            if path.exists():
                return int(path.read_text())
    return None


# ---- ending


async def leftovers_of(provider, image, count):
    """Start and kill ``count`` sandboxes whose programs try to stay; what of them is left."""
    command = "(setsid sleep 8899 &); (trap '' TERM; sleep 8899 &); echo x >/tmp/f; mkdir -p /work/a/b"
    provider.check()
    before = traces(provider._prepared())
    begin = time.perf_counter()
    for start in range(0, count, 1000):
        await at_once(4, [cycle(provider, image, command) for _ in range(min(1000, count - start))])
    left = {kind: sorted(map(str, found - before[kind])) for kind, found in traces(provider._prepared()).items()}
    cycles_per_s = round(count / (time.perf_counter() - begin), 1)
    return {"cycles": count, "cycles_per_s": cycles_per_s, **{kind: len(found) for kind, found in left.items()}}


def traces(host):
    """Processes (zombies too), mounts, control groups and files of one provider's sandboxes, whoever else has some."""
    uids = range(host._first_uid, host._first_uid + UIDS_PER_PROCESS)
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    return {
        "processes": set(processes_of(uids)) | {child.pid for child in psutil.Process().children(recursive=True)},
        "mounts": {mount for mount in mounts if mount.startswith(f"{host.root}/")},
        "cgroups": {path for group in host.cgroups.directories for path in group.iterdir() if path.is_dir()},
        "files": set(host.root.rglob("*")),
    }


# ---- holding


async def suites(provider, folder):
    """Conformance and attacks on one isolation level; which one it was."""
    described = provider.describe()
    (folder / "cases").mkdir(parents=True)
    (folder / "attacks").mkdir()
    failed = await run_cases(provider, folder / "cases")
    won = await attack_all(provider, folder / "attacks")
    print(
        described["isolation"], f"{len(failed)} of {len(CASES)} cases failed, {len(won)} of {len(ATTACKS)} attacks won"
    )
    return {
        "isolation": described["isolation"],
        "resource_control": described["resource_control"],
        "cases": len(CASES),
        "cases_failed": sorted(failed),
        "attacks": len(ATTACKS),
        "attacks_won": sorted(won),
    }


async def races(provider, folder, count):
    """Rewards of attempts that write late, graded as here, and naively in the sandbox of the attempt."""
    results = {}
    for way, num in ((graded, count), (naively_graded, max(count // 10, 5))):
        (folder / way.__name__).mkdir(parents=True)
        values = await rewards(way, provider, folder / way.__name__, num)
        results[way.__name__] = {"runs": num, "scored_0": values.count(0.0), "scored_1": values.count(1.0)}
    return results


def levels(folder, stack):
    """A provider of every isolation level that this machine has."""
    yield "bubblewrap", BubblewrapProvider(memory_bytes=1024 * MIB, **SUITE_LIMITS)
    try:
        engine = stack.enter_context(container_engine(folder / "engine"))
    except LookupError as error:
        print(f"docker: not tested: {error}")
        return
    image = str(make_root_file_system(folder / "root"))
    yield "docker", DockerProvider(image, engine=engine, memory_bytes=512 * MIB, **SUITE_LIMITS)


# ---- grading and checking


def cheats(folder):
    """Rewards of every named cheat, and of the honest solutions beside them."""
    provider = BubblewrapProvider()
    results = {}
    for kind, make, named, honest in (
        ("software", make_software, SOFTWARE_CHEATS, {"calc.py": FIXED}),
        ("software by pytest", make_pytest_task, PYTEST_CHEATS, {"calc.py": FIXED}),
        ("terminal", make_terminal, TERMINAL_CHEATS, {"answer": "blue\n"}),
    ):
        rewards = {}
        for number, (name, files) in enumerate({**named, "": honest}.items()):
            task = make(folder / f"{kind}{number}")
            rewards[name] = score(task, cheat_at(task, files), provider).value
        honest_reward = rewards.pop("")
        won = sorted(name for name, value in rewards.items() if value != 0.0)
        results[kind] = {"cheats": len(rewards), "won": won, "honest": honest_reward}
    return results


def checks(folder, count):
    """``tasks check`` on so many directories of all kinds that there are, the command's start included."""
    directories = [write_directory(name, folder / str(i)) for i, name in zip(range(count), cycled(DIRECTORIES))]
    command = [sys.executable, "-m", "north_lightning", "tasks", "check", *map(str, directories)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.stdout, done.stderr[:500]
    return {"directories": count, "per_s": round(count / seconds), "said": done.stdout.splitlines()[-1]}


SECTIONS = ("steps", "levels", "live_terminals", "leftovers", "cheats", "checks")


def measure_section(name, arguments, stack):
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-sandbox-")))
    folder.chmod(0o755)
    empty = folder / "empty"
    empty.mkdir()
    if name == "steps":
        return asyncio.run(measure(arguments.count))
    if name == "levels":
        return measure_levels(arguments, folder, empty, stack)
    if name == "live_terminals":
        return asyncio.run(live_terminals(BubblewrapProvider(), empty, 256))
    if name == "leftovers":
        return asyncio.run(leftovers_of(BubblewrapProvider(), empty, arguments.cycles))
    return cheats(folder) if name == "cheats" else checks(folder, arguments.checks)


def measure_levels(arguments, folder, empty, stack):
    results = {}
    for name, provider in levels(folder, stack):
        provider.check()
        level = results[name] = {}
        slow = 1 if name == "bubblewrap" else 5
        level["starts"] = asyncio.run(starts(provider, empty, max(arguments.count // slow, 2)))
        print(name, level["starts"])
        level["suites"] = asyncio.run(suites(provider, folder / name))
        num = arguments.races if name == "bubblewrap" else max(arguments.races // 50, 1)
        level["late_writes"] = asyncio.run(races(provider, folder / name / "races", num))
        print(name, level["late_writes"])
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--races", type=int, default=1000)
    parser.add_argument("--checks", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/sandbox.json"))
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"expected sections of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections or SECTIONS:
        load = os.getloadavg()[0]
        with contextlib.ExitStack() as stack:
            result = measure_section(name, arguments, stack)
        results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        results[name] = {"load_before": round(load, 2)} | result
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name]))


if __name__ == "__main__":
    main()
