"""The official graders of LiveCodeBench and SciCode, beside ours: ``python -m tests.tasks.official_code`` records their
verdicts again. They come from PyPI (nvidia-livecodebench and nvidia-scicode carry them) and are never installed."""

import base64
import json
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

from tests.tasks.answer_rows import answers, random_answers
from tests.tasks.scicode_rows import DEPENDENCIES, steps

HERE = Path(__file__).parent
PINNED = {"livecodebench": "nvidia-livecodebench==26.3", "scicode": "nvidia-scicode==26.3"}


def unpacked(name: str, folder: Path) -> Path:
    """The package's files, downloaded to ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, PINNED[name]], check=True)
    (wheel,) = folder.glob(f"nvidia_{name}-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / name)
    return folder / name


def live_code_bench_verdicts(rows: list[dict[str, Any]], folder: Path) -> list[bool]:
    package = unpacked("livecodebench", folder)
    said = subprocess.run(
        [sys.executable, str(HERE / "official_live_code_bench.py"), str(package)],
        input="".join(json.dumps(row) + "\n" for row in rows),
        cwd=folder, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return [json.loads(line) for line in said.stdout.splitlines()]


def scicode_verdicts(found: list[dict[str, Any]], folder: Path) -> list[bool]:
    """Also writes ``steps.json`` and, by the official code, ``test_data.h5`` in ``folder``."""
    package = unpacked("scicode", folder)
    (folder / "steps.json").write_text(json.dumps({"steps": found, "dependencies": DEPENDENCIES}))
    command = [sys.executable, str(HERE / "official_scicode.py"), str(package), str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return list(json.loads((folder / "verdicts.json").read_text()))


def record(folder: Path) -> None:
    rows = answers() + random_answers(100, 0)
    verdicts = live_code_bench_verdicts(rows, folder)
    recorded = [json.dumps(row | {"official": one}) for row, one in zip(rows, verdicts, strict=True)]
    (HERE / "live_code_bench_verdicts.json").write_text("[\n" + ",\n".join(recorded) + "\n]\n")
    verdicts = scicode_verdicts(steps(120, 0), folder)
    data = base64.b64encode(zlib.compress((folder / "test_data.h5").read_bytes(), 9)).decode()
    (HERE / "scicode_verdicts.json").write_text(json.dumps({"official": verdicts, "test_data": data}) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        record(Path(made))
