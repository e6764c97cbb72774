"""Files of configuration: YAML whose keys are all different, whose classes can be found, and whose lines are known.

In: the text of a file or of an argument. Out: Python values as jsonargparse reads YAML, or ``ConfigError``. Not here:
which keys there are (``parser``).
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from north_lightning.errors import ConfigError

PACKAGE = Path(__file__).parent
CLASS = re.compile(r"^class ([A-Z]\w*)\((.*?)\):", re.MULTILINE)
NAME = re.compile(r"(?<![\w.])[A-Z]\w+(?![\w.])")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_read: list[tuple[str, yaml.Node]] = []  # files and texts of this command, with their trees


def load_yaml(text: str, file: str = "", load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """``load(text)``; the package's classes named in it are imported first, so that their short names are known.

    Raises:
        ConfigError: ``file`` is not YAML, or a key is given twice in one block (YAML would take the last one silently),
            or stands beside ``class_path`` where only ``init_args`` may.
        yaml.YAMLError: ``text``, of no file, is not YAML.
    """
    try:
        tree = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        if not file:
            raise
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {_explain(error, text)}") from error
    if file and tree is None:
        raise ConfigError(f"{file}: is empty: expected keys; those of fit are the sections model, data and trainer")
    if isinstance(tree, yaml.CollectionNode):
        _check_blocks(tree, file)
        _read.append((file, tree))
    for word in set(NAME.findall(text)) & classes().keys():
        with suppress(ImportError):  # of an extra that is not installed: as if the name were unknown
            importlib.import_module(classes()[word][0])
    return load(text)


@functools.cache
def classes() -> dict[str, tuple[str, str]]:
    """Every public class of the package that is derived from another: its name -> its module and its bases."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        module = ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for name, bases in CLASS.findall(file.read_text(encoding="utf-8")):
            found[name] = (module, bases)
    return found


def set_in_file(*keys: str) -> Any:
    """The value of the last of ``keys``, or the keys there, in the last file that was read; None where it is not."""
    node: Any = next((tree for file, tree in reversed(_read) if file), None)
    for key in keys:
        items = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((value for name, value in items if name.value == key), None)
    is_block = isinstance(node, yaml.MappingNode)
    return [name.value for name, _ in node.value] if is_block else getattr(node, "value", None)


def place_of(key: str) -> str | None:
    """``file:line`` where a key such as ``model.loss.clip`` is set in what was read; its end suffices if no other key
    there is called that."""
    parts = key.split(".")
    for file, tree in reversed(_read):
        nodes = [node for node in [_find(tree, parts)] if node] or list(_find_all(tree, parts[-1]))
        if file and len(nodes) == 1:
            return f"{file}:{nodes[0].start_mark.line + 1}"
    return place_of(".".join(parts[:-1])) if len(parts) > 1 else None


def _find(node: yaml.Node, parts: list[str]) -> yaml.Node | None:
    """The node of the last key; ``init_args`` and items of lists are entered though no key names them."""
    if isinstance(node, yaml.SequenceNode):
        return next((found for item in node.value if (found := _find(item, parts)) is not None), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    blocks = {key.value: (key, value) for key, value in node.value}
    if parts[0] in blocks:
        key, value = blocks[parts[0]]
        return key if len(parts) == 1 else _find(value, parts[1:])
    return _find(blocks["init_args"][1], parts) if "init_args" in blocks else None


def _find_all(node: yaml.Node, name: str) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (key for key, _ in node.value if key.value == name)
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            yield from _find_all(item[1] if isinstance(item, tuple) else item, name)


def _check_blocks(node: yaml.Node, file: str) -> None:
    waiting, seen = [node], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue  # an alias of what was looked at
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in first and key.value != "<<":
                    raise ConfigError(
                        f"{file or 'the argument'}:{line}: {key.value} is given twice, in lines {first[key.value]} and "
                        f"{line} of one block; only the last would count: delete one"
                    )
                first[key.value] = line
                waiting.append(value)
            if "class_path" in first and (beside := first.keys() - {"class_path", "init_args", "dict_kwargs"}):
                key = min(beside)
                raise ConfigError(
                    f"{file or 'the argument'}:{first[key]}: {key} stands beside class_path: move it under init_args"
                )
        else:
            waiting += node.value


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    if mark is not None and "\t" in text.splitlines()[mark.line][: mark.column + 1]:
        return "a tab, where YAML takes spaces only: indent with spaces"
    return f"{error.problem}; check indentation, colons and quotes in this line and the one before"
