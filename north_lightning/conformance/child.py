"""Runs checks on one plug-in, in a process that may die of it.

Arguments: a file descriptor to answer on, and the request as JSON (file, class name, constructor's arguments, number of
the first check). Out: a JSON line once the plug-in is loaded, with the names of all checks, and one per check: what is
wrong, or null. Whatever the plug-in prints goes where the parent's output goes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from north_lightning.interfaces import PolicyLoss, RewardVerifier, RolloutQueue
from north_lightning.parser import ExplainingParser

KINDS = {
    RewardVerifier: "north_lightning.conformance.rewards",
    PolicyLoss: "north_lightning.conformance.losses",
    RolloutQueue: "north_lightning.conformance.queues",
}


class Broken(Exception):
    """A promise is broken; the text says which, what was expected and what came."""


def main() -> None:
    channel, request = int(sys.argv[1]), json.loads(sys.argv[2])

    def answer(**content: Any) -> None:
        os.write(channel, (json.dumps(content) + "\n").encode())

    try:
        plugin_class = find_class(Path(request["file"]), request["class_name"])
        module = importlib.import_module(next(KINDS[kind] for kind in KINDS if issubclass(plugin_class, kind)))
        make = builder(plugin_class, request["init_args"])
        make()
    except (Exception, SystemExit) as error:
        answer(problem=_words(error))
        return
    checks: dict[str, Callable[[Callable[[], Any]], None]] = module.CHECKS
    answer(problem=None, checks=list(checks))
    for check in list(checks.values())[request["first"] :]:
        try:
            check(make)
        except (Exception, SystemExit) as error:
            answer(problem=_words(error))
        else:
            answer(problem=None)


def find_class(file: Path, name: str | None) -> type:
    """The plug-in class that ``file`` defines; imported under the file's name, so that it can be pickled."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise Broken("expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    found = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == file.stem and issubclass(value, tuple(KINDS))
    }
    if name is not None:
        found = {key: value for key, value in found.items() if key == name}
    if len(found) != 1:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        wanted = f"a class {name}" if name is not None else "one class"
        raise Broken(f"expected {wanted} below {kinds}, got {', '.join(found) or 'none'}")
    (plugin_class,) = found.values()
    missing = sorted(getattr(plugin_class, "__abstractmethods__", ()))
    if missing:
        raise Broken(f"{plugin_class.__name__} lacks {', '.join(missing)}")
    return plugin_class


def builder(plugin_class: type, init_args: dict[str, Any]) -> Callable[[], Any]:
    """Makes the plug-in as a config with these ``init_args`` does."""
    kind = next(kind for kind in KINDS if issubclass(plugin_class, kind))
    parser = ExplainingParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "plugin")
    chosen = {"class_path": f"{plugin_class.__module__}.{plugin_class.__name__}", "init_args": init_args}
    config = parser.parse_object({"plugin": chosen})
    return lambda: parser.instantiate(config).plugin


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Broken) else f"raised {type(error).__name__}: {text}"


if __name__ == "__main__":
    from north_lightning.conformance import child

    child.main()  # under its importable name: the checks raise *its* ``Broken``
