"""Control groups: found on files as the kernel shows them, and made for real where this machine permits."""

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from north_lightning.sandbox import BubblewrapProvider, cgroups, slots

MIB = 1 << 20
V1 = "34 29 0:30 / {mount}/memory rw - cgroup cgroup rw,memory\n35 29 0:31 / {mount}/pids rw - cgroup cgroup rw,pids\n"
V2 = "30 24 0:26 / {mount} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def parents(tmp_path, mountinfo, membership):
    (tmp_path / "mountinfo").write_text(mountinfo.format(mount=tmp_path))
    (tmp_path / "cgroup").write_text(membership)
    return cgroups._parents(tmp_path)


def test_v1_groups_are_made_below_this_process_in_each_hierarchy(tmp_path):
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "pids").mkdir()
    found = parents(tmp_path, V1, "8:pids:/\n4:memory:/job\n1:name=systemd:/\n")
    assert found == [("cgroup v1", [tmp_path / "memory/job", tmp_path / "pids"])]


def test_v2_groups_are_made_below_this_process_or_else_beside_it(tmp_path):
    (tmp_path / "user" / "job").mkdir(parents=True)
    found = parents(tmp_path, V2, "0::/user/job\n")
    assert found == [("cgroup v2", [tmp_path / "user/job"]), ("cgroup v2", [tmp_path / "user"])]
    assert parents(tmp_path, V2, "0::/of/the/host\n") == [("cgroup v2", [tmp_path])]


def test_v2_limits_are_delegated_and_set(tmp_path, monkeypatch):
    """On plain files: a directory that the kernel would fill with control files is filled by hand."""
    (tmp_path / "cgroup.subtree_control").write_text("")
    make = Path.mkdir

    def mkdir(path, *arguments, **settings):
        make(path, *arguments, **settings)
        for name in ("cgroup.controllers", "cgroup.subtree_control", "cgroup.procs", "memory.max", "pids.max"):
            (path / name).write_text("memory pids" if name == "cgroup.controllers" else "")

    removed = []
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(cgroups, "_remove", lambda group, timeout_s: removed.append(group))
    monkeypatch.setattr(cgroups, "_parents", lambda: [("cgroup v2", [tmp_path])])
    groups = cgroups.make_cgroups("north")
    assert groups.kind == "cgroup v2"
    assert (tmp_path / "north" / "cgroup.subtree_control").read_text() == "+memory +pids"
    assert removed == [tmp_path / "north" / "probe"]
    assert groups.make("slot0", 5 * MIB, 7) == [tmp_path / "north" / "slot0" / "cgroup.procs"]
    assert (tmp_path / "north" / "slot0" / "memory.max").read_text() == str(5 * MIB)
    assert (tmp_path / "north" / "slot0" / "pids.max").read_text() == "7"


def test_without_the_right_to_make_groups_there_are_none_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "_parents", lambda: [("cgroup v1", [tmp_path / "nowhere"])])
    groups = cgroups.make_cgroups("north")
    assert groups == cgroups.Cgroups("rlimits only")
    assert groups.make("slot0", 1, 1) == []


def test_a_sandbox_without_groups_works_and_says_so(monkeypatch, image):
    monkeypatch.setattr(slots, "make_cgroups", lambda name: cgroups.Cgroups("rlimits only"))
    provider = BubblewrapProvider()
    assert provider.resource_control == "rlimits only"
    assert "the sum is not bounded" in provider.describe()["memory_bytes"]

    async def scenario():
        sandbox = await provider.open(image)
        try:
            return (await sandbox.run("echo works", 60)).output
        finally:
            await sandbox.close()

    assert asyncio.run(scenario()) == "works\n"


def test_a_sandbox_that_cannot_be_deleted_yet_is_deleted_before_the_next_is_opened(monkeypatch, image, caplog):
    provider = BubblewrapProvider()
    busy, really = [True], cgroups.Cgroups.remove

    def remove(groups, name, timeout_s=5.0):
        if busy[0]:
            raise OSError(errno.EBUSY, "Device or resource busy", name)
        really(groups, name, timeout_s)

    async def scenario():
        sandbox = await provider.open(image)
        left = sandbox._slot.directory
        monkeypatch.setattr(cgroups.Cgroups, "remove", remove)
        await sandbox.close()  # and the attempt counts
        assert left.exists()
        assert f"cannot delete the sandbox {left} yet" in caplog.text
        other = await provider.open(image)
        assert other._slot.directory != left
        busy[0] = False
        await other.close()
        await (await provider.open(image)).close()
        return left

    assert not asyncio.run(scenario()).exists()


@pytest.fixture
def grouped():
    provider = BubblewrapProvider(memory_bytes=256 * MIB, max_work_bytes=16 * MIB, max_processes=8)
    if provider.resource_control == "rlimits only":
        pytest.skip("no control groups can be made here")
    return provider


def groups_of(provider):
    return [path for path in Path("/sys/fs/cgroup").rglob(f"{provider._prepared().root.name}/*") if path.is_dir()]


def test_every_program_is_in_the_group_of_its_sandbox_and_none_is_left(grouped, image):
    async def scenario():
        sandbox = await grouped.open(image)
        try:
            groups = groups_of(grouped)
            assert groups
            limits = [path.read_text().strip() for group in groups for path in group.glob("memory.[ml][ai][xm]*")]
            assert str(272 * MIB) in limits
            assert {path.read_text().strip() for group in groups for path in group.glob("pids.max")} == {"32"}
            await sandbox.spawn(["sleep", "100"])
            for group in groups:
                assert len((group / "cgroup.procs").read_text().split()) >= 2  # bubblewrap, and the init inside
        finally:
            await sandbox.close()
        assert groups_of(grouped) == []

    asyncio.run(scenario())


def test_groups_of_a_killed_process_are_removed_by_the_next(grouped, image):
    script = (
        "import asyncio, os, pathlib, signal, north_lightning.sandbox as s; p = s.BubblewrapProvider()\n"
        f"box = asyncio.run(p.open(pathlib.Path({str(image)!r})))\n"
        "print(p._prepared().root.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    name = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout.strip()
    assert list(Path("/sys/fs/cgroup").rglob(name))
    BubblewrapProvider().check()
    assert not list(Path("/sys/fs/cgroup").rglob(name))


def test_groups_are_found_by_a_process_that_is_in_another_group(tmp_path):
    left = cgroups.Cgroups("cgroup v1", (tmp_path / "memory" / "north", tmp_path / "pids" / "north"))
    for directory in left.directories:
        (directory / "slot0").mkdir(parents=True)
    cgroups.note(left, tmp_path / "note")
    cgroups.noted(tmp_path / "note").close()
    assert not any(directory.exists() for directory in left.directories)
    assert cgroups.noted(tmp_path / "nowhere") == cgroups.Cgroups("rlimits only")


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user of this test is root here")
def test_doctor_says_which_it_is(capsys):
    from north_lightning import doctor

    fine, found, _ = doctor._sandbox()
    assert fine
    assert BubblewrapProvider().resource_control in found
