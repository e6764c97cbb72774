"""Sixty and more attacks on a sandbox, written once: escape, resource, tampering, timing.

A *probe* is a script that prints WON if it succeeds; all probes run in one sandbox, one after the other. The rest are
coroutines that raise ``AssertionError`` if the attack succeeds. ``control`` runs the harmless probes without a sandbox:
there they must win, or they would prove nothing.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from conformance import World, processes_with, resident_bytes

from north_lightning.errors import TreeTooLargeError, VerifierError
from north_lightning.verifiers.unit_tests import read_regular_file


@dataclass(frozen=True)
class Attack:
    name: str
    kind: str  # escape, resource, tampering or timing
    script: str = ""  # of a probe
    is_harmless: bool = False  # may run without a sandbox, as root, and wins there
    check: Callable[[World], Awaitable[None]] | None = None


ATTACKS: list[Attack] = []


def probe(kind, name, script, *, harmless=False):
    ATTACKS.append(Attack(name, kind, script, harmless))


def python(kind, name, body, *, harmless=False):
    """A probe in Python: wins if ``body`` comes to its end (raise, or exit, to lose)."""
    code = "import os, sys, socket, ctypes, resource, time\nlibc = ctypes.CDLL(None, use_errno=True)\n" + body
    probe(kind, name, f"python3 - <<'END' 2>/dev/null && echo WON\n{code}\nEND", harmless=harmless)


def attack(kind):
    def register(function):
        ATTACKS.append(Attack(function.__name__, kind, check=function))
        return function

    return register


# ---- escape: files, processes, network and kernel of the host

probe("escape", "read a file of the host", 'cat "$SECRET" && echo WON', harmless=True)
probe("escape", "read it through the first process", 'cat "/proc/1/root$SECRET" && echo WON')
probe("escape", "read it through any process", 'for p in /proc/[0-9]*; do cat "$p/root$SECRET" && echo WON; done')
probe("escape", "read it through dots", 'cat "/proc/self/cwd/../../../../../..$SECRET" && echo WON', harmless=True)
probe("escape", "read it through a link", 'ln -sf "$SECRET" l && cat l && echo WON', harmless=True)
probe("escape", "read the passwords", "head -c 1 /etc/shadow && echo WON", harmless=True)
probe("escape", "reach a server of the host", "(: <>/dev/tcp/127.0.0.1/$PORT) && echo WON", harmless=True)
python("escape", "reach an abstract socket", "socket.socket(1).connect('\\0' + os.environ['NAME'])", harmless=True)
python("escape", "reach a socket in a directory", "socket.socket(1).connect(os.environ['SOCKET'])", harmless=True)
python("escape", "reach the hypervisor", "socket.socket(40, 1)", harmless=True)
python("escape", "open the kernel's cipher sockets", "socket.socket(38, 5)")
python(
    "escape",
    "send out of the machine",
    "socket.socket(2, 2).sendto(b'x', ('192.0.2.1', 9))\nassert 0 < len([i for i in os.listdir('/sys/class/net') if i != 'lo'])",
)
python("escape", "raw packets", "socket.socket(17, 3, 768)", harmless=True)
python("escape", "raw addresses", "socket.socket(2, 3, 1)", harmless=True)
python("escape", "see another network", "assert len(open('/proc/net/dev').readlines()) > 3", harmless=True)
probe("escape", "see the host's processes", 'grep -qsa "$MARK" /proc/[0-9]*/cmdline && echo WON', harmless=True)
probe(
    "escape",
    "signal the host's processes",
    'grep -qsa "$MARK" /proc/$VICTIM/cmdline && kill -0 "$VICTIM" && echo WON',
    harmless=True,
)
probe("escape", "new user namespace", "unshare -U true && echo WON", harmless=True)
probe("escape", "new mount namespace", "unshare -m true && echo WON", harmless=True)
probe("escape", "root in a user namespace", "unshare -Urm mount -t tmpfs x /tmp && echo WON")
python(
    "escape",
    "new user namespace by clone",
    "assert libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0\nos._exit(0)",
    harmless=True,
)
python(
    "escape", "join the first process's namespaces", "f = os.open('/proc/1/ns/mnt', 0)\nassert libc.setns(f, 0) == 0"
)
probe("escape", "mount a file system", "mount -t tmpfs x /tmp && echo WON")
probe("escape", "make the root writable", "mount -o remount,rw / && echo WON")
python("escape", "change the root", "os.chroot('/tmp')", harmless=True)
python("escape", "become root", "os.setuid(0)\nassert os.geteuid() == 0", harmless=True)
probe(
    "escape",
    "become root by a file",
    "cp /bin/bash s; chmod 4755 s; [ $(./s -p -c 'id -u') = 0 ] && echo WON",
    harmless=True,
)
probe(
    "escape",
    "have capabilities",
    "grep -q '^Cap\\(Eff\\|Prm\\|Bnd\\):.*[1-9a-f]' /proc/self/status && echo WON",
    harmless=True,
)
probe("escape", "gain privileges by exec", "grep -q '^NoNewPrivs:.*0' /proc/self/status && echo WON", harmless=True)
probe("escape", "no system-call filter", "grep -q '^Seccomp:.*0' /proc/self/status && echo WON", harmless=True)
python("escape", "trace a process", "assert libc.ptrace(0, 0, 0, 0) == 0", harmless=True)
python(
    "escape",
    "read a file through its handle",
    "h = (ctypes.c_char * 256)()\nctypes.memmove(h, (128).to_bytes(4, 'little'), 4)\nm = ctypes.c_int()\nassert libc.name_to_handle_at(-100, b'/usr', h, ctypes.byref(m), 0) == 0\nassert libc.open_by_handle_at(os.open('/usr', 0), h, 0) >= 0",
    harmless=True,
)
for number, name in ((321, "bpf"), (323, "userfaultfd"), (425, "io_uring"), (298, "perf events"), (250, "key rings")):
    python(
        "escape",
        f"kernel interface: {name}",
        f"libc.syscall({number}, 0, 0, 0, 0, 0)\nassert ctypes.get_errno() not in (1, 38)",
        harmless=number in (321, 425),
    )
probe("escape", "make a device", "mknod d b 8 0 && echo WON", harmless=True)
probe(
    "escape",
    "open the machine's devices",
    "for d in mem kmsg kvm fuse vda sda port; do (: </dev/$d) && echo WON; done",
    harmless=True,
)
probe(
    "escape",
    "change the kernel's settings",
    "(: >>/proc/sys/kernel/core_pattern) && echo WON; (: >>/proc/sysrq-trigger) && echo WON",
    harmless=True,
)
probe(
    "escape",
    "write to /sys",
    "find /sys -maxdepth 4 -type f -writable 2>/dev/null | head -1 | grep -q . && echo WON",
    harmless=True,
)
probe(
    "escape",
    "leave the control group",
    "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/x$$ && echo WON && rmdir $d/x$$; done",
    harmless=True,
)
probe(
    "escape",
    "inherit an open file",
    'for f in /proc/self/fd/*; do case $(readlink $f) in /dev/null|/proc/*|pipe:*|"") ;; /*) echo WON;; esac; done',
)
probe("escape", "inherit a variable", '[ -n "$NORTH_SECRET" ] && echo WON')
probe("escape", "name the machine", 'hostname "$(hostname)" && echo WON', harmless=True)
python("escape", "set the clock", "time.clock_settime(time.CLOCK_REALTIME, time.time())", harmless=True)

# ---- tampering with the system and with what grades

probe(
    "tampering",
    "write to the system",
    "for d in / /usr /usr/bin /etc /dev /run /var /proc /sys; do touch $d/north$$ && echo WON && rm $d/north$$; done",
    harmless=True,
)
probe("tampering", "change the users", "(: >>/etc/passwd) && echo WON", harmless=True)
probe("tampering", "replace a program", "cp /bin/true /bin/bash && echo WON")
probe("tampering", "write to the tests", "echo x >/tests/test.sh && echo WON; echo x >/tests/new && echo WON")
probe(
    "tampering",
    "replace the tests",
    "mv /tests /tests2 && echo WON; rm -rf /tests/* && echo WON; chmod 777 /tests && echo WON",
)
probe("tampering", "mount over the tests", "umount /tests && echo WON; mount -t tmpfs x /tests && echo WON")

# ---- resource

python(
    "resource",
    "raise the limit of open files",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    harmless=True,
)
python("resource", "raise the limit of one file", "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))")
python("resource", "go before others", "os.nice(-5)", harmless=True)
python("resource", "go before all others", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", harmless=True)
probe("resource", "be spared when memory runs out", "echo -900 >/proc/self/oom_score_adj && echo WON")
probe("resource", "leave a core file", "ulimit -c unlimited; bash -c 'kill -SEGV $$'; ls core* && echo WON")
python("resource", "open five thousand files", "f = [open('/dev/null') for _ in range(5000)]")
python(
    "resource",
    "start five hundred threads",
    "import threading\nfor _ in range(500): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\nos._exit(0)",
    harmless=True,
)
probe("resource", "one file of a gigabyte", "head -c 1000000000 /dev/zero >big && echo WON; rm -f big")
probe("resource", "one sparse file of a terabyte", "truncate -s 1T sparse && echo WON; rm -f sparse")
probe("resource", "fill shared memory", "head -c 90000000 /dev/zero >/dev/shm/x && echo WON; rm -f /dev/shm/x")
probe(
    "resource", "fill the disk", "for i in $(seq 12); do head -c 7000000 /dev/zero >/tmp/f$i || exit; done && echo WON"
)
probe(
    "resource",
    "fill the table of files",
    "rm -f /tmp/f*; mkdir -p /tmp/m && cd /tmp/m && python3 -c 'for n in range(6000): open(str(n), \"w\")' && echo WON; rm -rf /tmp/m",
)
python(
    "resource",
    "take two gigabytes",
    "b = bytearray(2 << 30)\nfor i in range(0, 2 << 30, 4096): b[i] = 1",
    harmless=False,
)


@attack("resource")
async def a_fork_bomb_is_bounded_and_gone(world):
    async with world.sandbox() as sandbox:
        bomb = asyncio.ensure_future(sandbox.run(":(){ :|:& };:;: north-bomb; sleep 3", 1.5))
        most = 0
        while not bomb.done():
            most = max(most, len(processes_with("north-bomb")))
            await asyncio.sleep(0.05)
        assert most < 80, most
        assert not processes_with("north-bomb")
        assert (await sandbox.run("echo alive", 30)).output == "alive\n"


@attack("resource")
async def many_processes_cannot_take_more_memory_than_the_sandbox_may(world):
    if world.provider.describe()["resource_control"] == "rlimits only":
        pytest.skip("nothing bounds the sum here")
    script = "import time; b = bytearray(300 << 20); b[::4096] = b'x' * len(b[::4096]); time.sleep(2)  # north-hoard"
    async with world.sandbox() as sandbox:
        command = sandbox.run(f'for i in 1 2 3 4 5 6; do python3 -c "{script}" & done; wait', 60)
        hoard = asyncio.ensure_future(command)
        most = 0
        while not hoard.done():
            most = max(most, sum(map(resident_bytes, processes_with("north-hoard"))))
            await asyncio.sleep(0.05)
        # Some were let in, and never five at once: those that the kernel ended have made room for others.
        assert 250 << 20 < most < 1400 << 20, most
        assert (await sandbox.run("echo alive", 30)).output == "alive\n"


@attack("resource")
async def endless_output_is_killed(world):
    async with world.sandbox() as sandbox:
        result = await sandbox.run("yes >&2", 60)
        assert result.exit_code == 137
        assert "[killed: more than" in result.output
        assert len(result.output) < 3 << 20
        assert not processes_with("\0yes")


@attack("resource")
async def endless_output_of_a_spawned_program_holds_it_up(world):
    async with world.sandbox() as sandbox:
        process = await sandbox.spawn(["yes"])
        await asyncio.sleep(0.5)
        process.kill()
        await process.wait()
        assert len(await process.stdout.read(1 << 30)) < 16 << 20


@attack("resource")
async def a_very_deep_tree_is_deleted(world):
    async with world.sandbox() as sandbox:
        code = 'import os\nfor _ in range(1500): os.mkdir("d" * 9); os.chdir("d" * 9)'
        assert (await sandbox.run(f"python3 -c '{code}' && chmod 0 ddddddddd", 30)).exit_code == 0
        directory = sandbox._slot.directory
    assert not directory.exists()


# ---- timing: outliving a time-out, a command or a sandbox


async def dies(world, command, marks, timeout_s=1.0):
    async with world.sandbox() as sandbox:
        start = time.monotonic()
        result = await sandbox.run(command, timeout_s)
        assert time.monotonic() - start < timeout_s + 15
        assert not [pid for mark in marks for pid in processes_with(mark)]
        assert (await sandbox.run("echo alive", 30)).output == "alive\n"
        return result


@attack("timing")
async def deaf_to_signals(world):
    assert (await dies(world, "trap '' TERM INT HUP QUIT; sleep 9901; sleep 9901", ["sleep\x009901"])).timed_out


@attack("timing")
async def a_session_of_its_own(world):
    assert (await dies(world, "setsid sleep 9902 & sleep 9902", ["sleep\x009902"])).timed_out


@attack("timing")
async def a_daemon_by_two_forks(world):
    code = "import os,time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\ntime.sleep(9903)"
    await dies(world, f"python3 -c '{code}'; echo out", ["sleep(9903)"], 20.0)


@attack("timing")
async def a_daemon_that_keeps_the_output_open(world):
    result = await dies(world, "setsid sleep 9904 & echo out", ["sleep\x009904"], 20.0)
    assert (result.output, result.timed_out) == ("out\n", False)


@attack("timing")
async def a_daemon_that_forks_for_ever(world):
    rabbit = 'r() { sleep 0.02; r north-rabbit & }; r & bash -c "while :; do (setsid sleep 9905 &); sleep 0.05; done"'
    assert (await dies(world, rabbit, ["north-rabbit", "sleep\x009905"])).timed_out


@attack("timing")
async def a_command_that_stops_itself(world):
    assert (await dies(world, "kill -STOP $$; echo on", [])).timed_out


@attack("timing")
async def a_command_that_closes_its_output_and_goes_on(world):
    assert (await dies(world, "exec >&- 2>&-; sleep 9906", ["sleep\x009906"])).timed_out


@attack("timing")
async def a_command_that_kills_everything(world):
    await dies(world, "kill -9 1; kill -9 -1; sleep 9907", ["sleep\x009907"])


@attack("timing")
async def a_busy_loop_in_every_process(world):
    assert (
        await dies(world, "for i in 1 2 3 4; do (while :; do :; done) & done; wait; : north-busy", ["north-busy"])
    ).timed_out


@attack("timing")
async def a_program_that_outlives_close(world):
    async with world.sandbox() as sandbox:
        process = await sandbox.spawn(["bash", "-c", "(setsid sleep 9908 &); echo up; sleep 9908"])
        assert await process.stdout.readline() == b"up\n"
    assert not processes_with("sleep\x009908")


@attack("timing")
async def a_late_write_after_the_snapshot(world):
    async with world.sandbox() as sandbox:
        writer = await sandbox.spawn(["bash", "-c", "echo up; setsid bash -c 'while :; do echo late >answer; done'"])
        await writer.stdout.readline()
        await sandbox.snapshot(world.folder / "copy")
        before = sorted((path.name, path.stat().st_mtime_ns) for path in (world.folder / "copy").iterdir())
        await asyncio.sleep(0.2)
        assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (world.folder / "copy").iterdir())


# ---- tampering with what is read on the host


@attack("tampering")
async def links_and_special_files_as_rewards_are_not_followed(world):
    secret = world.folder / "secret"
    secret.write_text("1")
    for number, trick in enumerate((f"ln -s {secret} reward.txt", "mkfifo reward.txt", "mkdir reward.txt")):
        logs = world.folder / f"logs{number}"
        logs.mkdir()
        async with world.sandbox(writable={"/logs/verifier": logs}) as sandbox:
            await sandbox.run(f"cd /logs/verifier && {trick}", 30)
        with pytest.raises(VerifierError):
            read_regular_file(logs / "reward.txt")


@attack("tampering")
async def a_link_in_work_does_not_lead_a_snapshot_out(world):
    (world.folder / "secret").write_text("hidden")
    async with world.sandbox() as sandbox:
        await sandbox.run(f"ln -s {world.folder} up; ln -s {world.folder}/secret f; mkdir d; ln -s / d/root", 30)
        await sandbox.snapshot(world.folder / "copy")
    assert (world.folder / "copy" / "up").is_symlink()
    assert (world.folder / "copy" / "d" / "root").is_symlink()
    assert not [p for p in (world.folder / "copy").rglob("*") if p.is_file() and not p.is_symlink()]


@attack("tampering")
async def a_bomb_of_hard_links_is_not_copied(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("head -c 8000000 /dev/zero >f; for i in $(seq 100); do ln f $i; done", 30)
        with pytest.raises(TreeTooLargeError):
            await sandbox.snapshot(world.folder / "copy")


@attack("tampering")
async def names_that_are_no_text_are_copied_as_they_are(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("touch $'a\\nb' $'\\377' -- -rf; mkdir '...'; touch '.../ '", 30)
        await sandbox.snapshot(world.folder / "copy")
    assert sorted(os.listdir(os.fsencode(world.folder / "copy"))) == sorted([b"a\nb", b"\xff", b"-rf", b"..."])


@attack("tampering")
async def words_of_the_sandbox_itself_are_only_words(world):
    async with world.sandbox() as sandbox:
        forged = "printf '\\002started\\nended 0\\n'; echo 'ended 0' >/proc/1/fd/2; exit 9"
        assert (await sandbox.run(forged, 30)).exit_code == 9


@attack("tampering")
async def an_attempt_that_tampers_with_bash_startup_changes_no_later_command(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("echo 'echo WON' >~/.bashrc; cp ~/.bashrc ~/.profile; cp ~/.bashrc ~/.bash_env", 30)
        assert "WON" not in (await sandbox.run("echo next", 30)).output


# ---- running them


@contextlib.contextmanager
def host_secrets(folder):
    """What probes look for on the host: a file, a server, two sockets, a process; as variables."""
    folder.mkdir()
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    secret = folder / "secret"
    secret.write_text("hidden")
    mark = f"north-victim-{secrets.token_hex(4)}"
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark])
    name = f"north-{secrets.token_hex(4)}"
    short = f"/tmp/{name}.sock"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        with socket.socket(socket.AF_UNIX) as named:
            named.bind(short)
            os.chmod(short, 0o777)
            named.listen()
            try:
                yield {
                    "SECRET": str(secret),
                    "PORT": str(server.getsockname()[1]),
                    "NAME": name,
                    "SOCKET": short,
                    "MARK": mark.replace("victim", "[v]ictim"),
                    "VICTIM": str(victim.pid),
                }
            finally:
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                os.unlink(short)


def _script(probes, variables):
    words = "".join(f"export {name}='{value}'\n" for name, value in variables.items())
    parts = [
        f"PROBE={n}; ( {{\n{a.script}\n}} 2>/dev/null | grep -qa WON && echo WON {n} )" for n, a in enumerate(probes)
    ]
    return f"{words}mkdir -p /tmp/p; cd /tmp/p\n" + "\n".join(parts) + "\necho END\n"


def _winners(probes, output):
    return [probes[int(line.split()[1])].name for line in output.splitlines() if line.startswith("WON ")]


async def attack_all(provider, folder, at_once=3, kinds=("escape", "resource", "tampering", "timing")):
    """Every attack that succeeded, by name, with what it showed. Probes are of all kinds, coroutines of ``kinds``."""
    won = {}
    probes = [attack for attack in ATTACKS if attack.script]
    tests = folder / "tests"
    tests.mkdir()
    (tests / "test.sh").write_text("true\n")
    tests.chmod(0o755)
    (folder / "probes").mkdir()
    os.environ["NORTH_SECRET"] = "inherited"
    with host_secrets(folder / "host") as variables:
        async with World(provider, folder / "probes").sandbox(read_only={"/tests": tests}) as sandbox:
            result = await sandbox.run(_script(probes, variables), 180)
            assert result.output.endswith("END\n"), result
            won.update(dict.fromkeys(_winners(probes, result.output), "printed WON"))
    gate = asyncio.Semaphore(at_once)

    async def one(attack):
        async with gate:
            (folder / attack.name).mkdir()
            try:
                async with asyncio.timeout(120):
                    await attack.check(World(provider, folder / attack.name))
            except pytest.skip.Exception:
                return
            except Exception:
                won[attack.name] = traceback.format_exc()

    # One that counts processes, fills memory or busies every core must not be judged beside others.
    chosen = [attack for attack in ATTACKS if attack.check and attack.kind in kinds]
    await asyncio.gather(*(one(attack) for attack in chosen if attack.kind != "resource"))
    for attack in chosen:
        if attack.kind == "resource":
            await one(attack)
    return won


def control(folder):
    """Names of the harmless probes that win without a sandbox, and of all that were tried."""
    probes = [attack for attack in ATTACKS if attack.is_harmless]
    with host_secrets(folder / "host") as variables:
        script = _script(probes, variables).replace("mkdir -p /tmp/p; cd /tmp/p", f"cd '{folder}'")
        done = subprocess.run(
            ["bash", "-c", script],
            env={"PATH": "/usr/bin:/usr/sbin"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    return _winners(probes, done.stdout), [attack.name for attack in probes]
