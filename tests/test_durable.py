"""Folders are replaced and removed whole: for a reader at any moment, and after a kill at any moment."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from north_lightning import durable
from north_lightning.durable import remove_folder, replace_folder, unfinished_name

NUM_FILES = 60


def write(folder: Path, content: str) -> Path:
    folder.mkdir()
    for number in range(NUM_FILES):
        (folder / str(number)).write_text(content)
    return folder


def contents(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.iterdir()]


def test_a_folder_is_there_at_every_moment_in_which_it_is_replaced(tmp_path: Path) -> None:
    folder, missing, is_over = tmp_path / "folder", 0, threading.Event()
    folder.mkdir()

    def look() -> None:
        nonlocal missing
        while not is_over.is_set():
            missing += not folder.exists()

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(500):
        unfinished_name(folder).mkdir()
        old = replace_folder(unfinished_name(folder), folder)
        assert old is not None
        old.rmdir()
    is_over.set()
    reader.join()
    assert missing == 0
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_old_folder_is_given_back_also_where_names_cannot_be_exchanged(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(durable, "_exchange", lambda left, right: False)
    folder = tmp_path / "folder"
    assert replace_folder(write(unfinished_name(folder), "first"), folder) is None
    old = replace_folder(write(unfinished_name(folder), "second"), folder)
    assert old is not None
    assert (set(contents(old)), set(contents(folder))) == ({"first"}, {"second"})
    assert sorted(tmp_path.iterdir()) == sorted([old, folder])


def test_a_kill_at_any_moment_leaves_a_folder_whole_or_no_folder(tmp_path: Path) -> None:
    """Child processes write a folder and remove it, for ever."""
    folder, noise, found = tmp_path / "folder", random.Random(0), set()

    def write_and_remove() -> NoReturn:
        while True:
            replace_folder(write(unfinished_name(folder), "content"), folder)
            remove_folder(folder)

    started = time.monotonic()
    replace_folder(write(unfinished_name(folder), "content"), folder)
    remove_folder(folder)
    cycle_s = time.monotonic() - started
    num_kills = 0
    while num_kills < 20 or len(found) < 2:  # a slow machine may need more to be hit both ways
        kill_after(noise.uniform(0.0, 2 * cycle_s), write_and_remove)
        num_kills += 1
        found.add(folder.exists())
        if folder.exists():
            assert contents(folder) == ["content"] * NUM_FILES
        remove_folder(folder)
        remove_folder(unfinished_name(folder))


def kill_after(seconds: float, function: Callable[[], NoReturn]) -> None:
    child = os.fork()
    if child == 0:
        function()
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
