"""Files of samples to token ids, once: in memory, or kept in a folder that all processes and later runs read.

In: files of canonical samples, a tokenizer, filters. Out: a ``TokenisedFile``: its usable samples as tokens, and an
account of the others. Which source a file belongs to and how samples are mixed is for ``sft``.

In a folder, every process of a training run tokenises its part of every file's records and maps the others' parts, so
a restart reads no conversation. An entry is named by all that decides it: the file (path, size, time of change), the
tokenizer, the filters with their settings and their modules, and the code that reads and renders.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TextColumn, TimeElapsedColumn

import north_lightning.chat
from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.data.filters import NUM_EXAMPLES, SampleFilter
from north_lightning.data.records import Shard
from north_lightning.data.sources import SampleReader
from north_lightning.data.store import TokenStore
from north_lightning.errors import ConfigError, DataError
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import Conversation, TokenizedSample

_TOKENS, _ACCOUNT = "tokens.u32", "samples.json"


@dataclass
class Account:
    """What became of a file's records."""

    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # of what was dropped, by reason

    def add(self, other: Account) -> None:
        """Count another file, or another part of this one, too."""
        self.num_read += other.num_read
        self.dropped += other.dropped
        for reason, examples in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *examples][:NUM_EXAMPLES]


@dataclass
class TokenisedFile:
    """The usable samples of a file in the file's order, labelled with their own sources, or of one part of it."""

    store: TokenStore
    account: Account
    records: list[int]  # the record that each sample was, counted in the file


class Tokeniser:
    """Tokenises files with one tokenizer and one list of filters.

    Args:
        tokenizer: directory of the tokenizer.
        reasoning: whether assistant turns begin with thinking.
        row_tokens: longer samples are dropped.
        filters: what drops samples, in order; None for the default ones. With ``cache_dir``, none that remembers
            earlier samples (``Duplicate``): a part of a file must not depend on another.
        cache_dir: where tokens are kept; None keeps them in memory.
    """

    def __init__(
        self,
        tokenizer: Path,
        reasoning: bool,
        row_tokens: int,
        filters: Sequence[ConversationFilter] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.filters = SampleFilter(filters).filters
        remembering = [type(one).__name__ for one in self.filters if one.remembers]
        if cache_dir is not None and remembering:
            raise ConfigError(
                f"cache_dir: expected filters that judge every sample alone, got {remembering}; run `data filter` first"
            )
        self.row_tokens = row_tokens
        self.cache_dir = cache_dir
        self._chat = ChatFormat(NorthTokenizer.load(tokenizer), reasoning)
        self._filters_name = "" if cache_dir is None else _name_of(self.filters)  # before they are used and remember

    def tokenise(self, path: Path, shard: Shard | None = None, quiet: bool = False) -> TokenisedFile:
        """The samples of a file, or of a part of its records; ``DataError`` at the first that is no sample."""
        shard = shard or Shard()
        reader, fit = SampleReader([path], shard=shard), SampleFilter(self.filters)
        result = TokenisedFile(TokenStore(), Account(), [])
        columns = TextColumn("{task.description}: {task.completed:.0f} samples"), TimeElapsedColumn()
        with Progress(*columns, disable=quiet) as progress:
            for index, conversation in enumerate(progress.track(reader, description=f"Tokenising {Path(path).name}")):
                sample = self._encode(conversation, fit) if fit.passes(conversation) else None
                if sample is not None:
                    result.store.add(sample, conversation.harness)
                    result.records.append(index * shard.count + shard.index)
        result.account = Account(reader.num_read, fit.dropped, fit.examples)
        return result

    def read(self, path: Path, quiet: bool = False) -> TokenisedFile:
        """The samples of a file: from ``cache_dir`` if there is one, else tokenised now."""
        if self.cache_dir is None:
            return self.tokenise(path, quiet=quiet)
        parts = _complete(self._entry(path))
        if parts is None:
            raise DataError(
                f"{path}: expected its tokens in {self.cache_dir}, found not all; either another process failed, or "
                "the processes do not share the folder"
            )
        return _join([_load(part) for part in parts])

    def fill_cache(self, paths: Sequence[Path], rank: int = 0, world_size: int = 1) -> None:
        """Tokenise this process's part of all files that are not in ``cache_dir`` yet; ``read`` needs all parts."""
        if self.cache_dir is None:
            return
        for path in dict.fromkeys(paths):
            entry = self._entry(path)
            part = entry / f"{rank}-of-{world_size}"
            if _complete(entry) is None and not part.exists():
                _save(self.tokenise(path, Shard(rank, world_size), quiet=rank != 0), part)

    def _encode(self, conversation: Conversation, fit: SampleFilter) -> TokenizedSample | None:
        try:
            sample = self._chat.encode_conversation(conversation.messages, conversation.tools, conversation.source)
        except DataError as error:
            fit.count(conversation, "not_renderable", str(error))
            return None
        if len(sample.token_ids) > self.row_tokens:
            fit.count(conversation, "too_long", f"{len(sample.token_ids)} tokens, a row has {self.row_tokens}")
        elif not any(sample.loss_mask):
            fit.count(conversation, "nothing_to_train", "no trainable token")
        else:
            assert not sample.loss_mask[0], "a conversation begins with a control token that nothing predicts"
            return sample
        return None

    def _entry(self, path: Path) -> Path:
        """The folder of a file's tokens."""
        assert self.cache_dir is not None
        try:
            found = Path(path).stat()
        except OSError as error:
            raise DataError(f"{path}: expected a file of conversations, got: {error.strerror}") from error
        facts = [str(Path(path).resolve()), found.st_size, found.st_mtime_ns, self._chat.tokenizer.fingerprint]
        facts += [self._chat.reasoning, self.row_tokens, self._filters_name, _own_code()]
        return Path(self.cache_dir) / f"{Path(path).stem}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"


def _join(parts: Sequence[TokenisedFile]) -> TokenisedFile:
    """The whole file, in its order."""
    joined = TokenisedFile(TokenStore(), Account(), [])
    places = sorted((record, part, index) for part, one in enumerate(parts) for index, record in enumerate(one.records))
    for record, part, index in places:
        joined.store.take(parts[part].store, index)
        joined.records.append(record)
    for one in parts:
        joined.account.add(one.account)
    return joined


def _complete(entry: Path) -> list[Path] | None:
    """The parts of a file that are all there."""
    counts = {int(part.name.rpartition("-")[2]) for part in entry.glob("[0-9]*-of-*")}
    for count in sorted(counts):
        parts = [entry / f"{index}-of-{count}" for index in range(count)]
        if all(part.exists() for part in parts):
            return parts
    return None


def _save(file: TokenisedFile, part: Path) -> None:
    """The folder appears complete or not at all."""
    part.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{part.name}.", suffix=".partial", dir=part.parent))
    partial.chmod(part.parent.stat().st_mode)
    store = file.store
    samples = {"records": file.records, "lengths": store.lengths.tolist(), "trained": store.trained_tokens.tolist()}
    content = samples | {"sources": store.sources, "harnesses": store.harnesses, "account": vars(file.account)}
    store.write_tokens(partial / _TOKENS)
    (partial / _ACCOUNT).write_text(json.dumps(content), encoding="utf-8")
    try:
        partial.rename(part)
    except OSError:  # another run was faster
        shutil.rmtree(partial)
        if not part.exists():
            raise


def _load(part: Path) -> TokenisedFile:
    try:
        content: dict[str, Any] = json.loads((part / _ACCOUNT).read_text(encoding="utf-8"))
        size = (part / _TOKENS).stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{part}: expected tokens of samples, got: {error}; delete it to make it anew") from error
    if size != (expected := np.dtype(np.uint32).itemsize * sum(content["lengths"])):
        raise DataError(f"{part / _TOKENS}: expected {expected} bytes, got {size}; delete {part} to make it anew")
    account = content["account"]
    store = TokenStore.map_tokens(
        part / _TOKENS, content["lengths"], content["trained"], content["sources"], content["harnesses"]
    )
    counted = Account(account["num_read"], Counter(account["dropped"]), account["examples"])
    return TokenisedFile(store, counted, content["records"])


def _name_of(filters: Sequence[ConversationFilter]) -> str:
    """Names what filters find: the modules of their classes and base classes, and how they are set."""
    digest = hashlib.sha256()
    for one in filters:
        kind = type(one)
        derived = {
            name for base in kind.__mro__ for name, what in vars(base).items() if isinstance(what, cached_property)
        }
        settings = {name: value for name, value in vars(one).items() if name not in derived}
        try:
            facts = [kind.__module__, kind.__qualname__, *map(_code_of, kind.__mro__), _described(settings)]
        except Exception as error:  # pickle raises anything
            raise ConfigError(
                f"cache_dir: expected filters whose settings can be compared, got {kind.__name__}: {error}"
            ) from error
        digest.update(repr(facts).encode(errors="backslashreplace"))
    return digest.hexdigest()


def _code_of(kind: type) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # built in, or made without a file
        return ""


def _described(value: Any) -> str:
    """Equal in all processes for equal settings; a file is its path, size and time of change."""
    if isinstance(value, Mapping):
        return repr(sorted((repr(key), _described(item)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_described, value)))
    if isinstance(value, list | tuple):
        return repr(list(map(_described, value)))
    if isinstance(value, str | Path) and os.path.isfile(value):
        found = Path(value).stat()
        return repr([str(value), found.st_size, found.st_mtime_ns])
    return repr(value) if isinstance(value, str | Path | int | float | None) else repr(pickle.dumps(value))


@cache
def _own_code() -> str:
    """Names the code that turns records into stored tokens."""
    chat = Path(north_lightning.chat.__file__).parent
    own = [Path(inspect.getfile(one)) for one in (Tokeniser, SampleFilter, SampleReader, Shard, TokenStore)]
    digest = hashlib.sha256()
    for path in sorted([*chat.glob("*.py"), *own]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
