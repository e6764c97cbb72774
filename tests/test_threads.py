"""Idle threads sleep, in every process that imports the package before it loads OpenMP; the user's setting wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def openmp_settings(environment: dict[str, str]) -> dict[str, str]:
    """What the library says that it reads, in a process that imports torch after a part of the package."""
    program = "import north_lightning.types, torch; torch.ones(8) + 1"
    inherited = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.strip().removeprefix("[host] ") for line in done.stderr.splitlines() if " = '" in line)
    return {name: value.strip("'") for name, value in (line.split(" = ", 1) for line in lines)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_openmp_reads_that_threads_wait_passively_unless_the_user_says_otherwise(environment, expected):
    settings = openmp_settings(environment)
    assert {name: settings[name] for name in expected} == expected
