"""The pages for raters: rate both attempts by statements (step 1), then say which is better (step 2).

In: a study and what was said so far. Out: a FastAPI application. It knows no model. Step 2 is refused until step 1 is
saved. Every page works without JavaScript; with it, answers are saved as they are given, and digits choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from north_lightning.human_evaluation.assignments import Assignment
from north_lightning.human_evaluation.names import plain
from north_lightning.human_evaluation.store import RefusedError, Store
from north_lightning.human_evaluation.study import Study

CHOICES = (("1", "1"), ("2", "2"), ("3", "3"), ("4", "4"), ("5", "5"), ("0", "cannot judge"))
PREFERENCES = (
    ("1", "A is much better"),
    ("2", "A is somewhat better"),
    ("3", "about the same"),
    ("4", "B is somewhat better"),
    ("5", "B is much better"),
    ("0", "cannot judge"),
)
MAX_BODY_BYTES, MAX_COMMENT_CHARS = 64 << 10, 4000
SIDES = ("left", "right")


async def read_form(request: Request) -> dict[str, str]:
    """Fields of a form that is sent as most forms are."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, "The form is too long.")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200))
    except ValueError as error:
        raise HTTPException(400, "The form cannot be read.") from error


Form = Annotated[dict[str, str], Depends(read_form)]


def make_app(study: Study, store: Store, url: str, frame_url: str) -> FastAPI:
    """``url`` and ``frame_url`` are how browsers reach this application and the frames' one."""
    app = FastAPI(openapi_url=None)
    templates = make_templates()
    raters = {token: rater for rater, token in study.raters.items()}

    def show(name: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(templates.get_template(name).render(frame_url=frame_url, **values), status)

    def rows_of(token: str) -> list[Assignment]:
        if token not in raters:
            raise HTTPException(404, "This link is not known. Check that it is complete.")
        return study.assignments[raters[token]]

    def assignment_of(token: str, number: int) -> Assignment:
        rows = rows_of(token)
        if not 1 <= number <= len(rows):
            raise HTTPException(404, f"There are comparisons 1 to {len(rows)}.")
        return rows[number - 1]

    def show_step(name: str, token: str, number: int, form: Mapping[str, str], missing: list[str]) -> HTMLResponse:
        one = assignment_of(token, number)
        comparison = study.comparison_of(one)
        return show(
            name,
            422 if missing else 200,
            token=token,
            number=number,
            num_all=len(rows_of(token)),
            instruction=study.instructions[comparison.item],
            functionality=comparison.functionality.replace("_", " "),
            attempts=[("A", "left", one.left, study.page(one.left)), ("B", "right", one.right, study.page(one.right))],
            questions=study.questions(one),
            choices=CHOICES,
            preferences=PREFERENCES,
            ratings=store.ratings(one.id),
            form=form,
            missing=missing,
        )

    @app.get("/")
    def welcome() -> Response:
        return show("message.html.jinja", title="Rate attempts", message="Open the link that you were given.")

    @app.get("/r/{token}")
    def overview(token: str) -> Response:
        rows, rated, judged = rows_of(token), store.rated(), store.judgments()
        states = [2 if one.id in judged else int(one.id in rated) for one in rows]
        following = next((number for number, state in enumerate(states, 1) if state < 2), None)
        return show("overview.html.jinja", token=token, states=states, following=following, is_over=store.is_unsealed)

    @app.get("/r/{token}/{number}")
    def step_1(token: str, number: int) -> Response:
        one = assignment_of(token, number)
        if store.ratings(one.id) is not None:
            return RedirectResponse(f"/r/{token}/{number}/preference", 303)
        return show_step("ratings.html.jinja", token, number, store.draft(one.id, "ratings"), [])

    @app.post("/r/{token}/{number}/ratings")
    def save_ratings(token: str, number: int, form: Form) -> Response:
        one = assignment_of(token, number)
        answers, missing = ratings_of(form, one, study.questions(one))
        if missing:
            store.save_draft(one.id, "ratings", form)
            return show_step("ratings.html.jinja", token, number, form, missing)
        store.save_ratings(one.id, answers)
        return RedirectResponse(f"/r/{token}/{number}/preference", 303)

    @app.get("/r/{token}/{number}/preference")
    def step_2(token: str, number: int) -> Response:
        one = assignment_of(token, number)
        if store.ratings(one.id) is None:
            raise RefusedError("Rate both attempts first (step 1). The preference comes after that.")
        said = store.judgments().get(one.id)
        form = {"preference": str(said.preference or 0), "comment": said.comment} if said else None
        return show_step("preference.html.jinja", token, number, form or store.draft(one.id, "preference"), [])

    @app.post("/r/{token}/{number}/preference")
    def save_preference(token: str, number: int, form: Form) -> Response:
        one = assignment_of(token, number)
        if store.ratings(one.id) is None:
            raise RefusedError("Rate both attempts first (step 1). The preference comes after that.")
        choice = form.get("preference", "")
        if choice not in dict(PREFERENCES):
            store.save_draft(one.id, "preference", form)
            return show_step("preference.html.jinja", token, number, form, ["which attempt is better"])
        store.save_preference(one.id, int(choice) or None, plain(form.get("comment", ""))[:MAX_COMMENT_CHARS])
        return RedirectResponse(f"/r/{token}#next", 303)

    @app.post("/r/{token}/{number}/draft/{step}")
    def save_draft(token: str, number: int, step: str, form: Form) -> Response:
        one = assignment_of(token, number)
        if step not in ("ratings", "preference"):
            raise HTTPException(404, "There are drafts of ratings and of preferences.")
        store.save_draft(one.id, step, form)
        return Response(status_code=204)

    def refuse(request: Request, error: Exception) -> Response:
        status, message = 409, str(error)
        if isinstance(error, StarletteHTTPException):
            status, message = error.status_code, str(error.detail)
        if isinstance(error, RequestValidationError):
            status, message = 404, "There is no such page."
        return show("message.html.jinja", status, title="Not possible", message=message)

    for kind in (RefusedError, StarletteHTTPException, RequestValidationError):
        app.add_exception_handler(kind, refuse)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    policy = (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; frame-src "
        f"{frame_url}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    add_headers(app, url, lambda _: policy, **{"Cross-Origin-Opener-Policy": "same-origin"})
    return app


def ratings_of(
    form: Mapping[str, str], one: Assignment, questions: list[str]
) -> tuple[dict[str, dict[str, int | None]], list[str]]:
    """Answers by attempt and statement, and what is missing."""
    answers: dict[str, dict[str, int | None]] = {one.left: {}, one.right: {}}
    missing = []
    for label, side, attempt in zip("AB", SIDES, (one.left, one.right), strict=True):
        for number, question in enumerate(questions):
            choice = form.get(f"{side}-{number}", "")
            if choice in dict(CHOICES):
                answers[attempt][question] = int(choice) or None
            else:
                missing.append(f"{label}: {question}")
    return answers, missing


def make_templates() -> Environment:
    loader = PackageLoader("north_lightning.human_evaluation")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def add_headers(app: FastAPI, url: str, policy: Callable[[str], str], **more: str) -> None:
    """What every response says to the browser: ``policy`` by path, nothing guessed, told to others or kept. Requests
    for another host's name are refused: a page elsewhere cannot reach the application under a name of its own."""
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "X-DNS-Prefetch-Control": "off",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=(), clipboard-read=()",
        **more,
    }

    @app.middleware("http")
    async def add(request: Request, answer: Callable[[Request], Any]) -> Response:
        response: Response = await answer(request)
        response.headers.update(headers)
        response.headers["Content-Security-Policy"] = policy(request.url.path)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[urlsplit(url).hostname or "localhost"], www_redirect=False)
