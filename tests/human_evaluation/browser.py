"""Raters in headless Chromium, who use the keyboard only; and a record of all that the browser sees."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from north_lightning.human_evaluation.assignments import Assignment
from north_lightning.human_evaluation.study import Study

CHROMIUM = shutil.which("chromium")
Judge = Callable[[Assignment], tuple[dict[str, dict[str, int]], int]]


@dataclass
class Seen:
    """What the browser asked for, and what its console said. ``leaks``: where a name was in what came."""

    names: tuple[str, ...]
    requests: int = 0
    external: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

    def watch(self, context: Any) -> None:
        context.on("request", self._request)
        context.on("response", self._response)
        context.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        context.on("weberror", lambda one: self.errors.append(str(one.error)))

    def _request(self, request: Any) -> None:
        self.requests += 1
        if urlsplit(request.url).hostname not in ("127.0.0.1", "localhost") and not request.url.startswith("data:"):
            self.external.append(request.url)

    def _response(self, response: Any) -> None:
        texts = {"URL": response.url, "headers": str(response.headers)}
        if not 300 <= response.status < 400 and response.status != 204:
            try:
                texts["body"] = response.body().decode(errors="replace")
            except Exception:  # the page went on before it was read
                texts["body"] = ""
        for where, text in texts.items():
            if any(re.search(re.escape(name), text, re.IGNORECASE) for name in self.names):
                self.leaks.append(f"{where} of {response.url}")


@contextmanager
def chromium(**settings: Any) -> Iterator[Any]:
    """A browser's context; skips the test where there is no Chromium or no Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser.new_context(**settings)
        finally:
            browser.close()


def rate_by_keyboard(page: Any, link: str, study: Study, rater: str, judge: Judge, until: int | None = None) -> int:
    """Do what is left, up to the comparison ``until``; the number of judgments."""
    page.goto(link)
    done = 0
    while page.locator("a#next").count():
        number = int(page.locator("a#next").get_attribute("href").rsplit("/", 1)[1])
        if until is not None and number > until:
            break
        one = study.assignments[rater][number - 1]
        answers, preference = judge(one)
        _follow_link(page)
        if not page.url.endswith("/preference"):
            values = [answers[side][question] for side in (one.left, one.right) for question in study.questions(one)]
            for value in values[page.locator("form input:checked").count() :]:  # a draft holds the first ones
                page.keyboard.press(str(value))
            page.keyboard.press("Enter")
            page.wait_for_url("**/preference")
        page.keyboard.press(str(preference))
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(r"/r/[^/]+(#next)?$"))
        done += 1
    return done


def _follow_link(page: Any) -> None:
    """Tab to the link that goes on, and press Enter."""
    for _ in range(20):
        if page.evaluate("document.activeElement.id") == "next":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/r/[^/]+/\d+"))
