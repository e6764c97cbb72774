"""A trajectory of one harness, done again through another: the same actions in other calls, proved by executing both.

In: a recorded trajectory whose task directory is here. Out: the trajectory as the other harness would have recorded it:
its prompt, its tools, its calls, and observations that really came back, in its own templates and cut as it cuts.

The proof is part of the retelling. Original and rewritten calls are carried out by the harnesses themselves, in two
fresh sandboxes that start from the same files; after every call the observations must say the same and ``/work`` must
hold the same (``.git`` and caches apart). Whatever does not is not retold, and counted: nothing unproved is written.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from north_lightning.errors import (
    ConfigError,
    InfrastructureError,
    InvalidActionError,
    RetellingError,
    SandboxUnavailableError,
)
from north_lightning.harnesses.actions import WORK, Action, Dialect, Finish, Outcome, ReadTurn, Run
from north_lightning.harnesses.dialects import dialect_of
from north_lightning.harnesses.variation import find_opening, mentioned
from north_lightning.interfaces import ConversationVariation, Harness, Sandbox, SandboxProvider
from north_lightning.tasks import image_of, load_task_sets
from north_lightning.types import AssistantAction, Conversation, Count, Fraction, Message, Step, Task

_TREE = (
    "cd /work && find . \\( -name .git -o -name __pycache__ -o -name .pytest_cache \\) -prune -o "
    "-printf '%y %m %l %p\\n' -type f -exec sha256sum {} + | LC_ALL=C sort"
)
_TREE_TIMEOUT_S = 60.0
_MOVES = re.compile(r"\s*cd\s+(?:--\s+)?([\w./~-]+)\s*(?:&&|;|\n|$)")
_LEAVES_STATE = re.compile(r"(?:^|[;&|\n(])[^\S\n]*(?:(?:cd|pushd|export|set|source|exec|alias|unset)\b|\.\s|\w+=)")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One action, and the calls that do it in either harness: one each, or the turns that end an attempt."""

    action: Action  # as the source did it
    rewritten: Action  # as the target does it: a command may have to say where it runs
    theirs: tuple[AssistantAction, ...]
    ours: tuple[AssistantAction, ...]
    observed: str | None  # what the sample says came back; None where several actions share an observation


@dataclass(frozen=True, slots=True)
class Seen:
    """What came back of one call, and what was in ``/work`` then."""

    observation: str
    is_over: bool
    tree: str


class HarnessTranslation(ConversationVariation):
    """Retells trajectories of ``source`` as one of ``targets`` would have recorded them.

    A sample is retold only if its task is in ``task_sets`` (found by its id) and its calls, executed, do the same;
    what two sandboxes take per sample is a few tenths of a second.

    Args:
        source: The harness the trajectories were recorded with, with the same settings.
        targets: The harnesses to tell them in; each sample is given one of them at random.
        task_sets: Directories of the tasks, or listings.
        sandboxes: Where both versions are executed.
        share: Of the samples; the others are left to other variations.
        num_wordings: Of the source's prompts, among which a sample's is looked for.
    """

    def __init__(
        self,
        source: Harness,
        targets: list[Harness],
        task_sets: list[Path],
        sandboxes: SandboxProvider,
        share: Fraction = 1.0,
        num_wordings: Count = 3,
    ) -> None:
        if not targets or not 0 < share <= 1:
            raise ConfigError(f"translation: expected targets and a share within (0, 1], got {len(targets)}, {share}")
        for harness in (source, *targets):
            dialect_of(harness.name)
        self.source = source
        self.targets = targets
        self.sandboxes = sandboxes
        self.share = share
        self.num_wordings = num_wordings
        self.tasks = {task.id: task for task in load_task_sets(task_sets)}

    def vary(self, sample: Conversation, seed: int) -> Conversation | None:
        rng = random.Random(seed)
        found = find_opening(sample, self.source, self.num_wordings)
        if found is None or rng.random() >= self.share:
            return None
        if sample.task_id not in self.tasks:
            raise RetellingError("task_unknown", f"task {sample.task_id!r} is in none of the task sets")
        task = replace(self.tasks[sample.task_id], instruction=found.task)
        target, wording = rng.choice(self.targets), rng.randrange(self.num_wordings)
        return asyncio.run(translate(sample, found.num_messages, task, self.source, target, self.sandboxes, wording))


async def translate(
    sample: Conversation,
    num_opening: int,
    task: Task,
    source: Harness,
    target: Harness,
    sandboxes: SandboxProvider,
    wording: int = 0,
) -> Conversation:
    """The sample in the words of ``target``, proved by execution.

    Args:
        sample: A trajectory of ``source``.
        num_opening: How many of its messages are the prompt.
        task: What it solves.
        source: The harness that recorded it.
        target: The harness to tell it in.
        sandboxes: Where both are executed.
        wording: Of the target's prompt.

    Raises:
        RetellingError: it cannot be told so; the reasons are ``no_counterpart``, ``unreadable_turn``,
            ``not_reproduced``, ``other_result``, ``other_files``, and ``not_executed`` where a sandbox failed.
        SandboxUnavailableError: commands cannot be isolated here.
    """
    turns = rewrite(sample.messages[num_opening:], dialect_of(source.name), dialect_of(target.name))
    exchanges = [exchange for _, turn, _ in turns for exchange in turn]
    try:
        theirs, ours = await asyncio.gather(
            play(source, task, [one.theirs for one in exchanges], sandboxes),
            play(target, task, [one.ours for one in exchanges], sandboxes),
        )
    except SandboxUnavailableError:
        raise
    except InfrastructureError as error:
        raise RetellingError("not_executed", str(error)) from error
    for exchange, their_seen, our_seen in zip(exchanges, theirs, ours, strict=True):
        check(exchange, their_seen[-1], our_seen[-1], dialect_of(source.name), dialect_of(target.name))
    prompt = target.prompt(task, wording)
    told = _tell(turns, ours, dialect_of(source.name), dialect_of(target.name))
    return replace(sample, messages=(*prompt.messages, *told), tools=prompt.tools, harness=target.name)


# ---- rewriting -----------------------------------------------------------------------------------------------------

Turns = list[tuple[str, list[Exchange], bool]]
"""For every turn of the source what was thought, its actions, and whether it is learned."""


def rewrite(messages: Sequence[Message], source: Dialect, target: Dialect) -> Turns:
    """The turns of a trajectory in both harnesses' calls; nothing is executed yet."""
    spoken = _turns(messages)
    read = [(_read(said, source), observed) for said, observed in spoken]
    turns: Turns = []
    directory = WORK
    for number, (turn, observed) in enumerate(read):
        exchanges = []
        actions = turn.actions
        ending = _ending(read[number:])
        for index, action in enumerate(actions):
            if isinstance(action, Run) and source.keeps_state:
                action = replace(action, directory=directory)
                directory = _directory_after(action)
            shared = len(observed) != len(actions) and len(actions) != 1
            saw = None if shared or index >= len(observed) else observed[index]
            theirs = ending if isinstance(action, Finish) else (turn.calls[index],)
            exchanges.append(_exchange(action, theirs, saw, source, target))
        turns.append((turn.reasoning, exchanges, spoken[number][0].trained))
        if ending:
            break
    return turns


def _read(said: Message, source: Dialect) -> ReadTurn:
    try:
        return source.read(said)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # what a call holds was written by a model
        raise RetellingError("unreadable_turn", f"expected calls that fit their tools, got {said!r}"[:300]) from error


def _turns(messages: Sequence[Message]) -> list[tuple[Message, list[str]]]:
    """Every assistant turn with what was observed after it."""
    turns: list[tuple[Message, list[str]]] = []
    for message in messages:
        if message.role == "assistant":
            turns.append((message, []))
        elif turns and message.role in ("tool", "user"):
            turns[-1][1].append(message.content)
        else:
            raise RetellingError("unreadable_turn", f"expected turns and their results, got a {message.role}'s message")
    return turns


def _ending(rest: Sequence[tuple[ReadTurn, list[str]]]) -> tuple[AssistantAction, ...]:
    """The calls that end the attempt, if the first turn of ``rest`` begins to: some harnesses want it said twice."""
    finishes = [[isinstance(action, Finish) for action in turn.actions] for turn, _ in rest]
    if not any(finishes[0]):
        return ()
    if any(finishes[0][:-1]) or not finishes[0][-1] or not all(all(later) for later in finishes[1:]):
        raise RetellingError("no_counterpart", "going on after a first submission has no counterpart")
    return (rest[0][0].calls[-1], *(call for turn, _ in rest[1:] for call in turn.calls))


def _exchange(
    action: Action, theirs: tuple[AssistantAction, ...], observed: str | None, source: Dialect, target: Dialect
) -> Exchange:
    if isinstance(action, Finish):
        return Exchange(action, action, theirs, tuple(target.finish(action.words)), None)
    rewritten = _placed(action, source, target) if isinstance(action, Run) else action
    return Exchange(action, rewritten, theirs, (target.write(rewritten),), observed)


def _directory_after(run: Run) -> str:
    moved = _MOVES.match(run.command)
    if moved is None or moved[1].startswith(("~", "-")):
        return run.directory
    return str(Path(run.directory, moved[1]))


def _placed(run: Run, source: Dialect, target: Dialect) -> Run:
    """The command as the target has to run it, so that it runs where it ran, and leaves no more behind."""
    if source.keeps_state and target.keeps_state:
        return run
    goes = "" if run.directory == WORK else f"cd {quote(run.directory)} && "
    if source.keeps_state:
        return run if target.names_directory else Run(goes + run.command)
    if not goes and not _LEAVES_STATE.search(run.command):
        return run
    return Run(f"({goes}{run.command}{chr(10) if '#' in run.command or chr(10) in run.command else ''})")


# ---- executing -----------------------------------------------------------------------------------------------------


async def play(
    harness: Harness, task: Task, calls: Sequence[Sequence[AssistantAction]], sandboxes: SandboxProvider
) -> list[list[Seen]]:
    """What the harness answered to each call, in a fresh sandbox over the task's files; a call may be several turns."""
    sandbox = await sandboxes.open(image_of(task))
    try:
        session = await harness.open(task, sandbox)
        try:
            seen = []
            for turns in calls:
                seen.append([await _see(session.act(_numbered(turn, 0)), sandbox) for turn in turns])
            return seen
        finally:
            await session.close()
    finally:
        await sandbox.close()


async def _see(acting: Awaitable[Step], sandbox: Sandbox) -> Seen:
    try:
        step = await acting
    except InvalidActionError as error:
        step = Step(message=f"invalid: {error}")
    observation = step.results[0].content if step.results else step.message
    listing = await sandbox.run(_TREE, _TREE_TIMEOUT_S)
    return Seen(observation, step.done, listing.output)


def check(exchange: Exchange, theirs: Seen, ours: Seen, source: Dialect, target: Dialect) -> None:
    """``RetellingError`` unless both calls said the same and left the same files."""
    if isinstance(exchange.action, Finish):
        if not (theirs.is_over and ours.is_over):
            raise RetellingError("other_result", "the attempt ends in one harness only")
    else:
        said = source.outcome(exchange.action, theirs.observation)
        blind = source.is_screen or target.is_screen
        if exchange.observed is not None:
            recorded = source.outcome(exchange.action, exchange.observed)
            if not _same(recorded, said, source.is_screen):
                raise _different("not_reproduced", exchange, recorded, said)
        retold = target.outcome(exchange.rewritten, ours.observation)
        if theirs.is_over or ours.is_over or not _same(said, retold, blind):
            raise _different("other_result", exchange, said, retold)
    if theirs.tree != ours.tree:
        rows = sorted(set(theirs.tree.splitlines()) ^ set(ours.tree.splitlines()))
        raise RetellingError("other_files", f"{exchange.action}: the files differ: {'; '.join(rows)[:200]}")


def _same(one: Outcome, other: Outcome, ignore_blanks: bool) -> bool:
    if one == other:
        return True
    return ignore_blanks and one.kind == other.kind and "".join(one.text.split()) == "".join(other.text.split())


def _different(reason: str, exchange: Exchange, one: Outcome, other: Outcome) -> RetellingError:
    return RetellingError(reason, f"{exchange.action}: {one!r} became {other!r}"[:400])


# ---- telling -------------------------------------------------------------------------------------------------------


def _tell(turns: Turns, seen: Sequence[Sequence[Seen]], source: Dialect, target: Dialect) -> list[Message]:
    """The messages after the target's prompt: calls numbered from 0, thoughts before the first call of their turn."""
    names = {source.shell: target.shell, source.editor: target.editor}
    told: list[Message] = []
    answers = iter(seen)
    next_id = 0
    for reasoning, exchanges, is_learned in turns:
        thought = mentioned(reasoning, names)
        said: list[tuple[AssistantAction, str]] = []
        for exchange in exchanges:
            results = next(answers)
            written = _written(exchange, "" if said else thought, names, target)
            said += [(turn, one.observation) for turn, one in zip(written, results, strict=True)]
        for group in _grouped(said, target.many_calls):
            action = _numbered(
                replace(group[0][0], tool_calls=tuple(c for a, _ in group for c in a.tool_calls)), next_id
            )
            told.append(Message("assistant", action.content, action.reasoning, action.tool_calls, trained=is_learned))
            observed = [text for _, text in group]
            if not action.tool_calls:
                told += [Message("user", text) for text in observed if text]
            elif any(observed):
                told += [
                    Message("tool", text, tool_call_id=call.id)
                    for call, text in zip(action.tool_calls, observed, strict=True)
                ]
            next_id += len(action.tool_calls)
    return told


def _written(exchange: Exchange, thought: str, names: Mapping[str, str], target: Dialect) -> list[AssistantAction]:
    if isinstance(exchange.action, Finish):
        return target.finish(mentioned(exchange.action.words, names), thought)
    return [target.write(exchange.rewritten, thought)]


def _grouped(said: list[tuple[AssistantAction, str]], many_calls: bool) -> list[list[tuple[AssistantAction, str]]]:
    """Calls of one turn together, where a turn may hold several; what ends the attempt stands alone."""
    if not many_calls:
        return [[one] for one in said]
    calls = [one for one in said if one[0].tool_calls and one[1]]
    ends = [one for one in said if not (one[0].tool_calls and one[1])]
    return [*([calls] if calls else []), *([one] for one in ends)]


def _numbered(action: AssistantAction, first: int) -> AssistantAction:
    calls = tuple(replace(call, id=str(first + index)) for index, call in enumerate(action.tool_calls))
    return replace(action, tool_calls=calls)
