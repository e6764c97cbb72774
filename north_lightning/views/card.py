"""``python -m north_lightning card``: a release's model card, from the files of the run that made it.

In: a folder that ``export`` has written, the run's folder with its ``report.json`` and its stages' configs, and what no
file knows: name, license, use and limits. Out, in the release: ``README.md`` with the head that the Hugging Face hub
reads, its figures, and ``.eval_results/results.yaml`` where the data set is named. It ends with the digest of each file
that it was made from; the same files give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from safetensors import safe_open

from north_lightning.durable import replace_bytes, replace_text
from north_lightning.errors import ConfigError, DataError
from north_lightning.evaluation.attempts import ATTEMPTS, read_attempts
from north_lightning.evaluation.interchange import hub_results, latest
from north_lightning.views.charts import drawn
from north_lightning.views.figures import FORMATS, draw_figures
from north_lightning.views.report import RL_STAGE, SFT_STAGES, heldout_caption, markdown_table


def write_card(
    release: Path,
    run_dir: Path,
    name: str,
    license: str,
    intended_use: str,
    limits: list[str] | None = None,
    checkpoint: str = "rl",
    dataset: str | None = None,
) -> None:
    """Write the model card of a release. What it says of the model, its training and its results is read from files.

    Args:
        release: The folder that `export` has written, and that the card goes into.
        run_dir: The folder of the recipe run that made it, where `report` has written report.json.
        name: The model's name.
        license: The license of the weights, as the Hugging Face hub spells it, such as apache-2.0.
        intended_use: What the model is for.
        limits: What it is not for, or does badly; sentences. What the evaluation itself says is added.
        checkpoint: Which checkpoint of the evaluation was released.
        dataset: The data set on the hub, owner/name, for the results file; without it none is written.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ConfigError(f"license: expected an identifier of the hub, such as apache-2.0, got {license!r}")
    read: dict[Path, bytes] = {}

    def text_of(path: Path, command: str) -> str:
        if not path.is_file():
            raise DataError(f"{path}: not found; `python -m north_lightning {command}` writes it")
        read[path] = path.read_bytes()
        return read[path].decode()

    config = json.loads(text_of(release / "config.json", "export"))
    released = json.loads(text_of(release / "release.json", "export"))
    report = json.loads(text_of(run_dir / "report.json", "report"))
    if checkpoint not in report["heldout"]:
        raise ConfigError(f"checkpoint: expected one of {', '.join(report['heldout'])}, got {checkpoint!r}")
    stages = []
    for stage in (*SFT_STAGES, RL_STAGE):
        settings = yaml.safe_load(text_of(run_dir / stage / "config.yaml", "fit"))
        ended = json.loads(text_of(run_dir / stage / "summary.json", "fit"))
        stages.append({"name": stage, **ended, **_describe(settings)})
    figures = {}
    for title, figure in draw_figures(run_dir):
        if not isinstance(figure, str):
            figures[title] = f"figures/{title}.png"
            for form in FORMATS:
                replace_bytes(release / "figures" / f"{title}.{form}", drawn(figure, form))
    if dataset is not None:
        path = run_dir / "eval" / ATTEMPTS
        own = [one for one in latest(read_attempts(path)) if one.checkpoint == checkpoint]
        date = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        rows = yaml.safe_dump(hub_results(own, "held-out tasks", dataset, date), sort_keys=False)
        replace_text(release / ".eval_results" / "results.yaml", rows)
    environment = Environment(
        loader=PackageLoader("north_lightning.views"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    card = environment.get_template("card.md.jinja").render(
        head=yaml.safe_dump(_head(license, dataset), sort_keys=False),
        name=name,
        intended_use=intended_use,
        limits=[*(limits or []), *_limits(report, checkpoint)],
        config=config,
        release=released,
        num_parameters=_num_parameters(release),
        stages=stages,
        table=markdown_table(report["heldout"]),
        caption=heldout_caption(report["heldout"]),
        gain=report["paired_gain"] if checkpoint == RL_STAGE else None,
        figures=figures,
        sources={_short(path, release, run_dir): sha256(content).hexdigest() for path, content in read.items()},
    )
    replace_text(release / "README.md", card.rstrip() + "\n")
    Console(highlight=False, soft_wrap=True).print(f"{release / 'README.md'}: the card, of {len(read)} files")


def _num_parameters(release: Path) -> int:
    """Without the scales of quantized weights."""
    total = 0
    for file in release.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys() if not key.endswith("_scale")]  # noqa: SIM118
        total += sum(map(prod, shapes))
    return total


def _head(license: str, dataset: str | None) -> dict[str, Any]:
    head: dict[str, Any] = {"license": license, "library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["agentic-coding", "mixture-of-experts", "north_lightning"]
    return head | ({"datasets": [dataset]} if dataset else {})


def _describe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's config says of its training, in words."""
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    row = {"learning_rate": model["optimizer"]["init_args"]["lr"], "start": _start(model["checkpoint"])}
    if "sources" in data:
        shares = {name: source["share"] for name, source in data["sources"].items()}
        return row | {"loss": "cross entropy", "rows": f"rows of {data['row_tokens']:,} tokens", "mix": _mix(shares)}
    rollouts = _named(settings, "RolloutProducerCallback")
    pushed = _named(settings, "WeightSyncCallback")["every_n_steps"]
    groups = data["groups_per_batch"] or data["queue"]["init_args"]["groups_per_batch"]
    return row | {
        "loss": model["loss"]["class_path"].rpartition(".")[2],
        "rows": f"{groups} groups of {rollouts['group_size']} attempts; weights pushed every {pushed} steps",
        "mix": _mix(rollouts["environment_weights"] or {}),
    }


def _start(checkpoint: str | None) -> str:
    """What a stage began from: an earlier stage of the run, by its name, or a folder of weights."""
    if checkpoint is None:
        return "random weights"
    place = Path(checkpoint)
    return place.parent.name if place.parent.name in SFT_STAGES else place.name


def _named(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    callbacks = settings["trainer"]["callbacks"]
    return next(one["init_args"] for one in callbacks if one["class_path"].rpartition(".")[2] == name)


def _mix(shares: Mapping[str, float]) -> str:
    total = sum(shares.values())
    return ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items()) or "as the tasks come"


def _limits(report: Mapping[str, Any], checkpoint: str) -> Iterator[str]:
    """What the evaluation does not say."""
    side = report["heldout"][checkpoint]
    yield (
        f"It was evaluated on {side['num_tasks']} held-out tasks in {side['num_clusters']} repositories or "
        "tasks of their own; the intervals are about such tasks, and say nothing about others."
    )
    if side["num_runs"] == 1:
        yield "One training run was evaluated: the intervals are about this checkpoint, not about its recipe."
    rates = report[checkpoint].get("by_family", {})
    if unsolved := [family for family, rate in sorted(rates.items()) if rate < 0.5]:
        yield f"It solves fewer than half of the attempts at tasks of these kinds: {', '.join(unsolved)}."
    low, high = side["false_success_rate"]["ci95"]
    value = side["false_success_rate"]["value"]
    yield f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}] of the attempts that it says are done are not solved."


def _short(path: Path, release: Path, run_dir: Path) -> str:
    for root in (release, run_dir):
        if path.is_relative_to(root):
            return f"{root.name}/{path.relative_to(root)}"
    return path.name
