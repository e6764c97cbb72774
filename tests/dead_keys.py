"""Classes with a key that does nothing, each in a way in which one was or could be lost; ``live`` does something."""

from __future__ import annotations

from dataclasses import dataclass


class NeverStored:
    def __init__(self, live: int, dead: int = 0) -> None:
        self.live = live

    def use(self) -> int:
        return self.live


class StoredOnly:
    def __init__(self, live: int, dead: int = 0) -> None:
        self.live, self.dead = live, dead

    def use(self) -> int:
        return self.live


class OnlyChecked:
    def __init__(self, live: int, dead: int = 0) -> None:
        for name, value in (("live", live), ("dead", dead)):
            if value < 0:
                raise ValueError(name)
        if dead > live:
            raise ValueError(f"dead: expected at most {live}, got {dead}")
        self.live = live
        self.dead = int(dead)

    def check(self) -> None:
        if self.dead > 3:
            raise ValueError("dead")

    def use(self) -> int:
        return self.live


class OnlyShown:
    def __init__(self, live: int, dead: int = 0) -> None:
        self.live = live
        self._dead = [dead]

    def __repr__(self) -> str:
        return f"OnlyShown({self.live}, {self._dead})"

    def use(self) -> int:
        return self.live


class HandedOn(StoredOnly):
    def __init__(self, extra: int = 1, **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.extra = extra

    def use(self) -> int:
        return self.live + self.extra


@dataclass(frozen=True)
class Settings:
    live: int = 1
    dead: int = 2

    def __post_init__(self) -> None:
        if self.dead < 0:
            raise ValueError("dead")

    def use(self) -> int:
        return self.live


WITH_A_DEAD_KEY = [NeverStored, StoredOnly, OnlyChecked, OnlyShown, HandedOn, Settings]


class Client:
    def __init__(self, url: str, timeout_s: float = 300.0) -> None:
        self.url = url
        self.timeout_s = timeout_s


def draw(count: int, seed: int = 0) -> int:
    return count + seed


def run(url: str, limit_s: float) -> tuple[Client, float, int]:
    return Client(url), limit_s, draw(3)


class Sampled:
    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
