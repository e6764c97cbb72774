"""The real server: what the documentation says works, and a killed server has lost nothing."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from small_studies import form_of, prepare, write_sides

from north_lightning.cli import main
from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Study

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "human_evaluation.md"


@contextmanager
def serving(*arguments: str, cwd: Path = ROOT) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server, and the links that it printed."""
    command = [sys.executable, "-m", "north_lightning", "human-eval", "serve", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            links = [line.split(": ")[1].strip() for _, line in zip(range(3), server.stdout, strict=False)]
            assert len(links) == 3
            yield server, links
        finally:
            server.kill()


FREE = ("--port", "0", "--frame_port", "0")


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("python ")]


def test_the_commands_of_the_documentation_lead_to_the_first_rating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    named = commands(DOCS.read_text())
    assert [words[4] for words in named] == ["prepare", "serve", "report", "report"]
    assert main(named[0][3:]) == 0
    with serving(*named[1][5:], *FREE, cwd=tmp_path) as (server, links):
        study = Study(tmp_path / "runs" / "study")
        seats = study.assignments["rater-1"]
        number, one = next(row for row in enumerate(seats, 1) if not study.comparison_of(row[1]).expected)
        answers = {attempt: dict.fromkeys(study.questions(one), 4) for attempt in (one.left, one.right)}
        with httpx.Client() as browser:
            assert "Begin with comparison 1" in browser.get(links[0]).text
            form = form_of(answers, one, study.questions(one))
            assert browser.post(f"{links[0]}/{number}/ratings", data=form).status_code == 303
            assert browser.post(f"{links[0]}/{number}/preference", data={"preference": "5"}).status_code == 303
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 130
    assert [judgment.preference for judgment in Store(study.folder / RATINGS).judgments().values()] == [5]
    for words in named[2:]:
        assert main(words[3:]) == 0
    assert "amber against cobalt" in (study.folder / "report" / "report.html").read_text()


def test_every_flag_that_the_documentation_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"`(--\w+)|(?<= )(--\w+)", DOCS.read_text()))
    known = ""
    for command in ("prepare", "serve", "report"):
        with pytest.raises(SystemExit):
            main(["human-eval", command, "--help"])
        known += capsys.readouterr().out
    named = {flag for pair in flags for flag in pair if flag}
    assert {"--hide", "--url", "--unseal"} <= named
    assert {flag for flag in named if f"{flag} " not in known} == set()


def kills(study: Study, num: int) -> int:
    """Rate while the server is killed and started again; the number of ratings that were answered with "saved"."""
    seats = [(rater, at, one) for rater, rows in study.assignments.items() for at, one in enumerate(rows, 1)]
    saved: dict[str, int] = {}
    per_life = -(-len(seats) // num)
    for life in range(num):
        with serving("--study", str(study.folder), *FREE) as (server, links):
            mine = seats[life * per_life : (life + 1) * per_life]
            for number, (rater, at, one) in enumerate(mine):
                link = links[list(study.assignments).index(rater)]
                answers = {attempt: dict.fromkeys(study.questions(one), 4) for attempt in (one.left, one.right)}
                form = form_of(answers, one, study.questions(one))
                with httpx.Client() as browser:
                    assert browser.post(f"{link}/{at}/ratings", data=form).status_code == 303
                    if number == len(mine) - 1:
                        server.send_signal(signal.SIGKILL)  # right after the answer to step 1
                        server.wait(10)
                        saved[one.id] = 0
                        break
                    preference = 1 + at % 5
                    sent = {"preference": str(preference)}
                    assert browser.post(f"{link}/{at}/preference", data=sent).status_code == 303
                    saved[one.id] = preference
    store = Store(study.folder / RATINGS)
    assert store.rated() == set(saved)
    judged = {name: judgment.preference for name, judgment in store.judgments().items()}
    assert judged == {name: preference for name, preference in saved.items() if preference}
    return len(saved)


def test_a_killed_server_has_lost_no_rating(tmp_path: Path) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 4), tmp_path / "study")
    assert kills(study, 2) == sum(map(len, study.assignments.values()))


@pytest.mark.long
def test_a_server_that_is_killed_again_and_again_has_lost_no_rating(tmp_path: Path) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 85), tmp_path / "study")
    assert kills(study, 20) == sum(map(len, study.assignments.values()))


def test_mistakes_of_serve_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 4), tmp_path / "study").folder
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (["--study", str(study), "--port", port], f"port: expected an address to listen on, got 127.0.0.1:{port}"),
            (["--study", str(study), "--frame_port", port, "--port", "0"], "frame_port: expected an address"),
            (["--study", str(study), "--host", "192.0.2.1"], "host: expected an address"),
            (["--study", str(study), "--host", "0.0.0.0"], "url, frame_url: expected both"),
            (["--study", str(tmp_path)], "`human-eval prepare` makes it"),
        ):
            assert main(["human-eval", "serve", *arguments]) == 1
            assert words in capsys.readouterr().err
