"""What raters say, in SQLite: saved at once, and kept whatever kills the server.

In: answers to an assignment. Out: the same, later. The order of the steps is the database's rule too: a preference
refers to saved ratings. Saved ratings stay as they are; a preference may be changed until the seal is opened.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from north_lightning.errors import DataError

Answers = Mapping[str, Mapping[str, int | None]]
"""Attempt -> statement -> 1 to 5, or None for "cannot judge"."""

NOW = "strftime('%Y-%m-%dT%H:%M:%S+00:00', 'now')"
_TABLES = """
CREATE TABLE IF NOT EXISTS ratings (assignment TEXT PRIMARY KEY, answers TEXT NOT NULL, saved_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS preferences (assignment TEXT PRIMARY KEY REFERENCES ratings, preference INTEGER
    CHECK (preference BETWEEN 1 AND 5), comment TEXT NOT NULL, saved_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS drafts (assignment TEXT, step TEXT, answers TEXT NOT NULL, PRIMARY KEY (assignment, step));
CREATE TABLE IF NOT EXISTS unsealed (at TEXT NOT NULL);
"""


class RefusedError(DataError):
    """What a rater asks for is not the next thing to do; the message says what is."""


@dataclass(frozen=True, slots=True)
class Judgment:
    """``preference``: 1, the left attempt is much better, to 5, the right one is; None: cannot judge."""

    answers: Answers
    preference: int | None
    comment: str


class Store:
    """Safe for several threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._changing() as database:
            for statement in _TABLES.split(";"):
                database.execute(statement)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA foreign_keys = ON")
            yield database
        finally:
            database.close()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")  # an exception closes the connection, which rolls back

    def ratings(self, assignment: str) -> Answers | None:
        with self._reading() as database:
            row = database.execute("SELECT answers FROM ratings WHERE assignment = ?", (assignment,)).fetchone()
        return json.loads(row[0]) if row else None

    def judgments(self) -> dict[str, Judgment]:
        """What is complete: assignment -> judgment."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT assignment, answers, preference, comment FROM preferences JOIN ratings USING (assignment) "
                "ORDER BY assignment"
            ).fetchall()
        return {row[0]: Judgment(json.loads(row[1]), row[2], row[3]) for row in rows}

    def rated(self) -> set[str]:
        """Assignments whose first step is saved."""
        with self._reading() as database:
            return {row[0] for row in database.execute("SELECT assignment FROM ratings")}

    def save_ratings(self, assignment: str, answers: Answers) -> None:
        """Saving the same again changes nothing."""
        text = json.dumps(answers, sort_keys=True)
        with self._changing() as database:
            self._check_open(database)
            found = database.execute("SELECT answers FROM ratings WHERE assignment = ?", (assignment,)).fetchone()
            if found and found[0] != text:
                raise RefusedError("These ratings are saved already. They cannot be changed once step 2 is open.")
            if not found:
                database.execute(f"INSERT INTO ratings VALUES (?, ?, {NOW})", (assignment, text))

    def save_preference(self, assignment: str, preference: int | None, comment: str) -> None:
        with self._changing() as database:
            self._check_open(database)
            if not database.execute("SELECT 1 FROM ratings WHERE assignment = ?", (assignment,)).fetchone():
                raise RefusedError("Rate both attempts first (step 1). The preference comes after that.")
            database.execute(
                f"INSERT INTO preferences VALUES (?, ?, ?, {NOW}) ON CONFLICT DO UPDATE SET preference = "
                "excluded.preference, comment = excluded.comment, saved_at = excluded.saved_at",
                (assignment, preference, comment),
            )

    def save_draft(self, assignment: str, step: str, answers: Mapping[str, str]) -> None:
        with self._changing() as database:
            self._check_open(database)
            database.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?)", (assignment, step, json.dumps(answers)))

    def draft(self, assignment: str, step: str) -> dict[str, str]:
        """What a form held when it was last changed."""
        with self._reading() as database:
            found = database.execute("SELECT answers FROM drafts WHERE assignment = ? AND step = ?", (assignment, step))
            row = found.fetchone()
        return json.loads(row[0]) if row else {}

    def unseal(self) -> None:
        """From now on nothing can be saved: who knows the models is not blind."""
        with self._changing() as database:
            if not database.execute("SELECT 1 FROM unsealed").fetchone():
                database.execute(f"INSERT INTO unsealed VALUES ({NOW})")

    @property
    def is_unsealed(self) -> bool:
        with self._reading() as database:
            return database.execute("SELECT 1 FROM unsealed").fetchone() is not None

    @staticmethod
    def _check_open(database: sqlite3.Connection) -> None:
        if database.execute("SELECT 1 FROM unsealed").fetchone():
            raise RefusedError("The study is over: nothing can be saved any more.")
