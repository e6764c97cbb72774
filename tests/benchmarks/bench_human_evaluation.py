"""A whole human evaluation in headless Chromium: 85 items, three raters with planted biases, a server that is killed.

The raters use the keyboard only. They are moved by quality, side and length (log-odds in ``small_studies``). The server
gets SIGKILL three times, in the middle of each rater's work. Measured: judgments kept, names of models in anything that
the browser received before the seal was opened, requests to other hosts, errors on the console, the planted effects
beside their intervals, and seconds from `prepare` to the first saved judgment. Screenshots at 1280 and 390 pixels,
light and dark, are written beside the result.

    python tests/benchmarks/bench_human_evaluation.py [ITEMS]     # 85; runs/bench/human_evaluation.json

It needs chromium, and Playwright (PyPI).
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "human_evaluation"))

from browser import Seen, chromium, rate_by_keyboard  # noqa: E402
from small_studies import KINDS, LEFT, QUALITY, TWICE_AS_LONG, judge, prepare, write_attempt  # noqa: E402
from test_serve import FREE, serving  # noqa: E402

from north_lightning.cli import main  # noqa: E402
from north_lightning.human_evaluation.store import Store  # noqa: E402
from north_lightning.human_evaluation.study import RATINGS, Study  # noqa: E402

STRENGTHS = {"quokka": QUALITY / 2, "wombat": -QUALITY / 2}
PAGE = """<!doctype html><title>{model}</title><style>body {{ font: 16px sans-serif }}</style>
<h1>Counter by {model}</h1>
<button onclick="n.textContent++">count</button> <b id=n>0</b><script>console.log("{model} is ready")</script>"""
PLOT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 200"><rect width="400" height="200" fill="#fff"/>
<text x="10" y="20">{model}</text>{bars}</svg>"""
KIND_NAMES = {kind.split("_")[-1]: kind for kind in KINDS}


def write_items(folder: Path, num_items: int) -> list[str]:
    """Every kind of attempt; the name of its model is in each text, file and name of a file."""
    rng = random.Random(0)
    for number in range(num_items):
        kind = KINDS[number % 4]
        for model in STRENGTHS:
            words = " ".join(["word"] * rng.choice((20, 60, 150, 400)))
            answer = (
                f"## Item {number}\n\nI am **{model}**. `f(x)` is linear:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{words}"
            )
            more: dict[str, Any] = {}
            if kind == "code_editing":
                lines = "".join(f"+    total += {n}  # {model}\n" for n in range(8))
                head = "diff --git a/src/sum.py b/src/sum.py\n--- a/src/sum.py\n+++ b/src/sum.py\n@@ -1,2 +1,9 @@\n"
                more["diff"] = f"{head} def f(x):\n-    pass\n{lines}"
            if kind == "data_visualization":
                bars = "".join(
                    f'<rect x="{40 * n + 20}" y="{190 - 15 * n}" width="30" height="{15 * n}" fill="#2f6f9f"/>'
                    for n in range(9)
                )
                more["files"] = {"plot.svg": PLOT.format(model=model, bars=bars), f"{model}/data.csv": "a,b\n1,2\n"}
            if kind == "implementation_from_scratch":
                more["files"] = {
                    "index.html": PAGE.format(model=model),
                    "src/lib/count.py": "def count():\n    return 1\n",
                }
            steps = [
                {"role": "user", "content": f"Do thing {number}."},
                {"role": "assistant", "content": "", "reasoning": f"{model} thinks", "tool_calls": [
                    {"name": "bash", "arguments": {"command": f"{model} --help"}}]},
                {"role": "tool", "content": f"\x1b[1m{model}\x1b[0m 1.0"},
                {"role": "assistant", "content": answer},
            ]  # fmt: skip
            write_attempt(
                folder / model / f"item-{number:03d}",
                kind,
                answer,
                f"Do thing {number}.",
                attempt={"transcript": steps},
                **more,
            )
    return [f"{model}={folder / model}" for model in STRENGTHS]


def take_screenshots(context: Any, urls: dict[str, str], folder: Path) -> list[str]:
    """Of every page in four looks; the names of those that are wider than the window."""
    too_wide = []
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            page = context.new_page()
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            for name, url in urls.items():
                page.goto(url)
                page.wait_for_timeout(300)
                page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    too_wide.append(f"{name}-{width}-{scheme}")
            page.close()
    return too_wide


def urls_of(study: Study, links: list[str]) -> dict[str, str]:
    """A page of each kind: the first rater has finished one comparison, the second has not begun."""
    kinds = [study.comparison_of(one).functionality for one in study.assignments["rater-2"]]
    steps = {name: f"{links[1]}/{kinds.index(kind) + 1}" for name, kind in KIND_NAMES.items()}
    return {"overview": links[0], "preference": f"{links[0]}/1/preference", **steps}


def run(num_items: int, folder: Path, shots: Path) -> dict[str, Any]:
    sides = write_items(folder, num_items)
    began = time.monotonic()
    study = prepare(sides, folder / "study")
    seal, rng, seen = study.unseal(), random.Random(0), Seen(tuple(STRENGTHS))
    answers: dict[str, Any] = {}

    def said(one: Any) -> Any:
        """The same rater says the same when asked again after a kill."""
        if one.id not in answers:
            answers[one.id] = judge(study, one, seal, STRENGTHS, rng)
        return answers[one.id]

    first_s, kills, ports = 0.0, 0, FREE
    stops = {rater: rng.randrange(2, len(seats)) for rater, seats in study.assignments.items()}
    with chromium() as context:
        seen.watch(context)
        page = context.new_page()
        for at, (rater, stop) in enumerate(stops.items()):
            with serving("--study", str(study.folder), *ports) as (server, links):
                if not at:
                    rate_by_keyboard(page, links[at], study, rater, said, until=1)
                    first_s = time.monotonic() - began
                    too_wide = take_screenshots(context, urls_of(study, links), shots)
                rate_by_keyboard(page, links[at], study, rater, said, until=stop)
                following = study.assignments[rater][stop]
                page.goto(f"{links[at]}/{stop + 1}")
                page.keyboard.press(str(said(following)[0][following.left][study.questions(following)[0]]))
                page.wait_for_load_state("networkidle")  # or the console would tell of what the kill cut off
                page.wait_for_timeout(300)
                server.send_signal(signal.SIGKILL)
                server.wait()
                kills += 1
            page.goto("about:blank")
            with serving("--study", str(study.folder), *ports) as (server, links):
                rate_by_keyboard(page, links[at], study, rater, said)
    kept = {
        name: (judgment.answers, judgment.preference)
        for name, judgment in Store(study.folder / RATINGS).judgments().items()
    }
    for arguments in ([], ["--unseal", "true"]):
        assert main(["human-eval", "report", "--study", str(study.folder), *arguments]) == 0
        if not arguments:
            texts = [path.read_text(errors="replace") for path in (study.folder / "report").iterdir()]
            seen.leaks += ["the sealed report" for text in texts if any(name in text for name in STRENGTHS)]
    report = json.loads((study.folder / "report" / "report.json").read_text())
    for name in ("report.html", "preferences.png", "preferences.svg"):
        shutil.copy(study.folder / "report" / name, shots)
    overall = report["pairs"][0]["overall"]
    planted = {"left": LEFT, "twice_as_long": TWICE_AS_LONG, "wombat instead of quokka": -QUALITY}
    return {
        "items": num_items,
        "raters": 3,
        "judgments": len(kept),
        "judgments_asked": sum(map(len, study.assignments.values())),
        "judgments_as_given": sum(kept.get(name) == tuple(given) for name, given in answers.items()),
        "kills": kills,
        "requests": seen.requests,
        "external_requests": seen.external,
        "console_errors": seen.errors,
        "leaks_before_unsealing": seen.leaks,
        "pages_wider_than_the_window": too_wide,
        "seconds_to_the_first_judgment": round(first_s, 1),
        "win_rate": overall["win_rate"],
        "win_rate_ci95": overall["clustered_ci95"],
        "effects": {
            name: {"planted": value, "found": report["bias"]["effects"][name]["log_odds"],
                   "ci95": report["bias"]["effects"][name]["ci95"]}
            for name, value in planted.items()
        },
        "alpha": report["agreement"]["preference"],
        "raters_left_out": report["raters_left_out"],
    }  # fmt: skip


if __name__ == "__main__":
    if find_spec("playwright") is None:
        sys.exit(print("left out: it needs Playwright (pip install playwright) and chromium"))
    scratch = ROOT / "runs" / "bench" / "human_evaluation"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "shots").mkdir(parents=True)
    result = run(int(sys.argv[1]) if len(sys.argv) > 1 else 85, scratch, scratch / "shots")
    (scratch.parent / "human_evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
