"""No key does nothing: keys of all shipped configs and of everything a config can choose, found by walking types."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import config_keys
import dead_keys
import pytest
import yaml
from lightning.pytorch import Trainer

from north_lightning import cli

CONFIGS = Path(__file__).parents[1] / "configs"

ONLY_REFUSE = {"Sidecar.eos_token_id", "NCCLTransport.trusted_network"}
"""Keys whose whole effect is an error: another checkpoint is refused; an open network is, unless it is trusted."""

OUT_OF_REACH = {
    "north_lightning.rollout.settings:SamplerPool.rest_s",  # how long a server that failed is left alone
}


def short(one: Any, key: str) -> str:
    return f"{one.__qualname__}.{key}"


def every_key() -> Iterator[tuple[Any, Any, str]]:
    """(what a config chooses, the class that declares the key, the key)."""
    for one in config_keys.chosen().values():
        for key, (owner, _) in config_keys.parameters(one).items():
            yield one, owner, key


def test_every_key_changes_something_or_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    keys = list(every_key())
    unread = {short(owner, key) for one, owner, key in keys if not config_keys.is_read(one, owner, key)}
    with capsys.disabled():
        print(f"\n{len(keys)} keys of {len(config_keys.chosen())} classes and commands: "
              f"{len(unread - ONLY_REFUSE)} unexplained, {len(unread & ONLY_REFUSE)} that only refuse")  # fmt: skip
    assert unread == ONLY_REFUSE
    assert len(keys) > 400


def test_everything_that_the_shipped_configs_choose_is_walked(capsys: pytest.CaptureFixture[str]) -> None:
    walked = {(f"{one.__module__}.{one.__qualname__}", key) for one, _, key in every_key()}
    num_keys = num_others = 0
    for path in sorted(CONFIGS.rglob("*.yaml")):
        for at, one, key in keys_of_config(path):
            num_keys += 1
            if config_keys.is_own(one):
                assert (f"{one.__module__}.{one.__qualname__}", key) in walked, f"{path.name}: {at}"
            else:
                num_others += 1
                parameters = inspect.signature(one).parameters.values()
                known = {one.name for one in parameters}
                assert key in known or any(one.kind is one.VAR_KEYWORD for one in parameters), f"{path.name}: {at}"
    with capsys.disabled():
        print(
            f"\n{num_keys} keys in shipped configs: {num_keys - num_others} ours, {num_others} of Lightning and torch"
        )
    assert num_keys > 300


def keys_of_config(path: Path) -> Iterator[tuple[str, Any, str]]:
    config = yaml.safe_load(path.read_text())
    if "trainer" not in config:
        yield from config_keys.leaves(config, command_of(path, config), "")
        return
    assert config.keys() <= {"seed_everything", "num_threads", "resume", "trainer", "model", "data"}
    trainer = config["trainer"]
    for key in ("callbacks", "logger"):
        yield from config_keys.leaves(trainer.get(key) or [], None, f"trainer.{key}")
    yield from config_keys.leaves(trainer.get("strategy"), None, "trainer.strategy")
    yield from config_keys.leaves(trainer, Trainer, "trainer")
    for section in ("model", "data"):
        yield from config_keys.leaves(config[section], None, section)


def command_of(path: Path, config: dict[str, Any]) -> Any:
    """The command whose parameters hold all the keys; the one that its file is named for, of several."""
    functions = {}
    for command, (location, _) in cli.UTILITIES.items():
        module, _, name = location.partition(":")
        function = getattr(importlib.import_module(module), name)
        if config.keys() <= inspect.signature(function).parameters.keys():
            functions[command] = function
    assert functions, f"{path}: no command takes {sorted(config)}"
    named = [one for command, one in functions.items() if command.replace(" ", "_") == path.stem]
    return (named or list(functions.values()))[0]


def is_limit_or_seed(name: str) -> object:
    return name == "seed" or re.search(r"_(s|ms)$", name)


def test_no_limit_and_no_seed_is_out_of_the_reach_of_every_key() -> None:
    assert set(config_keys.hidden_defaults(is_limit_or_seed)) == OUT_OF_REACH


def seeds_of_their_own(chosen: Any) -> list[str]:
    """Parts with a seed that is not the run's where nobody sets it apart; a command's is the run's."""
    found = []
    for one in chosen:
        seed = config_keys.parameters(one).get("seed")
        is_command = not isinstance(one, type)
        if seed is not None and isinstance(seed[1].default, int) and not (is_command and seed[1].default == 0):
            found.append(one.__qualname__)
    return found


def test_every_seed_is_the_runs_unless_it_is_set_apart() -> None:
    chosen = config_keys.chosen().values()
    assert len([one for one in chosen if "seed" in config_keys.parameters(one)]) >= 10
    assert seeds_of_their_own(chosen) == []


def test_every_argument_of_every_function_is_used() -> None:
    key_of_a_cache = ["north_lightning.parallel.process_zero:_group.world"]
    assert config_keys.unused_arguments() == key_of_a_cache


@pytest.mark.parametrize("one", dead_keys.WITH_A_DEAD_KEY, ids=lambda one: one.__name__)
def test_the_walk_finds_a_key_that_does_nothing(one: type) -> None:
    found = [key for key, (owner, _) in config_keys.parameters(one).items() if not config_keys.is_read(one, owner, key)]
    assert found == ["dead"]


def test_the_walk_finds_a_limit_and_a_seed_that_no_key_reaches() -> None:
    """A client's own limit, and seeds with own defaults: what a config said was not what ran."""
    found = config_keys.hidden_defaults(is_limit_or_seed, [dead_keys.__name__])
    assert found == ["dead_keys:Client.timeout_s", "dead_keys:draw.seed"]
    assert seeds_of_their_own([dead_keys.Sampled]) == ["Sampled"]
