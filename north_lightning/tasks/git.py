"""Git on what strangers made: their repositories, trees and patches.

In: a directory and git's arguments. Out: what git prints. A repository can name programs for git to run (hooks,
filters, ``core.fsmonitor``, ``tar.*.command``, ``gpg.program``, an ``ext::`` remote), so nothing is done under its
configuration: its objects are borrowed by an empty repository of ours (``objects_of``). This user's configuration is
not read either, and git sees nothing of this process's environment but ``PATH``.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from north_lightning.errors import TaskError
from north_lightning.sandbox.scratch import Scratch

TIMEOUT_S = 600.0
_ENVIRONMENT = {
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C.UTF-8",
    # A fixed identity and date: the same task is the same commit everywhere.
    **{f"GIT_{who}_NAME": "north" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "north@localhost" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
}
_SETTINGS = ("safe.directory=*", "core.hooksPath=/dev/null", "core.fsmonitor=false", "tar.umask=0022")


def git(directory: Path, *arguments: str, stdin: str | None = None, may_differ: bool = False) -> bytes:
    """What a git command prints; ``TaskError`` with git's own words. ``may_differ``: exit code 1 is no error."""
    # A tree that is no repository is not to be taken for a part of one that lies above it.
    ceiling = {"GIT_CEILING_DIRECTORIES": str(directory.resolve().parent), "PATH": os.environ["PATH"]}
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *settings, *arguments],
            input=None if stdin is None else stdin.encode(errors="surrogateescape"),
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True, env={**_ENVIRONMENT, **ceiling}, timeout=TIMEOUT_S,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, UnicodeEncodeError, ValueError) as error:
        raise TaskError(f"git {arguments[0]}: {error}") from error
    if done.returncode > int(may_differ) or done.returncode < 0:
        raise TaskError(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()[-500:]}")
    return done.stdout


def objects_of(clone: Path) -> Path:
    """A bare repository of ours, without configuration and references, in which a clone's commits can be named by id.

    Raises:
        TaskError: ``clone`` is no repository, or its objects are in another one.
    """
    return _borrower(clone.resolve())


@cache
def _borrower(clone: Path) -> Path:
    found = git(clone, "rev-parse", "--path-format=absolute", "--git-dir", "--git-common-dir").decode().splitlines()
    own, common = (Path(line).resolve() for line in found)
    is_worktree = own.parent.parent == common and _text(own / "gitdir") == str(clone / ".git")
    objects = common / "objects"
    places = (common / "shallow", objects, *objects.glob("*"), *objects.glob("pack/*"))
    linked = any(path.is_symlink() for path in places)
    if not (common.is_relative_to(clone) or is_worktree) or linked or (objects / "info" / "alternates").exists():
        raise TaskError(
            f"{clone}: expected a repository that holds its own objects, got one that links to another's; "
            "make a clone of it with git clone --no-local"
        )
    scratch = Scratch("task")
    atexit.register(scratch.delete)
    ours = scratch.path / "objects"
    ours.mkdir()
    git(ours, "init", "-q", "--bare", "--template=")
    (ours / "info").mkdir()
    (ours / "info" / "attributes").write_text("* -export-ignore -export-subst\n")  # nothing is left out or rewritten
    (ours / "objects" / "info" / "alternates").write_text(f"{objects}\n")
    if (common / "shallow").is_file():
        shutil.copyfile(common / "shallow", ours / "shallow")
    return ours


def head_of(clone: Path) -> str:
    """The id of the commit that is checked out."""
    return git(clone, "rev-parse", "--verify", "--end-of-options", "HEAD^{commit}").decode().strip()


def commit_all(directory: Path) -> None:
    """Make ``directory``, which holds no ``.git``, a repository with one commit of everything in it."""
    git(directory, "init", "-q", "-b", "main", "--template=")
    git(directory, "add", "-A", "--force")  # a repository may hold files that it ignores
    git(directory, "commit", "-q", "-m", "initial")


def without_binary(patch: str, with_content: bool = False) -> str:
    """``patch`` without binary files: all of them, or those whose content it does not bring."""
    marks = r"Binary files .* differ$" if with_content else r"(Binary files .* differ|GIT binary patch)$"
    sections = re.split(r"^(?=diff --git )", patch, flags=re.MULTILINE)
    return "".join(one for one in sections if not re.search(f"^{marks}", one, re.MULTILINE))


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.is_file() else ""
