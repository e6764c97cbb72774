"""Real bubblewrap on this machine. Attackers are commands that a model could write."""

import asyncio
import os
import pickle
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from north_lightning.errors import SandboxError, SandboxUnavailableError
from north_lightning.sandbox import BubblewrapProvider, probe, slots

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")


def output_of(in_sandbox, command, timeout_s=20.0):
    return in_sandbox(lambda sandbox: sandbox.run(command, timeout_s))


def processes_with(text):
    """Host pids whose command line contains ``text``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def eventually(condition, timeout_s=2.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# ---- isolation


def test_work_is_a_copy_of_the_image(in_sandbox, image):
    (image / "a.txt").write_text("original\n")
    (image / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (image / "run.sh").chmod(0o755)
    result = output_of(in_sandbox, "pwd; cat a.txt; ./run.sh; echo changed >a.txt; id -un; echo $HOME; echo err >&2")
    assert result.output == "/work\noriginal\nran\nagent\n/home/agent\nerr\n"
    assert (image / "a.txt").read_text() == "original\n"


def test_host_files_are_out_of_sight(in_sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    secret.chmod(0o644)
    result = output_of(in_sandbox, f"cat {secret} || cat /root/.bashrc || cat /etc/shadow")
    assert "hidden" not in result.output
    assert result.exit_code != 0
    assert output_of(in_sandbox, "env | grep -v ^_= | sort | cut -d= -f1 | tr '\\n' ' '").output == (
        "HOME LANG LOGNAME PATH PWD SHELL SHLVL TERM USER "
    )


def test_host_network_is_unreachable_and_loopback_is_its_own(in_sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = output_of(in_sandbox, f"exec 3<>/dev/tcp/127.0.0.1/{port}")
    assert result.exit_code != 0
    own = (
        "python3 -m http.server -b 127.0.0.1 8000 >/dev/null 2>&1 &"
        " for i in $(seq 50); do (: <>/dev/tcp/127.0.0.1/8000) 2>/dev/null && echo reached && break; sleep 0.1; done"
    )
    assert output_of(in_sandbox, own).output == "reached\n"


def test_system_and_devices_are_read_only(in_sandbox):
    result = output_of(
        in_sandbox, "for d in / /usr /etc /dev /run /var /home; do touch $d/x 2>/dev/null && echo $d; done; id -u"
    )
    assert result.output == "1000\n"


def test_no_privilege_can_be_gained(in_sandbox):
    result = output_of(
        in_sandbox,
        "unshare -U true && echo userns; mount -t tmpfs x /tmp && echo mount; chown 0 . && echo chown;"
        " grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -s '\\t ' ' '",
    )
    assert result.output.splitlines()[-4:] == [
        "CapEff: 0000000000000000",
        "CapBnd: 0000000000000000",
        "NoNewPrivs: 1",
        "Seccomp: 2",
    ]
    assert not {"userns", "mount", "chown"} & set(result.output.splitlines())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="call numbers of x86-64")
def test_filter_refuses_exactly_the_listed_calls(in_sandbox):
    refused = {101, 248, 249, 250, 298, 321, 323, 425, 426, 427, 0x40000000 + 39}
    script = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for number in %s:
            print(libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1)
    """
    for numbers, is_refused in ((sorted(refused), "True"), ([39, 102, 96, 24, 428], "False")):
        source = textwrap.dedent(script % numbers)
        assert set(output_of(in_sandbox, f"python3 - <<'E'\n{source}\nE").output.split()) == {is_refused}


@as_root
def test_every_sandbox_has_its_own_user_id_and_cannot_read_the_others(provider, image):
    async def scenario():
        sandboxes = [await provider.open(image) for _ in range(3)]
        try:
            for sandbox in sandboxes:
                await sandbox.run("echo private >/work/mine; chmod 600 /work/mine; sleep 30 &", 60)
            owners = {(s._slot.directory / "work" / "mine").stat().st_uid for s in sandboxes}
            assert owners == {s.uid for s in sandboxes}
            assert len(owners) == 3
            assert min(owners) > 65535
            other = sandboxes[1]._slot.directory / "work"
            result = await sandboxes[0].run(f"ls {other} {other.parent.parent}; kill -9 -1; true", 60)
            assert "mine" not in result.output
            assert stat.S_IMODE(other.parent.parent.stat().st_mode) == 0o711
        finally:
            for sandbox in sandboxes:
                await sandbox.close()

    asyncio.run(scenario())


@as_root
def test_two_processes_never_share_user_ids(provider, image):
    mine = asyncio.run(_uid_of_a_new_sandbox(provider, image))
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            "import asyncio, pathlib, north_lightning.sandbox as s; p = s.BubblewrapProvider()\n"
            f"print(asyncio.run(p.open(pathlib.Path({str(image)!r}))).uid)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    block, other_block = ((uid - provider.first_uid) // slots.UIDS_PER_PROCESS for uid in (mine, int(other.stdout)))
    assert block != other_block


async def _uid_of_a_new_sandbox(provider, image):
    sandbox = await provider.open(image)
    await sandbox.close()
    return sandbox.uid


def test_mounts_are_read_only_or_writable_as_asked(provider, image, tmp_path):
    tests, logs = tmp_path / "tests", tmp_path / "logs"
    tests.mkdir()
    logs.mkdir()
    (tests / "t.txt").write_text("expected\n")
    tmp_path.chmod(0o700)  # only the caller may walk to it

    async def scenario():
        sandbox = await provider.open(image, read_only={"/tests": tests}, writable={"/logs": logs})
        try:
            return await sandbox.run("cat /tests/t.txt; touch /tests/x; echo 1 >/logs/reward.txt; touch /work/x", 60)
        finally:
            await sandbox.close()

    result = asyncio.run(scenario())
    assert result.output.startswith("expected\ntouch: cannot touch '/tests/x': Read-only file system")
    assert result.exit_code == 0
    assert (logs / "reward.txt").read_text() == "1\n"
    assert sorted(os.listdir(tests)) == ["t.txt"]


def test_mount_with_a_relative_path_inside_is_an_error(provider, image):
    with pytest.raises(ValueError, match="absolute path inside the sandbox, got 'tests'"):
        asyncio.run(provider.open(image, read_only={"tests": image}))


# ---- processes


def test_exit_codes_and_signals_are_the_commands(in_sandbox):
    async def scenario(sandbox):
        assert (await sandbox.run("exit 3", 60)).exit_code == 3
        assert (await sandbox.run("kill -9 $$", 60)).exit_code == 137
        assert (await sandbox.run("kill -TERM $$; sleep 5", 60)).exit_code == 143
        assert (await sandbox.run("echo 'unbalanced", 60)).exit_code == 2
        assert (await sandbox.run("cat; echo end", 60)).output == "end\n"

    in_sandbox(scenario)


def test_time_out_kills_background_children_too(in_sandbox):
    async def scenario(sandbox):
        start = time.monotonic()
        result = await sandbox.run("echo before; sleep 771 & (setsid sleep 772 &) ; trap '' TERM INT; sleep 773", 0.5)
        assert time.monotonic() - start < 10
        assert (result.output, result.exit_code, result.timed_out) == ("before\n", 124, True)
        for seconds in (771, 772, 773):
            assert not processes_with(f"sleep\0{seconds}")

    in_sandbox(scenario)


def test_daemon_ends_with_the_command_that_started_it(in_sandbox):
    async def scenario(sandbox):
        await sandbox.run("setsid nohup sleep 774 >/dev/null 2>&1 & disown", 60)
        assert not processes_with("sleep\x00774")

    in_sandbox(scenario)


def test_nothing_survives_close(provider, image):
    async def scenario():
        sandbox = await provider.open(image)
        process = await sandbox.spawn(["bash", "-c", "setsid sleep 775 & sleep 0.3; echo up; exec sleep 776"])
        assert await process.stdout.readline() == b"up\n"
        assert processes_with("sleep\x00775")
        await sandbox.close()
        assert not processes_with("sleep\x00775") + processes_with("sleep\x00776")
        assert process.returncode is not None
        assert not sandbox._slot.directory.exists()
        await sandbox.close()
        with pytest.raises(SandboxError, match="closed"):
            await sandbox.run("true", 60)

    asyncio.run(scenario())


def test_close_completes_when_its_caller_is_cancelled(provider, image):
    async def scenario():
        sandbox = await provider.open(image)
        await sandbox.spawn(["sleep", "777"])
        closing = asyncio.ensure_future(sandbox.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await sandbox.close()
        assert not sandbox._slot.directory.exists()
        assert not processes_with("sleep\x00777")

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_cancelled_open_leaves_nothing(provider, image):
    async def scenario():
        free = len(provider._prepared()._free)
        opening = asyncio.ensure_future(provider.open(image))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert len(provider._prepared()._free) == free

    asyncio.run(scenario())


def test_no_zombies_are_left_to_the_parent_or_to_init(in_sandbox):
    def zombies():
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                if rest.split()[0] == "Z" and name in ("bwrap", "sh", "sleep", "bash", "setpriv"):
                    found.add(entry.name)
            except OSError:
                continue
        return found

    before = zombies()

    async def scenario(sandbox):
        for _ in range(5):
            await sandbox.run("(sleep 0.01 &); (sleep 778 &)", 60)
            await sandbox.run("(setsid sleep 779 &); sleep 779", 0.05)
        orphans = await sandbox.run("(sleep 0 &); (sleep 0 &); sleep 0.2; ps -e -o stat= | grep -c Z", 60)
        assert orphans.output == "0\n"

    in_sandbox(scenario)
    assert eventually(lambda: not zombies() - before)


def test_program_talks_over_pipes(in_sandbox):
    async def scenario(sandbox):
        process = await sandbox.spawn(
            ["python3", "-uc", "import sys; print(sys.stdin.readline().upper()); print('e', file=sys.stderr)"]
        )
        out, err = await process.communicate(b"hello\n")
        assert (out, err) == (b"HELLO\n\ne\n", None)
        assert await process.wait() == 0

    in_sandbox(scenario)


def test_failure_to_start_is_an_infrastructure_error_not_an_exit_code(provider, image):
    async def scenario():
        sandbox = await provider.open(image, read_only={"/usr/inside": image})  # cannot be mounted: /usr is read-only
        try:
            with pytest.raises(SandboxError, match="bwrap: "):
                await sandbox.run("true", 60)
        finally:
            await sandbox.close()

    asyncio.run(scenario())


def test_text_that_no_program_can_be_given_is_not_a_crash(in_sandbox):
    async def scenario(sandbox):
        assert (await sandbox.run("echo a\0b \ud800", 60)).output == "ab ?\n"
        long = "cat <<'END' | wc -c\n" + "x" * 300_000 + "\nEND\ncat"
        assert (await sandbox.run(long, 60)).output == "300001\n"
        assert (await sandbox.run("printf '\\377ok'", 60)).output == "\ufffdok"

    in_sandbox(scenario)


# ---- limits


def test_output_is_capped_and_says_so(in_sandbox):
    result = output_of(in_sandbox, "echo first; head -c 10000000 /dev/zero | tr '\\0' x; echo; echo last")
    assert result.exit_code == 0
    assert len(result.output) < (1 << 20) + 100
    assert result.output.startswith("first\nxxx")
    assert result.output.endswith("xxx\nlast\n")
    left_out = 10_000_012 - (1 << 20)
    assert f"\n[... {left_out} bytes left out ...]\n" in result.output


def test_endless_output_is_killed_early(in_sandbox):
    start = time.monotonic()
    result = output_of(in_sandbox, "yes", timeout_s=60)
    assert time.monotonic() - start < 60
    assert (result.exit_code, result.timed_out) == (137, False)
    assert "[killed: more than 268435456 bytes of output]" in result.output


def test_fork_bomb_is_bounded_and_killed_in_time(in_sandbox):
    async def scenario(sandbox):
        bomb = sandbox.run(":(){ :|:& };:; for i in 1 2 3 4 5 6 7 8; do sleep 0.1; done", 1.0)
        task = asyncio.ensure_future(bomb)
        most = 0
        while not task.done():
            most = max(most, len(processes_with(":(){ :|:& };:")))
            await asyncio.sleep(0.05)
        assert 3 < most < 80
        assert not processes_with(":(){ :|:& };:")
        assert (await sandbox.run("echo alive", 60)).output == "alive\n"

    in_sandbox(scenario)


def test_one_file_and_the_whole_disk_are_bounded(provider, in_sandbox):
    async def scenario(sandbox):
        one = await sandbox.run("head -c 20000000 /dev/zero >big; stat -c %s big; rm big", 60)
        assert str(8 << 20) in one.output
        if provider.describe()["max_work_bytes"].startswith("size of"):
            fill = "for i in $(seq 20); do head -c 7000000 /dev/zero >/tmp/f$i || break; done"
            whole = await sandbox.run(f"{fill}; du -sm /tmp | cut -f1; rm /tmp/f*", 30)
            assert "No space left on device" in whole.output
            assert int(whole.output.split()[-1]) <= 64
            files = await sandbox.run(
                "mkdir m; cd m; for i in $(seq 6000); do : >$i || break; done 2>/dev/null; ls | wc -l", 30
            )
            assert 4000 < int(files.output) < 5000
        assert (await sandbox.run("rm -rf m; echo ok >f; cat f", 60)).output == "ok\n"

    in_sandbox(scenario)


def test_memory_of_a_process_is_bounded(image):
    async def scenario():
        sandbox = await BubblewrapProvider(memory_bytes=256 << 20).open(image)
        try:
            return await sandbox.run(
                "python3 -c 'b = bytearray(400 << 20)'; head -c 90000000 /dev/zero >/dev/shm/x", 10
            )
        finally:
            await sandbox.close()

    output = asyncio.run(scenario()).output
    assert "MemoryError" in output
    assert "No space left on device" in output


def test_more_sandboxes_than_slots_is_a_clear_error(image):
    provider = BubblewrapProvider(max_slots=1)

    async def scenario():
        first = await provider.open(image)
        with pytest.raises(SandboxError, match="max_slots"):
            await provider.open(image)
        await first.close()
        await (await provider.open(image)).close()

    asyncio.run(scenario())


# ---- files


def test_snapshot_copies_links_as_links_and_ends_processes(in_sandbox, tmp_path):
    async def scenario(sandbox):
        await sandbox.run(
            "ln -s /etc/passwd link; ln -s / root; ln -s nowhere broken; mkfifo pipe; mkdir -p d/e; echo x >d/e/f; "
            "chmod 0 d/e/f; cp /usr/bin/true s; chmod 4755 s; truncate -s 8000000 sparse; touch -d @1000000000 old;"
            " python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'",
            10,
        )
        writer = await sandbox.spawn(["bash", "-c", "echo early >late; echo up; while :; do echo late >>late; done"])
        await writer.stdout.readline()
        await sandbox.snapshot(tmp_path / "copy")
        assert writer.returncode is not None
        assert (await sandbox.run("cat d/e/f; ls | wc -l", 60)).exit_code == 0

    in_sandbox(scenario)
    copy = tmp_path / "copy"
    assert sorted(os.listdir(copy)) == ["broken", "d", "late", "link", "old", "root", "s", "sparse"]
    assert [os.readlink(copy / name) for name in ("link", "root", "broken")] == ["/etc/passwd", "/", "nowhere"]
    assert (copy / "d/e/f").read_text() == "x\n" if IS_ROOT else True
    assert stat.S_IMODE((copy / "s").stat().st_mode) == 0o755
    sparse = (copy / "sparse").stat()
    assert sparse.st_size == 8_000_000
    assert sparse.st_blocks * 512 < 100_000
    assert (copy / "old").stat().st_mtime == 1_000_000_000
    assert {path.lstat().st_uid for path in copy.iterdir()} == {os.geteuid()}


def test_image_of_200_files_arrives_whole(in_sandbox, image, tmp_path):
    for number in range(200):
        directory = image / f"d{number % 10}"
        directory.mkdir(exist_ok=True)
        (directory / f"f{number}").write_bytes(os.urandom(number * 50))
    (image / "link").symlink_to("d1/f1")

    async def scenario(sandbox):
        await sandbox.snapshot(tmp_path / "copy")
        return await sandbox.run("find . -type f | wc -l; readlink link; find . ! -user agent | wc -l", 60)

    assert in_sandbox(scenario).output == "200\nd1/f1\n0\n"
    assert subprocess.run(["diff", "-r", image, tmp_path / "copy"], check=False).returncode == 0


def test_deep_and_unreadable_trees_are_deleted(provider, image):
    async def scenario():
        sandbox = await provider.open(image)
        made = await sandbox.run(
            'python3 -c \'import os\nfor _ in range(1500): os.mkdir("d" * 9); os.chdir("d" * 9)\' && chmod 0 ddddddddd',
            20,
        )
        assert made.exit_code == 0
        await sandbox.close()
        assert not sandbox._slot.directory.exists()

    asyncio.run(scenario())


@pytest.mark.skipif(not IS_ROOT, reason="compares root with an ordinary user")
def test_an_ordinary_user_gets_isolation_too(tmp_path):
    """The same probes as root's, run by a user without any privilege, with the system's Python."""
    python = "/usr/bin/python3"
    if not Path(python).exists() or os.access(__file__, os.R_OK) is False:
        pytest.skip("no Python for other users")
    script = textwrap.dedent("""
        import asyncio, os, pathlib, tempfile
        from north_lightning.sandbox import BubblewrapProvider
        async def main():
            provider = BubblewrapProvider()
            provider.check()
            image = pathlib.Path(tempfile.mkdtemp())
            sandbox = await provider.open(image)
            result = await sandbox.run("id -u; mkdir -p a/b; chmod 0 a; ln -s /etc l; (setsid sleep 780 &)", 60)
            await sandbox.snapshot(image / "copy")
            await sandbox.close()
            print(result.output.strip(), sorted(os.listdir(image / "copy")), sandbox._slot.directory.exists())
        asyncio.run(main())
    """)
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-B", "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(repository), "TMPDIR": "/tmp"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    if "ModuleNotFoundError" in done.stderr or "PermissionError: [Errno 13]" in done.stderr:
        pytest.skip("other users cannot read the repository")
    assert done.stdout == "1000 ['a', 'l'] False\n", done.stderr


@as_root
def test_files_of_a_killed_process_are_cleaned_up_by_the_next(provider, image):
    script = (
        "import asyncio, os, pathlib, signal, north_lightning.sandbox as s; p = s.BubblewrapProvider()\n"
        f"box = asyncio.run(p.open(pathlib.Path({str(image)!r})))\n"
        "print(box._slot.directory, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert killed.returncode == -9
    assert left.exists()
    BubblewrapProvider().check()
    assert not left.parent.exists()
    assert str(left) not in Path("/proc/self/mounts").read_text()


# ---- refusing


def test_provider_travels_and_works_elsewhere(provider, image):
    provider.check()
    twin = pickle.loads(pickle.dumps(provider))
    assert twin.max_processes == 64
    sandbox = asyncio.run(twin.open(image))
    asyncio.run(sandbox.close())


def test_missing_bubblewrap_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(probe.shutil, "which", lambda name: None)
    with pytest.raises(SandboxUnavailableError, match="apt-get install"):
        BubblewrapProvider(root=tmp_path).check()


@pytest.mark.parametrize(
    ("weakened", "complaint"),
    [
        ("--unshare-net", "network"),
        ("--unshare-pid", "did not start|cannot be isolated|other processes"),
        ("--disable-userns", "user namespaces can be nested"),
    ],
)
def test_a_machine_that_does_not_isolate_is_refused(monkeypatch, image, weakened, complaint):
    """bubblewrap that silently lacks one protection is caught from inside."""
    from north_lightning.sandbox import command

    for name in ("_NAMESPACES", "_IDENTITY"):
        monkeypatch.setattr(command, name, [word for word in getattr(command, name) if word != weakened])
    with pytest.raises(SandboxUnavailableError, match=complaint):
        asyncio.run(BubblewrapProvider().open(image))


def test_visible_host_file_is_refused(monkeypatch, image):
    from north_lightning.sandbox import bubblewrap

    original = bubblewrap.make_launcher
    leak = lambda **settings: original(**{**settings, "mounts": ["--bind", "/tmp", "/tmp"]})  # noqa: E731
    monkeypatch.setattr(bubblewrap, "make_launcher", leak)
    with pytest.raises(SandboxUnavailableError, match="the host's .*lock is visible"):
        BubblewrapProvider().check()


def test_settings_below_one_are_named():
    with pytest.raises(ValueError, match="max_processes: expected at least 1, got 0"):
        BubblewrapProvider(max_processes=0)


def test_description_says_how_each_limit_is_enforced(provider):
    described = provider.describe()
    kind = provider.resource_control
    assert described["resource_control"] == kind
    assert ("the sum is not bounded" in described["memory_bytes"]) == (kind == "rlimits only")
    assert described["user"] == ("own user id per sandbox" if IS_ROOT else "the calling user")
