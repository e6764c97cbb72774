"""Generated terminal tasks: eleven families of small jobs in a real shell.

In every family something must be found out first (what a file says, where a file lies, what a script lacks) and acted
on afterwards, so that a solution takes two or three commands and an answer. Names come from a ``NameSource``; decoys
make guessing fail; ``test.sh`` looks at the resulting files, whatever way led there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from north_lightning.tasks.harbor import TaskSource
from north_lightning.tasks.names import NameSource, Split

TURNS_TO_SPARE = 3
"""Step budget above the scripted solution's turns, before calibration narrows it."""

REWARD = "if {condition}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n"


@dataclass(frozen=True, slots=True)
class Job:
    """One drawn instance of a family: ``commands`` solve it, ``conditions`` (bash) hold exactly when it is solved."""

    instruction: str
    commands: tuple[str, ...]
    conditions: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    directories: tuple[str, ...] = ()


def delete_named(names: NameSource, rng: random.Random) -> Job:
    pointer, target, other = names.name(), names.name(), names.name()
    text = rng.choice((f"The file {pointer} names a file. Delete that file.", f"Delete the file named in {pointer}."))
    return Job(
        text,
        (f"cat {pointer}", f"rm {target}"),
        (f"[ ! -e {target} ]", f"[ -e {other} ]", f"[ -e {pointer} ]"),
        {pointer: target + "\n", target: names.name() + "\n", other: names.name() + "\n"},
    )


def rename_as_noted(names: NameSource, rng: random.Random) -> Job:
    note, old, new, body = names.name(), names.name(), names.name(), names.name()
    text = rng.choice(
        (f"Rename {old} to the name in {note}.", f"The file {note} holds a new name for {old}. Rename it.")
    )
    return Job(
        text,
        (f"cat {note}", f"mv {old} {new}"),
        (f"[ ! -e {old} ]", f'[ "$(<{new})" = {body} ]'),
        {note: new + "\n", old: body + "\n"},
    )


def bring_up(names: NameSource, rng: random.Random) -> Job:
    wanted, home, body = names.name(), names.name(), names.name()
    others = [names.name(), names.name()]
    text = rng.choice((f"Find {wanted} and move it here.", f"Somewhere below lies {wanted}. Move it up here."))
    return Job(
        text,
        (f"find -name {wanted}", f"mv ./{home}/{wanted} ."),
        (f'[ "$(<{wanted})" = {body} ]', f"[ ! -e {home}/{wanted} ]"),
        {f"{home}/{wanted}": body + "\n", **{f"{other}/{names.name()}": names.name() + "\n" for other in others}},
    )


def delete_containing(names: NameSource, rng: random.Random) -> Job:
    guilty, word = names.name(), names.name()
    others = [names.name(), names.name()]
    text = rng.choice((f"Delete the file that contains {word}.", f"One file contains {word}. Delete it."))
    return Job(
        text,
        (f"grep -l {word} *", f"rm {guilty}"),
        (f"[ ! -e {guilty} ]", *(f"[ -e {other} ]" for other in others)),
        {guilty: word + "\n", **{other: names.name() + "\n" for other in others}},
    )


def copy_setting(names: NameSource, rng: random.Random) -> Job:
    config, key, value, out = names.name(), names.name(), names.name(), names.name()
    rows = [f"{key}={value}", f"{names.name()}={names.name()}", f"{names.name()}={names.name()}"]
    rng.shuffle(rows)
    text = rng.choice(
        (f"Write the value of {key} in {config} to {out}.", f"Put what {config} sets {key} to into {out}.")
    )
    return Job(
        text,
        (f"grep {key} {config}", f"echo {value} > {out}"),
        (f'[ "$(<{out})" = {value} ]', f"[ -e {config} ]"),
        {config: "\n".join(rows) + "\n"},
    )


def move_only_file(names: NameSource, rng: random.Random) -> Job:
    source, destination, file, body = names.name(), names.name(), names.name(), names.name()
    text = rng.choice(
        (f"Move the file in {source} to {destination}.", f"{source} holds one file. Move it to {destination}.")
    )
    return Job(
        text,
        (f"ls {source}", f"mv {source}/{file} {destination}"),
        (f"[ ! -e {source}/{file} ]", f'[ "$(<{destination}/{file})" = {body} ]'),
        {f"{source}/{file}": body + "\n"},
        directories=(destination,),
    )


def satisfy_script(names: NameSource, rng: random.Random) -> Job:
    script, needed = names.name(), names.name()
    text = rng.choice(
        (f"Run {script}.sh and make the directory it lacks.", f"Make the directory that {script}.sh asks for.")
    )
    return Job(
        text,
        (f"sh {script}.sh", f"mkdir {needed}"),
        (f"[ -d {needed} ]", f"[ -e {script}.sh ]"),
        {f"{script}.sh": f"test -d {needed} || echo no directory {needed}\n"},
    )


def delete_link_target(names: NameSource, rng: random.Random) -> Job:
    link, target, other = names.name(), names.name(), names.name()
    text = rng.choice((f"Delete the file that {link} links to.", f"{link} is a link. Delete its target."))
    return Job(
        text,
        (f"readlink {link}", f"rm {target}"),
        (f"[ ! -e {target} ]", f"[ -L {link} ]", f"[ -e {other} ]"),
        {target: names.name() + "\n", other: names.name() + "\n"},
        {link: target},
    )


def make_executable(names: NameSource, rng: random.Random) -> Job:
    directory, script = names.name(), names.name()
    text = rng.choice(
        (f"Make the script in {directory} executable.", f"{directory} holds a script. Make it executable.")
    )
    return Job(
        text,
        (f"ls {directory}", f"chmod +x {directory}/{script}"),
        (f"[ -x {directory}/{script} ]",),
        {f"{directory}/{script}": f"echo {names.name()}\n"},
    )


def delete_second_hop(names: NameSource, rng: random.Random) -> Job:
    first, second, third, other = (names.name() for _ in range(4))
    text = rng.choice(
        (
            f"{first} names a file that names a third. Delete the third.",
            f"Follow {first} to a file and on to the next. Delete that last one.",
        )
    )
    return Job(
        text,
        (f"cat {first}", f"cat {second}", f"rm {third}"),
        (f"[ ! -e {third} ]", f"[ -e {second} ]", f"[ -e {first} ]", f"[ -e {other} ]"),
        {first: second + "\n", second: third + "\n", third: names.name() + "\n", other: names.name() + "\n"},
    )


def append_to_named(names: NameSource, rng: random.Random) -> Job:
    pointer, target, word, old = (names.name() for _ in range(4))
    text = rng.choice(
        (f"Append {word} to the file named in {pointer}.", f"{pointer} names a file. Append {word} to it.")
    )
    return Job(
        text,
        (f"cat {pointer}", f"echo {word} >> {target}"),
        (f"[ \"$(<{target})\" = $'{old}\\n{word}' ]",),
        {pointer: target + "\n", target: old + "\n"},
    )


FAMILIES: tuple[Callable[[NameSource, random.Random], Job], ...] = (
    delete_named,
    rename_as_noted,
    bring_up,
    delete_containing,
    copy_setting,
    move_only_file,
    satisfy_script,
    delete_link_target,
    make_executable,
    delete_second_hop,
    append_to_named,
)


def terminal_task(index: int, seed: int, split: Split) -> TaskSource:
    """Task number ``index`` of a split: a pure function of its arguments; families take turns."""
    rng = random.Random(f"terminal/{seed}/{split}/{index}")
    family = FAMILIES[index % len(FAMILIES)]
    job = family(NameSource(rng, split), rng)
    return TaskSource(
        name=f"terminal-{split}-{index:05d}",
        environment="terminal",
        family=family.__name__,
        instruction=job.instruction,
        files=job.files,
        links=job.links,
        directories=job.directories,
        tests={"test.sh": "cd /work || exit 1\n" + REWARD.format(condition=" && ".join(job.conditions))},
        solve_script="cd /work\n" + "\n".join(job.commands) + "\n",
        steps=tuple(("terminal", {"keystrokes": command}) for command in job.commands),
        max_turns=len(job.commands) + 1 + TURNS_TO_SPARE,
    )
