"""Rows of strangers, the repositories they name, and packages: ``tasks import`` and ``tasks build`` stay in their
target."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_world import SECRET_VARIABLE, World, git

from north_lightning.errors import ConfigError, DataError, NorthError, TaskError
from north_lightning.factory import sources
from north_lightning.factory.build import build_tasks
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks.build import TaskSetSettings, build_task_sets
from north_lightning.tasks.harbor import load_tasks
from north_lightning.tasks.swe_rows import import_rows

PATCH = "diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-A = 1\n+A = 2\n"
TEST_PATCH = PATCH.replace("a.py", "tests/test_a.py").replace("A = ", "B = ").replace("B = 1", "B = 2", 1)
TEST_PATCH = TEST_PATCH.replace("-B = 2\n+B = 2", "-B = 2\n+B = 3")


def row(commit: str, **changes: Any) -> dict[str, Any]:
    return {
        "instance_id": "a__n-1", "repo": "a/n", "base_commit": commit, "patch": PATCH, "test_patch": "",
        "problem_statement": "A is wrong.", "FAIL_TO_PASS": ["tests/test_a.py::t"], "PASS_TO_PASS": [], **changes,
    }  # fmt: skip


def r2e(commit: str, names: list[Any], codes: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    content = {"test_file_names": names, "test_file_codes": ["x = 1\n"] * len(names) if codes is None else codes}
    return {
        "repo_name": "a/n", "commit_hash": commit, "problem_statement": "A is wrong.",
        "expected_output_json": json.dumps({"t": "PASSED"}), "execution_result_content": json.dumps(content), **changes,
    }  # fmt: skip


def imported(world: World, clone: Path, *rows: dict[str, Any] | str, repository: str = "a/n") -> Path:
    file = world.root / "input" / "rows.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    tasks = world.target / "tasks"
    tasks.mkdir(exist_ok=True)
    earlier = tasks / "earlier"
    earlier.mkdir(exist_ok=True)
    (earlier / "kept.txt").write_text("kept")
    try:
        import_rows([file], tasks, {repository: clone})
    except Exception as error:
        world.said += str(error)
        raise
    finally:
        assert (earlier / "kept.txt").read_text() == "kept", "an earlier task is gone"
        assert {path.name for path in world.target.iterdir()} == {"tasks"}
        assert not world.marker.exists()
    return tasks


@pytest.mark.usefixtures("reads_are_noticed")
@pytest.mark.parametrize(
    "name",
    [
        "..", ".", "", "../x", "a/../../x", "/etc/x", "x/..", "..\\x", "-rf", "--output=x", ".git", ".bashrc", "a\nb",
        "a\0b", "\x1b[2J", "~", "$HOME", "`id`", "a" * 3000, "ü" * 100, "a b", "earlier/kept.txt", "CON:", "\u202e",
    ],
)  # fmt: skip
def test_an_instance_id_is_a_name(name: str, world: World) -> None:
    clone = world.repository("clone")
    with pytest.raises((DataError, TaskError), match=r"rows.jsonl:1: instance_id"):
        imported(world, clone, row(git(clone, "rev-parse", "HEAD"), instance_id=name))
    assert "\x1b" not in world.said


def test_a_directory_that_is_no_task_of_ours_is_not_replaced(world: World) -> None:
    clone = world.repository("clone")
    commit = git(clone, "rev-parse", "HEAD")
    with pytest.raises(TaskError, match="expected a task written by this command"):
        imported(world, clone, row(commit, instance_id="earlier"))
    (world.target / "tasks" / "linked").symlink_to(world.outside / "work")
    with pytest.raises(TaskError, match="expected a task written by this command"):
        imported(world, clone, row(commit, instance_id="linked"))
    tasks = imported(world, clone, row(commit))
    first = (tasks / "a__n-1").stat().st_ino
    imported(world, clone, row(commit))
    assert (tasks / "a__n-1").stat().st_ino != first  # one of ours is
    with pytest.raises(DataError, match="rows.jsonl:2: instance_id: expected one row of a__n-1"):
        imported(world, clone, row(commit), row(commit))
    assert [path.name for path in tasks.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "names",
    [
        ["../../../.bashrc"], ["/etc/cron.d/x"], [".git/hooks/pre-commit"], ["a/.GIT/config"], ["../../test.sh"], [""],
        ["."], ["a\0b"], ["a/" * 300 + "b"], ["x" * 300], ["a.py", "a.py/b.py"], ["a.py", "a.py"], [3], "abc", [["x"]],
    ],
)  # fmt: skip
def test_the_names_of_test_files_stay_below_the_tests(names: Any, world: World) -> None:
    clone = world.repository("clone")
    with pytest.raises((DataError, TaskError), match=r"rows.jsonl:1: "):
        imported(world, clone, r2e(git(clone, "rev-parse", "HEAD"), names))


def test_fields_of_other_types_are_named(world: World) -> None:
    clone = world.repository("clone")
    commit = git(clone, "rev-parse", "HEAD")
    deep = "[" * 3000 + "]" * 3000
    rows: list[dict[str, Any] | str] = [
        r2e(commit, ["a.py"], []),
        r2e(commit, ["a.py"], [3]),
        r2e(commit, [], repo_name="../.."),
        r2e(commit, [], expected_output_json=deep),
        row(commit, FAIL_TO_PASS=deep),
        row(commit, FAIL_TO_PASS="-" * 100_000 + "1"),
        row(commit, test_patch=7),
        row(commit, patch={"a": 1}),
        deep,
        '{"a": ' * 500 + "1" + "}" * 500,
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ]
    for one in rows:
        with pytest.raises((DataError, TaskError), match=r"rows.jsonl:1: "):
            imported(world, clone, one, repository="../.." if "../.." in str(one) else "a/n")


@pytest.mark.parametrize(
    "commit",
    ["--output={out}", "--remote=ext::{command}", "--exec={command}", "-o{out}", "HEAD", "main", "HEAD:a.py", "a" * 40],
)
@pytest.mark.parametrize("benchmark", ["swe_bench", "smith", "r2e"])
def test_a_commit_is_its_hexadecimal_id(commit: str, benchmark: str, world: World) -> None:
    clone = world.repository("clone")
    commit = commit.format(out=world.outside / "work" / "notes.txt", command=world.command)
    one = row(commit)
    if benchmark == "smith":
        one = row("", repo=f"swesmith/a__n.{commit}")
    elif benchmark == "r2e":
        one = r2e(commit, ["a.py"])
    with pytest.raises(NorthError, match=r"rows.jsonl:1: "):
        imported(world, clone, one)


def link_patch(path: str, target: object) -> str:
    return (
        f"diff --git a/{path} b/{path}\nnew file mode 120000\n--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{target}\n"
        "\\ No newline at end of file\n"
    )


def file_patch(path: str, text: str = "x") -> str:
    return f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{text}\n"


PATCHES: dict[str, Callable[[World], str]] = {
    "a link to a file outside": lambda world: link_patch("tests/test_b.py", world.private),
    "a link to a file outside, relative": lambda world: link_patch("t", "../" * 30 + str(world.private).lstrip("/")),
    "a link to a link": lambda world: link_patch("t1", world.private) + link_patch("t2", "t1"),
    "a link to a directory, then through it": lambda world: (
        link_patch("d", world.outside / "home") + file_patch("d/.profile")
    ),
    "through a link of the commit": lambda world: file_patch("out/.profile"),
    "above the tree": lambda world: file_patch("../../../../../../../../x"),
    "absolute": lambda world: file_patch(str(world.outside / "home" / "new")),
    "a hook": lambda world: file_patch(".git/hooks/pre-commit", "#!/bin/sh"),
    "a link to itself": lambda world: link_patch("tests/test_b.py", "test_b.py"),
    "a device": lambda world: link_patch("tests/test_b.py", "/dev/zero"),
    "binary": lambda world: file_patch("tests/test_b.py", "\udcff"),
}


@pytest.mark.usefixtures("reads_are_noticed")
@pytest.mark.parametrize("name", PATCHES)
def test_a_test_patch_neither_writes_nor_reads_outside(name: str, world: World) -> None:
    clone = world.repository("clone")
    (clone / "out").symlink_to(world.outside / "home")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "a link")
    try:
        tasks = imported(world, clone, row(git(clone, "rev-parse", "HEAD"), test_patch=PATCHES[name](world)))
    except (TaskError, DataError):
        return
    # It stays a patch, which nothing but a sandbox applies.
    assert "link" in name or name == "a device"
    assert not [path for path in tasks.rglob("*") if path.is_symlink() and path.name != "out"]


def test_links_of_a_commit_stay_links(world: World) -> None:
    clone = world.repository("clone")
    (clone / "out").symlink_to(world.outside / "private")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "a link")
    tasks = imported(world, clone, row(git(clone, "rev-parse", "HEAD")))
    assert (tasks / "a__n-1" / "environment" / "files" / "out").is_symlink()


def test_scripts_of_a_task_run_nothing_that_a_row_says(world: World) -> None:
    clone = world.repository("clone")
    ids = [f"x.py; {world.command} #::a", f"$({world.command})::b", f"`{world.command}`::c"]
    patch = f"{PATCH}NORTH_PATCH\n{world.command}\ncat <<'NORTH_PATCH'\n"
    tasks = imported(world, clone, row(git(clone, "rev-parse", "HEAD"), patch=patch, FAIL_TO_PASS=ids))
    work = world.target / "work"
    work.mkdir()
    for script in ("tests/test.sh", "tests/eval.sh", "solution/solve.sh"):
        text = (tasks / "a__n-1" / script).read_text().replace("cd /work", f"cd {work}")
        text = (
            text.replace("python -m pytest", "true")
            .replace("/tmp/log", f"{work}/log")
            .replace("/logs/verifier", str(work))
        )
        subprocess.run(["bash", "-c", text], capture_output=True, cwd=work)
    assert not world.marker.exists()


# ---- repositories --------------------------------------------------------------------------------------------------


def configured(world: World, **settings: str) -> Path:
    clone = world.repository(
        "clone", {"a.py": "A = 1\n", "tests/test_a.py": "B = 2\n", ".gitattributes": "* diff=x filter=x\n"}
    )
    for name, value in settings.items():
        git(clone, "config", name.replace("__", "."), value)
    return clone


def hooked(world: World) -> Path:
    clone = world.repository("clone")
    for hook in ("post-checkout", "pre-commit", "post-index-change", "post-commit", "reference-transaction"):
        path = clone / ".git" / "hooks" / hook
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{world.command}\n")
        path.chmod(0o755)
    return clone


def promised(world: World) -> Path:
    """A partial clone whose missing object comes from a remote that is a command."""
    clone = configured(
        world, extensions__partialClone="origin", remote__origin__promisor="true", protocol__ext__allow="always",
        remote__origin__url=f"ext::sh -c '{world.command}'", core__repositoryformatversion="1",
    )  # fmt: skip
    blob = git(clone, "rev-parse", "HEAD:a.py")
    (clone / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    return clone


def signed(world: World) -> Path:
    program = world.root / "input" / "gpg"
    program.write_text(f"#!/bin/sh\n{world.command}\n")
    program.chmod(0o755)
    clone = configured(world, log__showSignature="true", gpg__program=str(program))
    tree = git(clone, "rev-parse", "HEAD^{tree}")
    parent = git(clone, "rev-parse", "HEAD")
    commit = (
        f"tree {tree}\nparent {parent}\nauthor a <a@b> 1 +0000\ncommitter a <a@b> 1 +0000\n"
        "gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----\n\nsigned\n"
    )
    git(clone, "update-ref", "HEAD", git(clone, "hash-object", "-t", "commit", "-w", "--stdin", stdin=commit))
    return clone


RUNS: dict[str, Callable[[World], Path]] = {
    "core.fsmonitor": lambda world: configured(world, core__fsmonitor=world.command),
    "tar.tar.gz.command": lambda world: configured(world, **{"tar__tar.gz__command": world.command}),
    "diff.external": lambda world: configured(world, diff__external=world.command),
    "textconv": lambda world: configured(world, diff__x__textconv=world.command),
    "filter": lambda world: configured(world, filter__x__clean=world.command, filter__x__smudge=world.command),
    "core.pager": lambda world: configured(world, core__pager=world.command),
    "hooks": hooked,
    "a promisor": promised,
    "a signature": signed,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_repository_runs_nothing(name: str, world: World) -> None:
    clone = RUNS[name](world)
    commit = git(clone, "rev-parse", "HEAD")
    for use in (
        lambda: imported(world, clone, row(commit, test_patch=TEST_PATCH)),
        lambda: imported(world, clone, r2e(commit, ["a.py"])),
        lambda: sources.commit_files(clone, "HEAD"),
        lambda: sources.commits(clone, 5),
    ):
        with contextlib.suppress(TaskError):  # the promised object is not there, nor a commit before the first
            use()
        assert not world.marker.exists()


def entry_of_git(world: World, name: str) -> tuple[Path, str]:
    """A commit with a tree called ``.git`` that holds a configuration."""
    clone = world.repository("clone")
    config = f"[core]\n\trepositoryformatversion = 0\n\tfsmonitor = {world.command}\n"
    blobs = {one: git(clone, "hash-object", "-w", "--stdin", stdin=text) for one, text in
             (("config", config), ("HEAD", "ref: refs/heads/main\n"))}  # fmt: skip

    def tree(rows: list[tuple[str, str, str]]) -> str:
        content = b"".join(
            f"{mode} {entry}\0".encode() + bytes.fromhex(one) for mode, entry, one in sorted(rows, key=lambda r: r[1])
        )
        return git(clone, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=content)

    inner = tree([("100644", one, blob) for one, blob in blobs.items()])
    if name == "file":
        link = git(clone, "hash-object", "-w", "--stdin", stdin=f"gitdir: {world.root}/input/repository/.git\n")
        outer = tree([("100644", ".git", link)])
    elif name == "below":
        outer = tree([("40000", "sub", tree([("40000", ".git", inner)]))])
    else:
        outer = tree([("40000", ".git", inner)])
    return clone, git(clone, "commit-tree", outer, "-m", "x")


@pytest.mark.parametrize("name", ["folder", "file", "below"])
def test_a_commit_that_holds_a_git_folder_is_refused(name: str, world: World) -> None:
    private = world.repository("repository")
    head = git(private, "rev-parse", "HEAD")
    clone, commit = entry_of_git(world, name)
    with pytest.raises(TaskError, match=r"\.git"):
        imported(world, clone, row(commit))
    with contextlib.suppress(TaskError):
        assert sources.commit_files(clone, commit) == {}
    assert git(private, "rev-parse", "HEAD") == head
    assert not world.marker.exists()


def gitdir_file(world: World, private: Path) -> Path:
    clone = world.root / "input" / "clone"
    clone.mkdir()
    (clone / ".git").write_text(f"gitdir: {private / '.git'}\n")
    return clone


def gitdir_link(world: World, private: Path) -> Path:
    clone = world.root / "input" / "clone"
    clone.mkdir()
    (clone / ".git").symlink_to(private / ".git")
    return clone


def common_directory(world: World, private: Path) -> Path:
    clone = world.repository("clone")
    (clone / ".git" / "commondir").write_text(f"{private / '.git'}\n")
    return clone


def alternates(world: World, private: Path) -> Path:
    clone = world.repository("clone")
    (clone / ".git" / "objects" / "info").mkdir(exist_ok=True)
    (clone / ".git" / "objects" / "info" / "alternates").write_text(f"{private / '.git' / 'objects'}\n")
    return clone


def linked_objects(world: World, private: Path) -> Path:
    clone = world.repository("clone")
    (clone / ".git" / "objects").rename(clone / "objects")
    (clone / ".git" / "objects").symlink_to(private / ".git" / "objects")
    return clone


def linked_pack(world: World, private: Path) -> Path:
    clone = world.repository("clone")
    (clone / ".git" / "objects" / "pack").rmdir()
    (clone / ".git" / "objects" / "pack").symlink_to(private / ".git" / "objects")
    return clone


@pytest.mark.parametrize("make", [gitdir_file, gitdir_link, common_directory, alternates, linked_objects, linked_pack])
def test_a_clone_that_leads_to_another_repository_is_refused(make: Callable[[World, Path], Path], world: World) -> None:
    private = world.repository("private", {"key.py": f"KEY = '{world.secret}'\n"}, inside="input")
    commit = git(private, "rev-parse", "HEAD")
    clone = make(world, private)
    with pytest.raises(TaskError, match="links to another's"):
        imported(world, clone, row(commit))
    with pytest.raises(TaskError, match="links to another's"):
        sources.commit_files(clone, commit)


def test_worktrees_and_bare_and_shallow_clones_are_clones(world: World) -> None:
    clone = world.repository("clone")
    (clone / "b.py").write_text("B = 1\n")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "second")
    inputs = world.root / "input"
    git(clone, "worktree", "add", "-q", str(inputs / "worktree"))
    git(inputs, "clone", "-q", "--bare", str(clone), str(inputs / "bare.git"))
    git(inputs, "clone", "-q", "--depth", "1", f"file://{clone}", str(inputs / "shallow"))
    for place in ("worktree", "bare.git", "shallow"):
        assert set(sources.commit_files(inputs / place, "HEAD")) == {"a.py", "b.py", "tests/test_a.py"}
        assert len(sources.commits(inputs / place, 5)) == (0 if place == "shallow" else 1)
    with pytest.raises(TaskError, match="not a git repository"):
        sources.commit_files(clone / "tests", "HEAD")


def test_git_sees_nothing_of_this_processs_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = world.repository("clone")
    commit = git(clone, "rev-parse", "HEAD")
    programs = world.root / "input" / "programs"
    programs.mkdir()
    seen = world.target / "seen"
    (programs / "git").write_text(f'#!/bin/sh\nenv >> {seen}\nPATH=${{PATH#*:}} exec git "$@"\n')
    (programs / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", world.command)
    sources.commit_files(clone, commit)
    assert SECRET_VARIABLE not in seen.read_text()
    assert "GIT_EXTERNAL_DIFF" not in seen.read_text()
    seen.unlink()


# ---- packages and generated sets -----------------------------------------------------------------------------------


def archive(members: dict[str, bytes | str | tuple[bytes, str]]) -> bytes:
    """A source distribution: text is content, a tuple a type and where it leads."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                data = content.encode() if isinstance(content, str) else content
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpacked(world: World, content: bytes) -> dict[str, str]:
    cache = world.target / "cache"
    cache.mkdir(exist_ok=True)
    (cache / "a-1.tar.gz").write_bytes(content)
    return sources.sdist_files("a", "1", cache)


@pytest.mark.usefixtures("reads_are_noticed")
def test_members_of_a_source_distribution_that_lead_out_are_left_out(world: World) -> None:
    members = {
        "a-1/a.py": "A = 1\n", "a-1/../../out.py": "x", "/etc/out.py": "x", "a-1/.git": f"gitdir: {world.outside}\n",
        "a-1/.git/config": "x", "a-1/sub/.git/hooks/pre-commit": "x",
        "a-1/link.py": (tarfile.SYMTYPE, str(world.private)),
        "a-1/hard.py": (tarfile.LNKTYPE, str(world.private)), "a-1/fifo.py": (tarfile.FIFOTYPE, ""),
        "a-1/device.py": (tarfile.CHRTYPE, ""), "a-1/\x1b[2J.py": "x", "a-1/a\nb.py": "x",
    }  # fmt: skip
    assert unpacked(world, archive(members)) == {"a.py": "A = 1\n"}


def test_an_archive_that_is_none_or_grows_without_end_is_a_task_error(world: World) -> None:
    header = tarfile.TarInfo("a-1/zeros")
    header.size = 1 << 40
    for content in (b"", b"no archive", archive({"a-1/a.py": "x" * 5000})[:-50], gzip.compress(b"x" * 2000),
                    gzip.compress(header.tobuf() + b"\0" * (120 << 20), 1)):  # fmt: skip
        with pytest.raises(TaskError, match="sound archive"):
            unpacked(world, content)


@pytest.mark.parametrize("name", ["../../outside/work/notes", "/etc", "a/b", "..", "", "-x", "a b", "a?x=1", "a#", "*"])
def test_names_and_versions_of_packages_are_such(name: str, world: World) -> None:
    for package, version in ((name, "1"), ("a", name)):
        with pytest.raises(ConfigError, match="packages"):
            sources.sdist_files(package, version, world.target / "cache", index="http://127.0.0.1:9")
    provider = BubblewrapProvider()
    provider.check = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ConfigError):
        build_tasks(world.target, provider, packages={name: "1"})


def test_generated_sets_replace_only_generated_sets(world: World) -> None:
    def build(name: str, parent: Path = world.target) -> None:
        build_task_sets(parent, [TaskSetSettings(name, "terminal", "train", 1)])

    for name in ("..", ".", "../outside", str(world.outside), "", "a/b"):
        with pytest.raises(ConfigError, match="sets: name"):
            build(name)
    (world.target / "link").symlink_to(world.outside / "work")
    for name, parent in (("link", world.target), ("work", world.outside), ("private", world.outside)):
        with pytest.raises(ConfigError, match="holds the work of an earlier run"):
            build(name, parent)
    build("set")
    assert len(load_tasks(world.target / "set")) == 1
