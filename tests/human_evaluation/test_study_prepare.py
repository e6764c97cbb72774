"""What ``prepare`` makes: pairs of attempts from any harness, balanced, double-rated, sealed."""

import base64
import io
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from small_studies import KINDS, prepare, write_attempt, write_sides

from north_lightning.cli import main
from north_lightning.evaluation.attempts import Attempt, append_attempts
from north_lightning.evaluation.works import Works
from north_lightning.human_evaluation.assignments import Assignment, Comparison, assign
from north_lightning.human_evaluation.names import PLACEHOLDER, Names, plain
from north_lightning.human_evaluation.pages import diff_files, make_markdown
from north_lightning.human_evaluation.submissions import opencode_messages, read_side
from north_lightning.tasks import load_task, write_task
from north_lightning.tasks.harbor import TaskSource
from north_lightning.types import Message, Reward, Rollout, ToolCall, Turn

FIXTURES = Path(__file__).parents[1] / "fixtures" / "human_evaluation"

# ---- who rates what --------------------------------------------------------------------------------------------------


def comparisons(num: int, num_pairs: int = 1) -> list[Comparison]:
    kinds = [KINDS[number % 4] for number in range(num)]
    return [
        Comparison(f"c{number}-{pair}", f"i{number}", kind, (f"a{number}-{pair}", f"b{number}-{pair}"), pair)
        for number, kind in enumerate(kinds)
        for pair in range(num_pairs)
    ]


@pytest.mark.parametrize("num", [1, 4, 7, 85, 200])
@pytest.mark.parametrize("num_raters", [1, 2, 3, 5])
@pytest.mark.parametrize("double_rated", [0.0, 0.25, 1.0])
def test_loads_sides_and_double_ratings_are_balanced(num: int, num_raters: int, double_rated: float) -> None:
    if num_raters == 1 and double_rated:
        pytest.skip("prepare refuses that")
    every = comparisons(num)
    raters = [f"r{number}" for number in range(num_raters)]
    lists = assign(every, raters, double_rated, 0, b"key")
    seats = [one for rows in lists.values() for one in rows]
    times = Counter(one.comparison for one in seats)
    assert set(times) == {one.id for one in every}
    assert max(times.values()) <= 2
    assert len({(one.rater, one.comparison) for one in seats}) == len(seats) == len({one.id for one in seats})
    for kind in KINDS:
        own = {one.id: one for one in every if one.functionality == kind}
        assert sum(times[name] == 2 for name in own) >= double_rated * len(own)
        loads = [sum(one.comparison in own for one in rows) for rows in lists.values()]
        assert max(loads) - min(loads) <= 1
        for rows in [seats, *lists.values()]:
            mine = [one for one in rows if one.comparison in own]
            first_left = sum(one.left == own[one.comparison].attempts[0] for one in mine)
            assert abs(2 * first_left - len(mine)) <= 1


def test_sides_of_three_models_are_balanced_for_each_pair() -> None:
    every = {one.id: one for one in comparisons(80, num_pairs=3)}
    lists = assign(list(every.values()), ["r1", "r2"], 0.25, 0, b"key")
    for pair in range(3):
        mine = [one for rows in lists.values() for one in rows if every[one.comparison].pair == pair]
        first_left = sum(one.left == every[one.comparison].attempts[0] for one in mine)
        assert abs(2 * first_left - len(mine)) <= 4  # one a functionality


def test_the_key_alone_decides() -> None:
    every = comparisons(40)

    def sides(key: bytes) -> list[Assignment]:
        return [one for rows in assign(every, ["r1", "r2"], 0.25, 0, key).values() for one in rows]

    assert sides(b"key") == sides(b"key")
    left = {one.comparison: one.left for one in sides(b"key")}
    other = {one.comparison: one.left for one in sides(b"other")}
    assert 8 < sum(left[name] != other[name] for name in left) < 32
    assert [one.comparison for one in sides(b"key")] != [one.comparison for one in sides(b"other")]


def test_attention_items_are_of_items_that_the_rater_does_not_see_otherwise(tmp_path: Path) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 12), tmp_path / "study")
    for rows in study.assignments.values():
        planted = [study.comparison_of(one) for one in rows if study.comparison_of(one).expected]
        assert len(planted) == 2
        seen = {study.comparison_of(one).item for one in rows if not study.comparison_of(one).expected}
        assert not seen & {one.item for one in planted}
    answers = {one.id: [study.page(name)["answer"] for name in one.attempts] for one in study.comparisons.values()}
    for one in study.comparisons.values():
        if one.expected:  # the better one answers the item's own task
            number = study.instructions[one.item].split()[2].rstrip(".</p>")
            right = answers[one.id][one.attempts.index(one.expected)]
            wrong = answers[one.id][1 - one.attempts.index(one.expected)]
            assert f"Item {number}," in right
            assert f"Item {number}," not in wrong


# ---- the seal --------------------------------------------------------------------------------------------------------


def public_text(study: Path) -> str:
    """All that the app reads, decoded."""
    texts = []
    for path in sorted(study.rglob("*")):
        if path.is_file() and path.name != "sealed.json":
            content = path.read_bytes()
            texts.append(content.decode("utf-8", errors="replace"))
            if path.suffix == ".json":
                texts.append(json.dumps(json.loads(content), ensure_ascii=False))
    return "\n".join(texts).lower()


def picture(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    made = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(made, "PNG", pnginfo=info)
    return made.getvalue()


LEAKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "answer": lambda name: {"answer": f"I am {name}, at your service."},
    "upper case": lambda name: {"answer": f"I AM {name.upper()}"},
    "other separators": lambda name: {"answer": f"I am {name.replace('-', ' ')} / {name.replace('-', '_')}"},
    "split by a colour": lambda name: {"answer": f"I am {name[:3]}\x1b[31m{name[3:]}\x1b[0m"},
    "invisible characters": lambda name: {"answer": f"I am {name[:3]}\u200b{name[3:]}"},
    "full width": lambda name: {"answer": "".join(chr(ord(one) + 0xFEE0) for one in name)},
    "markup": lambda name: {"answer": f"I am {name[:3]}**{name[3:]}**"},
    "entities": lambda name: {"answer": "".join(f"&#{ord(one)};" for one in name)},
    "a diff": lambda name: {"diff": f"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+by {name}\n"},
    "a file": lambda name: {"files": {"notes.txt": f"by {name}"}},
    "the name of a file": lambda name: {"files": {f"{name}/by_{name}.py": "x = 1\n"}},
    "a page": lambda name: {"files": {"index.html": f"<title>{name}</title>"}},
    "a page with entities": lambda name: {"files": {"index.html": "".join(f"&#x{ord(one):x};" for one in name)}},
    "a page with tags": lambda name: {"files": {"index.html": f"{name[:3]}<b>{name[3:]}</b>"}},
    "base64 in a page": lambda name: {"files": {"index.html": base64.b64encode(f"it is {name}!".encode()).decode()}},
    "JavaScript escapes": lambda name: {"files": {"a.js": "".join(f"\\u{ord(one):04x}" for one in name)}},
    "percent signs": lambda name: {"files": {"a.svg": "".join(f"%{ord(one):02X}" for one in name)}},
    "UTF-16": lambda name: {"files": {"a.bin": name.encode("utf-16-le")}},
    "a picture's text": lambda name: {"files": {"plot.png": picture(Author=name)}},
    "bytes after a picture": lambda name: {"files": {"plot.png": picture() + name.encode()}},
    "a binary file": lambda name: {"files": {"a.bin": b"\xff\xfe\x00" + name.encode()}},
    "the transcript": lambda name: {
        "attempt": {"transcript": [{"role": "user", "content": f"You are {name}."},
                                   {"role": "assistant", "content": "", "reasoning": f"As {name}",
                                    "tool_calls": [{"name": f"{name}_tool", "arguments": {name: name}}]},
                                   {"role": "tool", "content": f"--model {name}"}]}
    },
    "the instruction": lambda name: {"instruction": f"You are {name}. Do it."},
}  # fmt: skip


@pytest.mark.parametrize("kind", LEAKS)
def test_no_name_of_a_model_is_in_what_the_app_reads(kind: str, tmp_path: Path) -> None:
    name = "north-mini"
    leak = LEAKS[kind](name)
    for model in (name, "wombat"):
        for item in ("one", "two"):
            write_attempt(tmp_path / model / item, "code_editing", **{"answer": f"Done in {item}.", **leak})
    sides = [f"{model}={tmp_path / model}" for model in (name, "wombat")]
    study = prepare(sides, tmp_path / "study", "--attention_items", "0")
    text = public_text(study.folder)
    for spelled in (name, "north mini", "north_mini", "northmini", "wombat", f"{name[:3]}\u200b", "n%6f", "\\u006e"):
        assert spelled.lower() not in text, spelled
    shown = json.dumps([study.page(one) for one in study.lengths])
    for hidden in (base64.b64encode(b"north").decode()[:6], "&#110;&#111;", "&#x6e;", "nor<b>th"):
        assert hidden not in shown
    assert "Done in one" in shown or "answer" in leak or "attempt" in leak


def test_a_name_is_replaced_by_what_keeps_code_working(tmp_path: Path) -> None:
    page = '<script src="wombat.js"></script><script>wombatRun()</script>'
    for model in ("quokka", "wombat"):
        for item in ("one", "two"):
            files = {"index.html": page, "wombat.js": "function wombatRun() {}"}
            write_attempt(tmp_path / model / item, "data_visualization", f"{item}", files=files)
    study = prepare([f"{model}={tmp_path / model}" for model in ("quokka", "wombat")], tmp_path / "study")
    for attempt in study.lengths:
        assert set(study.page(attempt)["files"]) == {"index.html", f"{PLACEHOLDER}.js"}
        for path, content in (
            ("index.html", f'<script src="{PLACEHOLDER}.js"></script><script>{PLACEHOLDER}Run()</script>'),
            (f"{PLACEHOLDER}.js", f"function {PLACEHOLDER}Run() {{}}"),
        ):
            found = study.file(attempt, path)
            assert found is not None
            assert found[1].read_text() == content


def test_short_names_are_only_found_as_words() -> None:
    assert Names(["sft"]).scrub("sft, SFT-2, shifts, softer, sfts") == (
        f"{PLACEHOLDER}, {PLACEHOLDER}-2, shifts, softer, sfts",
        2,
    )
    assert Names(["amber"]).scrub("chamber") == (f"ch{PLACEHOLDER}", 1)
    assert Names([]).scrub("anything") == ("anything", 0)


def test_the_seal_is_closed_to_others_and_cannot_be_exchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 4), tmp_path / "study")
    for name in ("sealed.json", "raters.json"):
        assert stat.S_IMODE((study.folder / name).stat().st_mode) == 0o600
    sealed = json.loads((study.folder / "sealed.json").read_text())
    assert set(sealed["attempts"].values()) == {"quokka", "wombat"}
    assert sorted(sealed["items"].values()) == [f"item-{number:03d}" for number in range(4)]
    sealed["attempts"] = dict.fromkeys(sealed["attempts"], "quokka")
    (study.folder / "sealed.json").write_text(json.dumps(sealed))
    assert main(["human-eval", "report", "--study", str(study.folder), "--unseal", "true"]) == 1
    assert "expected the file that was made with the study, got another" in capsys.readouterr().err


def test_tokens_cannot_be_guessed(tmp_path: Path) -> None:
    sides = write_sides(tmp_path, ["quokka", "wombat"], 4)
    tokens = [
        token
        for number in range(3)
        for token in prepare(sides, tmp_path / f"study{number}", "--raters", "4").raters.values()
    ]
    assert len(set(tokens)) == 12
    assert all(len(token) == 32 for token in tokens)  # 192 bits
    assert len({token[at] for token in tokens for at in range(32)}) > 50


# ---- from any harness ------------------------------------------------------------------------------------------------


def write_evaluation(folder: Path, checkpoint: str, answer: str) -> None:
    works, attempts = Works(folder / "works"), []
    for task in ("task-a", "task-b"):
        for seed in (0, 1):
            rollout = Rollout(task, "software", "copies", 1, 0, seed, duration_s=1.0, reward=Reward(1.0))
            rollout.messages = [
                Message("system", "You act."),
                Message("user", f"Solve {task}."),
                Message("assistant", "", "First a look.", (ToolCall("0", "bash", {"command": "ls"}),)),
                Message("tool", "a", tool_call_id="0"),
                Message("assistant", f"{answer} {seed}"),
            ]
            rollout.turns = [Turn(4, 9, "stop"), Turn(12, 14, "stop")]
            name = works.name((checkpoint, task, seed))
            works.keep_rollout(name, rollout)
            with tarfile.open(folder / "works" / f"{name}.tar.gz", "w:gz") as archive:
                entry = tarfile.TarInfo("src/new.py")
                entry.size = 6
                archive.addfile(entry, io.BytesIO(b"x = 1\n"))
            attempts.append(
                Attempt(checkpoint, "w", task, "t", "software", "copies", "opencode-1", seed, 1.0, kept=name)
            )
    append_attempts(folder / "attempts.jsonl", attempts)


def test_attempts_of_our_own_evaluations_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(tmp_path / "eval", "stage-one", "First.")
    write_evaluation(tmp_path / "eval", "stage-two", "Second.")
    sides = [f"quokka={tmp_path / 'eval'}:stage-one", f"wombat={tmp_path / 'eval'}:stage-two"]
    study = prepare(sides, tmp_path / "study", "--functionality.copies", "code_editing", "--attention_items", "0")
    assert {one.functionality for one in study.comparisons.values()} == {"code_editing"}
    assert "Solve task-a" in "".join(study.instructions.values())
    pages = [study.page(one) for one in study.unseal().attempts]
    assert sorted(page["answer"] for page in pages) == ["<p>First. 0</p>\n"] * 2 + ["<p>Second. 0</p>\n"] * 2
    assert all(list(page["files"]) == ["src/new.py"] for page in pages)
    calls = [message["calls"] for message in pages[0]["transcript"]]
    assert calls == [[], [], [["bash", "command: ls"]], [], []]
    assert main(["human-eval", "prepare", *sides, "--output_dir", str(tmp_path / "other")]) == 1
    assert "--functionality.copies" in capsys.readouterr().err
    sides[0] = f"wombat={tmp_path / 'eval'}"
    assert main(["human-eval", "prepare", *sides, "--output_dir", str(tmp_path / "other")]) == 1
    assert "stage-one, stage-two" in capsys.readouterr().err


def test_changes_to_the_files_of_a_task_are_shown(tmp_path: Path) -> None:
    source = TaskSource(
        name="owner__repo-1", environment="terminal", family="repair", instruction="Change it.",
        files={"a.py": "one\ntwo\n"}, tests={"test.sh": ""}, solve_script="", steps=(("bash", {"command": ""}),),
        max_turns=3, git=True,
    )  # fmt: skip
    task = load_task(write_task(source, tmp_path / "tasks"))
    for model, text in (("quokka", "one\nthree\n"), ("wombat", "two\n")):
        rollout = Rollout(task.id, "terminal", "repair", 1, 0, 0, reward=Reward(1.0))
        rollout.messages = [Message("user", "In other words: change it."), Message("assistant", f"Done by {model}.")]
        works, work = Works(tmp_path / model / "works"), tmp_path / f"work-{model}"
        work.mkdir()
        (work / "a.py").write_text(text)
        works.keep_work("kept", task, work)
        works.keep_rollout("kept", rollout)
        attempt = Attempt("rl", "w", task.id, "t", "terminal", "repair", "opencode-1", 0, 1.0, kept="kept")
        append_attempts(tmp_path / model / "attempts.jsonl", [attempt])
    sides = [f"{model}={tmp_path / model}" for model in ("quokka", "wombat")]
    more = [
        "--task_sets",
        f"[{tmp_path / 'tasks'}]",
        "--functionality",
        '{"*": "code_editing"}',
        "--attention_items",
        "0",
    ]
    study = prepare(sides, tmp_path / "study", *more)
    assert list(study.instructions.values()) == ["<p>Change it.</p>\n"]
    diffs = [study.page(one)["diff"] for one in study.lengths]
    changed = [[line for kind, line in diff[0]["lines"] if kind in ("added", "removed")] for diff in diffs]
    assert changed == [["-two", "+three"], ["-one"]]
    assert {diff[0]["title"] for diff in diffs} == {"a.py"}


def test_a_checkpoint_with_an_ordinary_name_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """``base`` is a word of the pages; names of sides can be chosen, those of checkpoints are what they are."""
    for name, answer in (("base", "I am base."), ("stage-two", "I am stage-two.")):
        write_evaluation(tmp_path / "eval", name, answer)
    sides = [f"quokka={tmp_path / 'eval'}:base", f"wombat={tmp_path / 'eval'}:stage-two"]
    study = prepare(sides, tmp_path / "study", "--functionality.copies", "code_editing", "--attention_items", "0")
    assert "stage-two" not in public_text(study.folder)


def test_a_session_that_the_real_opencode_exported_is_read() -> None:
    """``fixtures/human_evaluation/session.json`` is what OpenCode 1.18.33 exported."""
    session = json.loads((FIXTURES / "session.json").read_text())
    messages = opencode_messages(session, FIXTURES)
    assert [one.role for one in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1].tool_calls[0].name == "write"
    assert messages[-1].content.strip()


def test_messages_in_openais_format_are_read(tmp_path: Path) -> None:
    transcript = [
        {"role": "user", "content": [{"type": "text", "text": "Do it."}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "a"},
        {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    write_attempt(tmp_path / "a" / "one", "code_editing", "", attempt={"transcript": transcript, "instruction": None})
    one = read_side(tmp_path / "a", "", {}, {})["one"]
    assert (one.asked, one.answer) == ("Do it.", "Done.")
    assert (one.transcript[1].tool_calls[0].name, one.transcript[1].tool_calls[0].arguments) == (
        "bash",
        '{"command": "ls"}',
    )


# ---- what a stranger wrote -------------------------------------------------------------------------------------------


def test_links_special_and_huge_files_are_left_out_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "one"
    write_attempt(folder, "code_editing", "Done.", files={"ok.txt": "fine", "deep/er.txt": "fine"})
    (folder / "files" / "passwords").symlink_to("/etc/passwd")
    (folder / "files" / "etc").symlink_to("/etc")
    with (folder / "files" / "huge.txt").open("wb") as file:
        file.truncate(1 << 32)
    os.mkfifo(folder / "files" / "pipe")
    one = read_side(tmp_path / "a", "", {}, {})["one"]
    assert set(one.files) == {"ok.txt", "deep/er.txt"}
    assert sorted(name.split(":")[0] for name in one.left_out) == ["etc", "huge.txt", "passwords", "pipe"]


def test_texts_are_shown_as_they_are_and_not_obeyed() -> None:
    assert plain("\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07") == "red link"
    assert plain("10%\r50%\r100%\r\nok\x07") == "100%\nok‹U+0007›"
    assert plain("if (\u202eadmin\u202c)") == "if (‹U+202E›admin‹U+202C›)"
    assert plain("\x1b]0;never ended\nnext line").endswith("next line")
    rendered = make_markdown("<script>alert(1)</script> [x](javascript:alert(1)) ![y](http://evil/z.png)", Names([]))
    assert "<script" not in rendered
    assert "<a" not in rendered
    assert "<img" not in rendered


def test_a_diff_is_told_by_file() -> None:
    diff = (
        "diff --git a/a.py b/a.py\nindex 1..2 100644\n--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n same\n---gone\n+new\n"
        "diff --git a/b.bin b/b.bin\nGIT binary patch\nliteral 5\nzcmZQ\n\n"
        "diff --git a/c b/c\nnew file mode 100644\n--- /dev/null\n+++ b/c\n@@ -0,0 +1 @@\n+c\n"
    )
    assert diff_files(diff) == [
        {"title": "a.py", "lines": [("hunk", "@@ -1,2 +1,2 @@"), ("context", " same"), ("removed", "---gone"),
                                    ("added", "+new")]},
        {"title": "b.bin", "lines": [("hunk", "a binary file")]},
        {"title": "c", "lines": [("hunk", "@@ -0,0 +1 @@"), ("added", "+c")]},
    ]  # fmt: skip
    plain_diff = "--- a/x\t2026-01-01\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"
    assert [one["title"] for one in diff_files(plain_diff)] == ["x"]
    assert diff_files("") == []


def test_pictures_are_made_again_or_left_out(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (6_000, 6_000)).save(bomb, "PNG")
    files = {"plot.png": picture(Author="someone"), "bomb.png": bomb.getvalue(), "torn.jpg": b"\xff\xd8\xff"}
    for model in ("quokka", "wombat"):
        for item in ("one", "two"):
            write_attempt(tmp_path / model / item, "data_visualization", item, files=files)
    study = prepare([f"{model}={tmp_path / model}" for model in ("quokka", "wombat")], tmp_path / "study")
    for attempt in study.lengths:
        page = study.page(attempt)
        assert list(page["files"]) == ["plot.png"]
        found = study.file(attempt, "plot.png")
        assert found is not None
        with Image.open(found[1]) as image:
            assert (image.size, image.getpixel((0, 0)), image.info) == ((8, 8), (255, 0, 0), {})
        assert sum("left out" in (row["text"] or "") for row in page["tree"]["files"]) == 2


# ---- mistakes --------------------------------------------------------------------------------------------------------

Edit = Callable[[Path], list[str]]


def _write(folder: Path, text: str) -> list[str]:
    (folder / "wombat" / "item-000" / "attempt.json").write_text(text)
    return []


def _both(folder: Path) -> list[str]:
    (folder / "wombat" / "item-000" / "session.json").write_text('{"messages": []}')
    return []


def _sides(**places: str) -> Edit:
    return lambda folder: [f"{name}={folder / place}" for name, place in places.items()]


def _text(text: str) -> Edit:
    return lambda folder: _write(folder, text)


FORMAT = '{"format": 1, "functionality": '
MISTAKES: dict[str, tuple[Edit, str]] = {
    "one side": (_sides(quokka="quokka"), "sides: expected NAME=FOLDER of two models"),
    "the same name": (lambda folder: [f"quokka={folder / 'quokka'}"] * 2, "names that differ"),
    "no name": (lambda folder: [str(folder / "quokka"), str(folder / "wombat")], "expected NAME=FOLDER, got"),
    "a short name": (_sides(a="quokka", b="wombat"), "3 characters or more, got 'a'"),
    "a word of the pages": (_sides(step="quokka", wombat="wombat"), "no words of the pages"),
    "no folder": (_sides(quokka="no", wombat="wombat"), "does not exist"),
    "an empty folder": (_sides(quokka=".", wombat="wombat"), "sides: expected ITEM/attempt.json"),
    "a checkpoint of none": (_sides(quokka="quokka:x", wombat="wombat"), "as a checkpoint is named"),
    "no JSON": (_text("{"), "expected JSON"),
    "an unknown key": (_text(FORMAT + '"code_editing", "instructions": ""}'), "instructions"),
    "a functionality": (_text(FORMAT + '"poetry"}'), "functionality"),
    "another format": (_text('{"format": 2, "functionality": "code_editing"}'), "format"),
    "no instruction": (_text(FORMAT + '"code_explanation"}'), "instruction: expected it"),
    "another instruction": (
        _text(FORMAT + '"code_explanation", "instruction": "Other."}'),
        "item-000: expected the same instruction",
    ),
    "a transcript and a session": (_both, "got both"),
    "one rater": (lambda _: ["--raters", "1"], "raters: expected 2 or more"),
    "a rubric of nothing": (lambda _: ["--rubrics", '{"code_editing": []}'], "rubrics: expected"),
    "a rubric of something else": (lambda _: ["--rubrics", '{"poetry": ["It rhymes."]}'], "rubrics: expected"),
    "a share above 1": (lambda _: ["--double_rated", "2"], "double_rated"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_key(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = write_sides(tmp_path, ["quokka", "wombat"], 3)
    edit, words = MISTAKES[mistake]
    more = edit(tmp_path)
    arguments = more if more and not more[0].startswith("--") else [*sides, *more]
    try:
        code = main(["human-eval", "prepare", *arguments, "--output_dir", str(tmp_path / "study")])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert words in said
    assert len(said.splitlines()) <= 8
    assert not (tmp_path / "study").exists()


def test_a_study_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = write_sides(tmp_path, ["quokka", "wombat"], 3)
    first = prepare(sides, tmp_path / "study")
    assert main(["human-eval", "prepare", *sides, "--output_dir", str(tmp_path / "study")]) == 1
    assert "--overwrite true" in capsys.readouterr().err
    second = prepare(sides, tmp_path / "study", "--overwrite", "true")
    assert second.raters != first.raters
    assert json.loads((tmp_path / "study.1" / "raters.json").read_text()) == first.raters
