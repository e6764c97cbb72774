"""Verdicts on rows of SWE-bench and SWE-bench Pro against the benchmarks' own."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from north_lightning.tasks.swe_rows import read_row
from north_lightning.verifiers.official import grade_log

SCRIPT = Path(__file__).with_name("official_swe_bench.py")


def disagreements(count: int, seed: int, folder: Path) -> tuple[list[Any], Counter[bool]]:
    """Rows that the package's own harness and the verifier here judge differently, and how often each verdict was."""
    command = [sys.executable, "-X", "utf8", str(SCRIPT), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count
    slots = asyncio.Semaphore(4)

    async def differs(number: int, row: dict[str, Any], official: dict[str, Any]) -> Any:
        async with slots:
            instance = read_row(row)
            written = json.loads(json.dumps(instance.grading))
            logs = folder / str(number) / "logs"
            logs.mkdir(parents=True)
            (logs / "log").write_bytes(base64.b64decode(row["log"]))
            ours = await grade_log(instance.id, written, logs)
            script = official.pop("eval_script").removeprefix("#!/bin/bash\nset -uxo pipefail\n")
            same_script = script.strip() in instance.scripts["eval.sh"]
            same = ours["resolved"] == official["resolved"] and ours["passed"] == official.get("passed", [])
            return None if same and same_script else (row, official, ours)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(differs(i, one["row"], one["official"]) for i, one in enumerate(rows)))

    found = [one for one in asyncio.run(all_of_them()) if one is not None]
    return found, Counter(one["official"]["resolved"] for one in rows)


def test_verdicts_on_rows_of_swe_bench_are_those_of_its_own_harness(tmp_path: Path) -> None:
    found, verdicts = disagreements(57, 1, tmp_path)
    assert found == []
    assert min(verdicts[True], verdicts[False]) >= 10


@pytest.mark.long
def test_verdicts_on_2000_rows_of_swe_bench_are_those_of_its_own_harness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, verdicts = disagreements(2000, 0, tmp_path)
    with capsys.disabled():
        print(f"\n2000 rows, {verdicts[True]} resolved: {len(found)} disagreements")
    assert found == []
    assert min(verdicts[True], verdicts[False]) >= 300
