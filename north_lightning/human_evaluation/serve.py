"""``python -m north_lightning human-eval serve``: the rating app, and beside it the server of the isolated frames.

In: a study folder. Out: two servers, each on its port, until Ctrl-C; ``ratings.sqlite`` in the study. A server that is
killed has lost nothing: start it again, and the raters' links go on where they were.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path
from typing import Annotated

import uvicorn
from annotated_types import Ge, Le
from fastapi import FastAPI
from pydantic import Strict

from north_lightning.errors import ConfigError
from north_lightning.human_evaluation.app import make_app
from north_lightning.human_evaluation.frames import make_frames
from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Study

Port = Annotated[int, Strict(), Ge(0), Le(65535)]


def serve_study(
    study: Path,
    host: str = "127.0.0.1",
    port: Port = 8600,
    frame_port: Port = 8601,
    url: str | None = None,
    frame_url: str | None = None,
) -> None:
    """Serve a study to its raters, and print a link for each of them.

    Args:
        study: The study folder that `human-eval prepare` wrote.
        host: The address to listen on. Others than loopback let in everyone who reaches this machine and has a link.
        port: Port of the pages; 0 takes a free one.
        frame_port: Port of the frames that show produced pages and pictures; 0 takes a free one.
        url: How browsers reach the pages, where that is not http://HOST:PORT: behind a proxy, or from other machines.
        frame_url: How browsers reach the frames. It should have another host name than `url`: a browser then runs what
            an attempt produced in a process of its own. By default localhost, where the pages are on 127.0.0.1.
    """
    opened, store = Study(study), Store(study / RATINGS)
    if host in ("0.0.0.0", "::") and (url is None or frame_url is None):
        raise ConfigError(
            f"url, frame_url: expected both, because host is '{host}', which no browser can open; got none"
        )
    with _listen(host, port, "port") as pages, _listen(host, frame_port, "frame_port") as frames:
        shown = f"[{host}]" if ":" in host else host
        other = "localhost" if host in ("127.0.0.1", "::1") else shown
        url = (url or f"http://{shown}:{pages.getsockname()[1]}").rstrip("/")
        frame_url = (frame_url or f"http://{other}:{frames.getsockname()[1]}").rstrip("/")
        if url == frame_url:
            raise ConfigError(f"frame_url: expected another one than url, got {url!r} for both")
        background = _server(make_frames(opened, url, frame_url))
        thread = threading.Thread(target=background.run, args=([frames],), daemon=True)
        thread.start()
        for rater, token in opened.raters.items():
            print(f"{rater}: {url}/r/{token}", flush=True)
        try:
            _server(make_app(opened, store, url, frame_url)).run([pages])
        finally:
            background.should_exit = True
            thread.join(5)


def _server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3, ws="none")
    )


def _listen(host: str, port: int, key: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # before the links are printed: an early request waits
    except OSError as error:
        listener.close()
        name, reason = ("host", os.strerror(error.errno or 0)) if error.errno != errno.EADDRINUSE else (key, "in use")
        raise ConfigError(f"{name}: expected an address to listen on, got {host}:{port}: {reason}") from error
    return listener
