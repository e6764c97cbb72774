"""The rating app, through its HTTP interface: order of the steps, autosave, blindness, hostile content."""

import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_studies import KINDS, form_of, prepare, write_attempt, write_sides
from starlette.testclient import TestClient

from north_lightning.human_evaluation import app as app_module
from north_lightning.human_evaluation.app import make_app
from north_lightning.human_evaluation.frames import make_frames
from north_lightning.human_evaluation.store import RefusedError, Store
from north_lightning.human_evaluation.study import RATINGS, Study

URL, FRAME_URL = "http://127.0.0.1:8600", "http://localhost:8601"


class App:
    """A study with its two servers, and what a browser of one rater does."""

    def __init__(self, study: Study, rater: str = "rater-1") -> None:
        self.study, self.rater = study, rater
        self.store = Store(study.folder / RATINGS)
        self.pages = TestClient(make_app(study, self.store, URL, FRAME_URL), base_url=URL, follow_redirects=False)
        self.frames = TestClient(make_frames(study, URL, FRAME_URL), base_url=FRAME_URL)
        self.home = f"/r/{study.raters[rater]}"
        self.seats = study.assignments[rater]

    def form(self, number: int, level: int = 4) -> dict[str, str]:
        one = self.seats[number - 1]
        questions = self.study.questions(one)
        answers = {attempt: dict.fromkeys(questions, level) for attempt in (one.left, one.right)}
        return form_of(answers, one, questions)

    def rate(self, number: int, preference: str = "2") -> None:
        assert self.pages.post(f"{self.home}/{number}/ratings", data=self.form(number)).status_code == 303
        answer = self.pages.post(f"{self.home}/{number}/preference", data={"preference": preference, "comment": "So."})
        assert answer.status_code == 303


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("human")
    return prepare(write_sides(folder, ["quokka", "wombat"], 8), folder / "study")


@pytest.fixture
def app(prepared: Study) -> App:
    (prepared.folder / RATINGS).unlink(missing_ok=True)
    return App(prepared)


# ---- the order of the steps ------------------------------------------------------------------------------------------


def test_step_2_is_refused_until_step_1_is_saved(app: App) -> None:
    page = f"{app.home}/1/preference"
    for answer in (app.pages.get(page), app.pages.post(page, data={"preference": "1"})):
        assert answer.status_code == 409
        assert "Rate both attempts first" in answer.text
    assert app.store.judgments() == {}
    saved = app.pages.post(f"{app.home}/1/ratings", data=app.form(1))
    assert (saved.status_code, saved.headers["location"]) == (303, page)
    assert app.pages.get(page).status_code == 200
    assert app.pages.post(page, data={"preference": "1"}).status_code == 303
    assert [one.preference for one in app.store.judgments().values()] == [1]


def test_the_database_itself_refuses_a_preference_without_ratings(app: App) -> None:
    database = sqlite3.connect(app.store.path, isolation_level=None)
    database.execute("PRAGMA foreign_keys = ON")
    with pytest.raises(RefusedError, match="Rate both attempts first"):
        app.store.save_preference(app.seats[0].id, 1, "")
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO preferences VALUES ('x', 1, '', '')")
    database.close()


def test_every_statement_needs_an_answer(app: App) -> None:
    form = app.form(1)
    for name in form:
        for bad in ({}, {name: ""}, {name: "6"}, {name: "4; DROP TABLE ratings"}):
            sent = {key: value for key, value in form.items() if key != name} | bad
            answer = app.pages.post(f"{app.home}/1/ratings", data=sent)
            assert answer.status_code == 422
            assert "An answer is missing" in answer.text
    assert app.store.rated() == set()
    assert app.pages.get(f"{app.home}/1").text.count(" checked") == len(form) - 1  # of the last one: given answers stay
    assert app.pages.post(f"{app.home}/1/ratings", data=form | {"left-0": "0"}).status_code == 303
    one = app.seats[0]
    saved = app.store.ratings(one.id)
    assert saved is not None
    assert saved[one.left][app.study.questions(one)[0]] is None  # cannot judge
    for bad_form in ({}, {"preference": "9"}):
        assert app.pages.post(f"{app.home}/1/preference", data=bad_form).status_code == 422


def test_saving_twice_is_saving_once_and_ratings_cannot_be_changed(app: App) -> None:
    for _ in range(2):
        assert app.pages.post(f"{app.home}/1/ratings", data=app.form(1)).status_code == 303
    answer = app.pages.post(f"{app.home}/1/ratings", data=app.form(1, level=5))
    assert answer.status_code == 409
    assert "saved already" in answer.text
    for preference in ("1", "1", "5"):
        assert app.pages.post(f"{app.home}/1/preference", data={"preference": preference}).status_code == 303
    (judgment,) = app.store.judgments().values()
    assert judgment.preference == 5
    assert {value for ratings in judgment.answers.values() for value in ratings.values()} == {4}
    moved = app.pages.get(f"{app.home}/1")
    assert (moved.status_code, moved.headers["location"]) == (303, f"{app.home}/1/preference")


def test_drafts_are_saved_and_shown_again(app: App) -> None:
    sent = app.pages.post(f"{app.home}/2/draft/ratings", data={"left-0": "3", "right-1": "0"})
    assert sent.status_code == 204
    page = App(app.study).pages.get(f"{app.home}/2").text
    assert re.findall(r'name="([\w-]+)" value="(\d)" required checked', page) == [("left-0", "3"), ("right-1", "0")]
    app.pages.post(f"{app.home}/2/ratings", data=app.form(2))
    app.pages.post(f"{app.home}/2/draft/preference", data={"comment": "half a <thought>"})
    assert "half a &lt;thought&gt;</textarea>" in app.pages.get(f"{app.home}/2/preference").text
    assert app.store.judgments() == {}


def test_the_overview_leads_to_what_is_next(app: App) -> None:
    app.rate(1)
    app.pages.post(f"{app.home}/2/ratings", data=app.form(2))
    page = app.pages.get(app.home).text
    assert "1 of" in page
    assert re.search(r'id="next" href="[^"]*/2"', page)
    for number in range(2, len(app.seats) + 1):
        app.rate(number)
    assert "All comparisons are done" in app.pages.get(app.home).text


def test_nothing_can_be_saved_once_the_seal_is_open(app: App) -> None:
    app.rate(1)
    app.store.unseal()
    for path, form in (("2/ratings", app.form(2)), ("1/preference", {"preference": "5"}), ("2/draft/ratings", {})):
        answer = app.pages.post(f"{app.home}/{path}", data=form)
        assert (answer.status_code, "The study is over" in answer.text) == (409, True)
    assert [one.preference for one in app.store.judgments().values()] == [2]
    assert "The study is over" in app.pages.get(app.home).text


def test_raters_at_the_same_time_lose_nothing(app: App) -> None:
    apps = [App(app.study, rater) for rater in app.study.raters]
    jobs = [(one, number) for one in apps for number in range(1, len(one.seats) + 1)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda job: job[0].rate(job[1], str(1 + job[1] % 5)), jobs))
    judged = app.store.judgments()
    assert len(judged) == sum(map(len, app.study.assignments.values()))
    for one, number in jobs:
        assert judged[one.seats[number - 1].id].preference == 1 + number % 5


# ---- who may see what ------------------------------------------------------------------------------------------------


def test_only_those_with_a_link_see_anything(app: App) -> None:
    other = App(app.study, "rater-2")
    for path in ("/r/guess", "/r/guess/1", f"{app.home}x", f"{app.home}/0", f"{app.home}/999", f"{app.home}/x", "/docs",
                 "/openapi.json", "/static/../app.py", "/static/%2e%2e/app.py", "/sealed.json"):  # fmt: skip
        assert app.pages.get(path).status_code == 404, path
    assert app.pages.get("/").status_code == 200
    assert app.home not in app.pages.get("/").text
    assert {one.id for one in app.seats}.isdisjoint(one.id for one in other.seats)
    for path in (f"/raw/{app.seats[0].left}/../page.json", "/raw/x/page.json", f"/raw/{app.seats[0].left}/page.json",
                 "/sealed.json", "/raw/../sealed.json"):  # fmt: skip
        assert app.frames.get(path).status_code == 404, path


def test_other_hosts_names_are_refused(app: App) -> None:
    """A page elsewhere could have its own host name lead here (DNS rebinding)."""
    assert app.pages.get(app.home, headers={"host": "evil.example"}).status_code == 400
    assert app.frames.get("/raw/x/y", headers={"host": "evil.example"}).status_code == 400


def test_forms_are_bounded(app: App) -> None:
    answer = app.pages.post(f"{app.home}/1/draft/ratings", content=b"a=" + b"x" * 100_000)
    assert answer.status_code == 413
    assert app.pages.post(f"{app.home}/1/draft/ratings", content="&".join(["a=1"] * 500)).status_code == 400
    assert app.pages.post(f"{app.home}/1/draft/ratings", content=b"a=\xff\xfe").status_code == 400


def test_no_name_is_in_any_page_url_header_or_file(app: App) -> None:
    names = re.compile(r"quokka|wombat|item-\d", re.IGNORECASE)
    for number in range(1, len(app.seats) + 1):
        app.pages.post(f"{app.home}/{number}/ratings", data=app.form(number))
    seen = 0
    for path in [app.home, *(f"{app.home}/{number}/preference" for number in range(1, len(app.seats) + 1))]:
        answer = app.pages.get(path)
        assert answer.status_code == 200
        for text in (answer.text, str(answer.url), str(answer.headers)):
            seen += 1
            assert not names.search(text)
    assert seen > 20
    for path in app.study.folder.rglob("*"):
        if path.name != "sealed.json":
            assert not names.search(str(path.relative_to(app.study.folder)))
            assert path.is_dir() or not names.search(path.read_bytes().decode(errors="replace"))
    assert names.search((app.study.folder / "sealed.json").read_text())


# ---- what attempts hold ----------------------------------------------------------------------------------------------

HOSTILE = {
    "index.html": "<script>parent.document.title = 'owned'; location = 'http://evil.example/'</script><iframe src=//x>",
    "plot.svg": '<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(2)</script></svg>',
    '"><script>alert(3)</script>.txt': "a name",
    "\u202egnp.exe": "right to left",
    "long.txt": "x" * 300_000,
    "lines.txt": "y\n" * 100_000,
}


class Tags(HTMLParser):
    """Tags and attributes of a page, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> App:
    folder = tmp_path_factory.mktemp("hostile")
    evil = "</div></main><script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style>"
    for model in ("quokka", "wombat"):
        write_attempt(
            folder / model / "one", "data_visualization", f"{evil}\n\n\u202e\x1b[2Jabc\x07{'>' * 5000}", f"Plot.{evil}",
            diff=f"--- a/{evil}\n+++ b/{evil}\n@@ -1 +1 @@\n-{evil}\n+{evil}\n", files=HOSTILE,
            attempt={"transcript": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil * 5000,
                     "reasoning": evil, "tool_calls": [{"name": evil, "arguments": {evil: evil}}]}]},
        )  # fmt: skip
    sides = [f"{model}={folder / model}" for model in ("quokka", "wombat")]
    return App(prepare(sides, folder / "study", "--attention_items", "0", "--double_rated", "0", "--raters", "1"))


def test_hostile_content_is_text_on_the_page(hostile: App) -> None:
    answer = hostile.pages.get(f"{hostile.home}/1")
    tags = Tags(answer.text).tags
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    assert scripts == [{"src": "/static/app.js", "defer": None}]
    assert {tag for tag, _ in tags}.isdisjoint({"img", "style", "object", "embed", "base", "svg"})
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "style"]
    assert len(answer.text) < 1_500_000
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]", answer.text)
    assert "‹U+202E›" in answer.text
    links = [attributes["href"] or "" for tag, attributes in tags if tag == "a"]
    assert all(link.startswith((f"{FRAME_URL}/text/", "/r/")) for link in links)
    assert any(link.endswith("/long.txt") for link in links)


def test_produced_pages_run_on_another_origin_in_a_sandbox(hostile: App) -> None:
    answer = hostile.pages.get(f"{hostile.home}/1")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert f"frame-src {FRAME_URL};" in policy
    assert "unsafe" not in policy
    frames = [attributes for tag, attributes in Tags(answer.text).tags if tag == "iframe"]
    assert len(frames) == 4
    for one in frames:
        assert one["sandbox"] == "allow-scripts"
        assert one["referrerpolicy"] == "no-referrer"
        source = one["src"] or ""
        assert source.startswith(f"{FRAME_URL}/")
        shown = hostile.frames.get(source)
        assert shown.status_code == 200
        own = shown.headers["content-security-policy"]
        assert own.startswith("sandbox allow-scripts; default-src 'none';")
        assert f"frame-ancestors {URL}" in own
        assert "connect-src " + "/".join(source.split("/")[:5]).replace("/view/", "/raw/") in own
        assert shown.headers["x-content-type-options"] == "nosniff"
        if source.endswith("plot.svg"):  # a picture cannot run its script
            assert "<script" not in shown.text
            assert "/view/" in source
    for client in (hostile.frames, hostile.pages):
        assert client.get("/nothing/here/there").headers["content-security-policy"]


def test_the_text_of_a_page_is_not_a_page(hostile: App) -> None:
    shown = hostile.frames.get(f"/text/{hostile.seats[0].left}/index.html")
    assert shown.headers["content-type"] == "text/plain; charset=utf-8"
    assert shown.text == HOSTILE["index.html"]


@pytest.mark.parametrize("head", ["", "<!doctype html>", "\n<!DOCTYPE HTML PUBLIC 'x'>"])
def test_a_page_stays_as_it_is_but_for_webrtc(head: str, tmp_path: Path) -> None:
    for model in ("quokka", "wombat"):
        write_attempt(tmp_path / model / "one", KINDS[3], model, files={"index.html": f"{head}<p>Hello"})
    sides = [f"{model}={tmp_path / model}" for model in ("quokka", "wombat")]
    app = App(prepare(sides, tmp_path / "study", "--attention_items", "0"))
    shown = app.frames.get(f"/raw/{app.seats[0].left}/index.html").text
    assert re.fullmatch(re.escape(head) + r"<script>[^<]*RTCPeerConnection[^<]*</script><p>Hello", shown)


# ---- how it looks ----------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    digits = color if len(color) == 7 else "#" + "".join(2 * one for one in color[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_have_the_contrast_that_wcag_asks_for(scheme: int) -> None:
    css = (Path(app_module.__file__).parent / "static" / "app.css").read_text()
    colors = dict(re.findall(r"--([\w-]+): (#\w+)", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]))
    pairs = [(text, back) for text in ("text", "muted", "link") for back in ("page", "box")]
    pairs += [("text", back) for back in ("added", "removed", "alert")] + [("muted", "hunk"), ("on-strong", "strong")]
    for text, back in pairs:
        light, dark = sorted((luminance(colors[text]), luminance(colors[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back)
