"""The Ray cluster of a run: one that is there, or one of this machine's own for as long as the process lives.

Ray's daemons listen beyond loopback whatever they are told, so every cluster must ask for a token: its own is made
here and known to this process and its children alone. Metrics of Ray's autoscaler can be read without it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from north_lightning.errors import ConfigError, InfrastructureError
from north_lightning.sandbox.scratch import Scratch

OBJECT_STORE_BYTES = 512 << 20
NAMESPACE = "north_lightning"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def connect(address: str | None) -> Any:
    """The module ``ray``, connected to the cluster at ``address``, or to one that is started here.

    Raises:
        ConfigError: Ray is not installed; the cluster would be open to everybody who reaches it.
        InfrastructureError: there is no such cluster, or it does not know our token.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"Ray cannot be imported ({error}): pip install north_lightning[ray]") from error
    if ray.is_initialized():
        return ray
    if address is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    _check_token()
    _read_token_again()
    settings: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address is None:
            _start_own(ray, settings)
        else:
            ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise InfrastructureError(f"Ray: no cluster at {address or 'this machine'}: {error}") from error
    finally:
        for number, handler in handlers.items():  # what a signal means is the trainer's to say
            if handler is not None:
                signal.signal(number, handler)
    return ray


def _read_token_again() -> None:
    """Ray reads its settings when it is imported, which may have been long ago (vLLM does)."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _start_own(ray: Any, settings: dict[str, Any]) -> None:
    folder = Scratch("ray").path  # short: the paths of its sockets have a limit
    # Not atexit, which processes of multiprocessing leave out; they run in this order.
    Finalize(None, ray.shutdown, exitpriority=11)
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=10)
    ray.init(
        "local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=str(folder), **settings
    )


def as_here() -> dict[str, Any]:
    """Options of an actor that shall find the modules that this process finds, plug-ins too."""
    return {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}}


def _check_token() -> None:
    if os.environ.get("RAY_AUTH_MODE") != "token" or not (
        any(os.environ.get(name) for name in _TOKENS) or (Path.home() / ".ray" / "auth_token").is_file()
    ):
        raise ConfigError(
            "address: expected a Ray cluster with token authentication, because whoever reaches one without can "
            "execute code on it; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here and where the cluster is started"
        )
