"""The editor against an editor in memory, and its wording where a model depends on it, in a real sandbox."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from north_lightning.harnesses.editor import Editor, lines_of, numbered, occurrences
from north_lightning.sandbox import Shell

TEXT = "".join(f"line {number}\n" for number in range(1, 21))


@pytest.fixture
def edit(tmp_path: Path, sandboxes):
    """Runs editor commands on a small tree; returns their observations and the files afterwards."""
    image = tmp_path / "image"
    for name, content in {
        "a.txt": TEXT.encode(),
        "twice.txt": b"x = 1\ny = 2\nx = 1\n",
        "open.txt": b"no newline",
        "empty.txt": b"",
        "raw.bin": b"\xff\xfe\x00",
        "d/e/f/g.txt": b"g",
        ".hidden/h.txt": b"h",
        "odd name's.txt": b"odd\n",
    }.items():
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        (image / name).write_bytes(content)

    def run(*calls: dict) -> tuple[list[str], dict[str, bytes]]:
        async def session() -> tuple[list[str], dict[str, bytes]]:
            sandbox = await sandboxes.open(image)
            try:
                shell = Shell(sandbox)
                editor = Editor(shell)
                observations = [await editor.execute(call) for call in calls]
                await shell.close()
                await sandbox.snapshot(tmp_path / "after")
            finally:
                await sandbox.close()
            after = {
                str(path.relative_to(tmp_path / "after")): path.read_bytes()
                for path in (tmp_path / "after").rglob("*")
                if path.is_file()
            }
            return observations, after

        return asyncio.run(session())

    return run


def test_view_numbers_lines_as_cat_n_does_for_absolute_and_relative_paths(edit):
    (whole, relative, some, rest, empty), _ = edit(
        {"command": "view", "path": "/work/a.txt"},
        {"command": "view", "path": "a.txt"},
        {"command": "view", "path": "a.txt", "view_range": [2, 3]},
        {"command": "view", "path": "a.txt", "view_range": [20, -1]},
        {"command": "view", "path": "empty.txt"},
    )
    assert whole.splitlines()[0] == "     1\tline 1"
    assert len(whole.splitlines()) == 20
    assert relative == whole
    assert some == "     2\tline 2\n     3\tline 3"
    assert rest == "    20\tline 20"
    assert empty == ""


def test_view_of_a_directory_lists_two_levels_without_hidden_files(edit):
    (top, below), _ = edit({"command": "view", "path": "/work"}, {"command": "view", "path": "/work/d"})
    lines = top.splitlines()
    assert lines[0] == "/work"
    assert {"/work/a.txt", "/work/d", "/work/d/e", "/work/odd name's.txt"} <= set(lines)
    assert not any("hidden" in line or "/work/d/e/f" in line for line in lines)
    assert below.splitlines() == ["/work/d", "/work/d/e", "/work/d/e/f"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"command": "view", "path": "gone.txt"}, ["/work/gone.txt", "no such file"]),
        ({"command": "view", "path": "a.txt", "view_range": [0, 3]}, ["[0, 3]", "1 to 20"]),
        ({"command": "view", "path": "a.txt", "view_range": [5, 3]}, ["[5, 3]", "1 to 20"]),
        ({"command": "view", "path": "a.txt", "view_range": [5, 21]}, ["[5, 21]", "1 to 20"]),
        ({"command": "view", "path": "raw.bin"}, ["raw.bin", "UTF-8"]),
        ({"command": "view", "path": "a\0b"}, ["path"]),
        ({"command": "view", "path": "a" * 5000}, ["path"]),
        ({"command": "create", "path": "a.txt", "file_text": "new"}, ["a.txt exists already"]),
        ({"command": "create", "path": "d", "file_text": "new"}, ["d exists already"]),
        ({"command": "create", "path": "gone/new.txt", "file_text": "new"}, ["no such file or directory"]),
        ({"command": "create", "path": "new.txt"}, ["create needs file_text"]),
        ({"command": "str_replace", "path": "a.txt", "new_str": "x"}, ["str_replace needs old_str"]),
        ({"command": "str_replace", "path": "a.txt", "old_str": "", "new_str": "x"}, ["empty"]),
        ({"command": "str_replace", "path": "a.txt", "old_str": "line 3", "new_str": "line 3"}, ["same"]),
        ({"command": "str_replace", "path": "a.txt", "old_str": "row 3", "new_str": "x"}, ["not in /work/a.txt"]),
        ({"command": "str_replace", "path": "twice.txt", "old_str": "x = 1"}, ["2 times", "lines 1, 3"]),
        ({"command": "str_replace", "path": "twice.txt", "old_str": "y  =  2\nz"}, ["not in", "line 2"]),
        ({"command": "insert", "path": "a.txt", "insert_line": 21, "new_str": "x"}, ["21", "0 to 20"]),
        ({"command": "insert", "path": "a.txt", "insert_line": -1, "new_str": "x"}, ["-1", "0 to 20"]),
        ({"command": "insert", "path": "a.txt", "new_str": "x"}, ["insert needs insert_line"]),
        ({"command": "insert", "path": "d", "insert_line": 0, "new_str": "x"}, ["not a regular file"]),
        ({"command": "undo_edit", "path": "a.txt"}, ["no edit of /work/a.txt"]),
        ({"command": "str_replace", "path": "/usr/bin/env", "old_str": "a", "new_str": "b"}, ["/usr/bin/env"]),
        ({"command": "create", "path": "/usr/new", "file_text": "new"}, ["/usr/new"]),
    ],
)
def test_a_call_that_cannot_be_carried_out_says_why_and_changes_nothing(arguments, words, edit, tmp_path):
    (observation,), after = edit(arguments)
    assert observation.startswith("Error: ")
    for word in words:
        assert word in observation
    before = {
        str(path.relative_to(tmp_path / "image")): path.read_bytes()
        for path in (tmp_path / "image").rglob("*")
        if path.is_file()
    }
    assert after == before


def test_edits_show_a_snippet_with_context_and_the_new_line_numbers(edit):
    (replaced, inserted, first), after = edit(
        {"command": "str_replace", "path": "a.txt", "old_str": "line 10\n", "new_str": "ten\nand a half\n"},
        {"command": "insert", "path": "a.txt", "insert_line": 2, "new_str": "between\n"},
        {"command": "insert", "path": "empty.txt", "insert_line": 0, "new_str": "hello"},
    )
    assert replaced.splitlines()[0] == "Edited /work/a.txt"
    assert [line.strip().split("\t") for line in replaced.splitlines()[1:]][:6] == [
        ["6", "line 6"],
        ["7", "line 7"],
        ["8", "line 8"],
        ["9", "line 9"],
        ["10", "ten"],
        ["11", "and a half"],
    ]
    assert "     3\tbetween" in inserted
    assert inserted.splitlines()[1] == "     1\tline 1"
    assert first == "Edited /work/empty.txt\n     1\thello"
    assert after["empty.txt"] == b"hello\n"
    expected = TEXT.replace("line 10\n", "ten\nand a half\n").replace("line 2\n", "line 2\nbetween\n")
    assert after["a.txt"].decode() == expected


def test_undo_takes_edits_back_one_by_one_down_to_the_creation(edit):
    observations, after = edit(
        {"command": "create", "path": "d/new.txt", "file_text": "one\n"},
        {"command": "str_replace", "path": "d/new.txt", "old_str": "one", "new_str": "two"},
        {"command": "insert", "path": "d/new.txt", "insert_line": 1, "new_str": "three"},
        {"command": "undo_edit", "path": "d/new.txt"},
        {"command": "undo_edit", "path": "/work/d/../d/new.txt"},
        {"command": "view", "path": "d/new.txt"},
        {"command": "undo_edit", "path": "d/new.txt"},
        {"command": "undo_edit", "path": "d/new.txt"},
        {"command": "str_replace", "path": "a.txt", "old_str": "line 7\n"},
        {"command": "undo_edit", "path": "a.txt"},
    )
    assert observations[0] == "Created /work/d/new.txt"
    assert observations[5] == "     1\tone"
    assert observations[6] == "Removed /work/d/new.txt"
    assert observations[7].startswith("Error: ")
    assert "d/new.txt" not in after
    assert after["a.txt"].decode() == TEXT


def test_any_text_and_file_name_survive_an_edit(edit):
    odd = "tab\there 'q' \"d\" $(x) `y` \\n \x0c é 漢 %s\r\n\n"
    _, after = edit(
        {"command": "create", "path": "new $(x) '\"file.txt", "file_text": odd},
        {"command": "str_replace", "path": "odd name's.txt", "old_str": "odd", "new_str": odd},
        {"command": "str_replace", "path": "open.txt", "old_str": "no", "new_str": "still no"},
        {"command": "create", "path": "-n", "file_text": "dash"},
    )
    assert after["new $(x) '\"file.txt"].decode() == odd
    assert after["odd name's.txt"].decode() == odd + "\n"
    assert after["open.txt"] == b"still no newline"
    assert after["-n"] == b"dash"


@given(st.text(alphabet="ab\n\x0c\r", max_size=40))
def test_line_numbers_are_those_of_wc_and_cat_n(text):
    lines = lines_of(text)
    assert len(lines) == text.count("\n") + (text != "" and not text.endswith("\n"))
    assert numbered(lines).count("\t") == len(lines)


@given(st.text(alphabet="ab\n", max_size=40), st.text(alphabet="ab\n", min_size=1, max_size=3))
def test_occurrences_count_and_place_matches_as_replace_does(text, part):
    found = occurrences(text, part)
    assert len(found) == text.count(part)
    if found:
        assert found[0] == text[: text.index(part)].count("\n") + 1
