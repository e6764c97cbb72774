"""Produced pages and pictures, for isolated frames on an origin of their own.

In: the study's files. Out: a FastAPI application. Its responses are sandboxed by their own headers: scripts of an
attempt run without an origin, see no other attempt, and reach nothing but the files of their attempt.
"""

from __future__ import annotations

import re
from html import escape
from urllib.parse import quote

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response

from north_lightning.human_evaluation.app import add_headers
from north_lightning.human_evaluation.pages import HTML
from north_lightning.human_evaluation.study import Study

_NO_WEBRTC = (
    b"<script>for (const name of ['RTCPeerConnection', 'webkitRTCPeerConnection']) delete window[name]</script>"
)
"""A content security policy does not stop it, and it can send packets to anyone."""


def make_frames(study: Study, url: str, frame_url: str) -> FastAPI:
    """As for ``make_app``."""
    app = FastAPI(openapi_url=None)

    @app.get("/{form}/{attempt}/{path:path}")
    def file(form: str, attempt: str, path: str) -> Response:
        found = study.file(attempt, path)
        if found is None or form not in ("raw", "text", "view"):
            raise HTTPException(404)
        kind, place = found
        if form == "view":  # a picture, also one that could run scripts as a document
            source = escape(f"/raw/{attempt}/{quote(path)}")
            style = "body{margin:0;background:#fff}img{max-width:100%;max-height:100vh;display:block;margin:auto}"
            return HTMLResponse(
                f'<!doctype html><meta charset="utf-8"><title>picture</title><style>{style}</style>'
                f'<img src="{source}" alt="a produced picture">'
            )
        if form == "raw" and kind == HTML:
            return HTMLResponse(_without_webrtc(place.read_bytes()))
        is_text = form == "text" and not kind.startswith("image/png")
        return FileResponse(place, media_type="text/plain" if is_text else kind)

    def policy(path: str) -> str:
        attempt = (*path.split("/"), "", "", "")[2]
        own = f"{frame_url}/raw/{attempt}/" if attempt in study.lengths else "'none'"
        return (
            f"sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' {own}; style-src "
            f"'unsafe-inline' {own}; img-src data: blob: {own}; font-src data: {own}; media-src data: blob: {own}; "
            f"connect-src {own}; form-action 'none'; base-uri 'none'; frame-ancestors {url}"
        )

    more = {"Cross-Origin-Resource-Policy": "cross-origin", "Access-Control-Allow-Origin": "*"}
    add_headers(app, frame_url, policy, **more)
    return app


def _without_webrtc(page: bytes) -> bytes:
    doctype = re.match(rb"\s*<!doctype[^>]*>", page, re.IGNORECASE)
    at = doctype.end() if doctype else 0  # before the doctype, a script would change how the page is laid out
    return page[:at] + _NO_WEBRTC + page[at:]
