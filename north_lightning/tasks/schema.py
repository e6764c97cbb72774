"""What a Harbor ``task.toml`` may say, in every published schema version (1.0 to 1.4).

In: a parsed TOML document. Out: a ``TaskConfig``, older spellings mapped to the present ones, or a ``ValueError`` of
pydantic's that names each field. Keys that are not known are ignored, as Harbor does: tasks carry keys of other tools.
No file is read here (``check``).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SERVICE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_PACKAGE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*/[a-zA-Z0-9][a-zA-Z0-9._-]*")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TOPOLOGY = re.compile(r"[1-9]\d*(x[1-9]\d*)+")
_STEP_CHARACTERS = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[1-9¹²³])", re.IGNORECASE)
_MEGABYTES = {"G": 1024.0, "M": 1.0, "K": 1 / 1024}
_MAX_NAME_BYTES = 255


# ---- values --------------------------------------------------------------------------------------------------------


def _allowed_host(entry: str) -> str:
    host = entry.strip().lower().rstrip(".")
    if "/" in host and "%" not in host:
        return ip_network(host, strict=True).compressed
    if ":" in host and "%" not in host:
        return ip_address(host).compressed
    name = host.removeprefix("*.")
    if not name or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(f"expected a host name, *.host, address or network, got {entry!r}")
    if name != host and name.replace(".", "").isdigit():
        raise ValueError(f"expected a host name after the '*.', got {entry!r}")
    return host


def _service(name: str) -> str:
    if not _SERVICE.fullmatch(name.strip()):
        raise ValueError(f"expected a compose service name, got {name!r}")
    return name.strip()


def _package(name: str) -> str:
    if not _PACKAGE.fullmatch(name) or ".." in name:
        raise ValueError(f"expected org/name, got {name!r}")
    return name


def _step_name(name: str) -> str:
    is_odd = not name.strip() or name.endswith((".", " ")) or _STEP_CHARACTERS.search(name)
    if is_odd or _DEVICE.fullmatch(name.partition(".")[0].rstrip(" ")) or len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(f"expected a portable directory name, got {name!r}")
    return name


def _cpus(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return value


def _topology(value: str) -> str:
    if not _TOPOLOGY.fullmatch(value.strip()):
        raise ValueError(f"expected dimensions such as 2x4, got {value!r}")
    return value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise ValueError(f"expected names of variables, got {name!r}")
    return values


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _transport(value: Any) -> Any:
    return "streamable-http" if value == "http" else value


def _inside(path: str) -> str:
    if ".." in PurePosixPath(path).parts:
        raise ValueError(f"expected a path without '..', got {path!r}")
    return path


def _destination(path: str) -> str:
    if path and ("\\" in path or PurePosixPath(path).is_absolute() or not PurePosixPath(path).parts):
        raise ValueError(f"expected a relative path with forward slashes, got {path!r}")
    if path.rstrip("/") == "manifest.json":
        raise ValueError("manifest.json is reserved for the list of what was collected")
    return _inside(path)


Variables = Annotated[dict[str, str], AfterValidator(_variables)]
Service = Annotated[str, AfterValidator(_service)]
Host = Annotated[str, AfterValidator(_allowed_host)]
User = str | int | None
NetworkMode = Literal["public", "no-network", "allowlist"]


# ---- sections ------------------------------------------------------------------------------------------------------


class Author(BaseModel):
    name: str
    email: str | None = None


class Package(BaseModel):
    name: Annotated[str, AfterValidator(_package)]
    version: str | None = Field(default=None, min_length=1)
    description: str = ""
    authors: list[Author] = []
    keywords: list[str] = []


class NetworkPolicy(BaseModel):
    network_mode: NetworkMode | None = None
    allowed_hosts: list[Host] | None = None

    @model_validator(mode="after")
    def _hosts_need_the_allowlist(self) -> NetworkPolicy:
        if self.allowed_hosts and self.network_mode != "allowlist":
            raise ValueError("allowed_hosts goes with network_mode = 'allowlist' only")
        return self


class Phase(NetworkPolicy):
    """[agent] and [verifier]: where the mode is left out there is nothing to allow."""

    user: User = None

    @model_validator(mode="after")
    def _hosts_need_a_mode(self) -> Phase:
        if self.allowed_hosts is not None and self.network_mode is None:
            raise ValueError("allowed_hosts goes with network_mode = 'allowlist' only")
        return self


class Agent(Phase):
    timeout_sec: float | None = None


class Solution(BaseModel):
    env: Variables = {}


class Healthcheck(BaseModel):
    command: str
    interval_sec: float = 5.0
    timeout_sec: float = 30.0
    start_period_sec: float = 0.0
    start_interval_sec: float = 5.0
    retries: int = 3


class Tpu(BaseModel):
    type: str = Field(min_length=1)
    topology: Annotated[str, AfterValidator(_topology)]


class MCPServer(BaseModel):
    name: str
    transport: Annotated[Literal["stdio", "sse", "streamable-http"], BeforeValidator(_transport)] = "sse"
    url: str | None = None
    command: str | None = None
    args: list[str] = []
    headers: dict[str, str] = {}

    @model_validator(mode="after")
    def _has_what_its_transport_needs(self) -> MCPServer:
        if self.transport == "stdio" and (not self.command or self.headers):
            raise ValueError("transport 'stdio' needs a command and takes no headers")
        if self.transport != "stdio" and not self.url:
            raise ValueError(f"transport {self.transport!r} needs a url")
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(name) or "\r" in value or "\n" in value:
                raise ValueError(f"headers: expected an HTTP header, got {name!r}")
        return self


class Environment(NetworkPolicy):
    """[environment], and [verifier.environment]. ``memory``, ``storage`` (texts such as 2G) and ``allow_internet`` are
    the older spellings of ``memory_mb``, ``storage_mb`` and ``network_mode``."""

    network_mode: NetworkMode = "public"
    build_timeout_sec: float = 600.0
    docker_image: str | None = None
    os: Annotated[Literal["linux", "windows"], BeforeValidator(_lower)] = "linux"
    cpus: Annotated[float | None, AfterValidator(_cpus)] = None
    memory_mb: int | None = None
    storage_mb: int | None = None
    gpus: int | None = None
    gpu_types: list[str] | None = None
    tpu: Tpu | None = None
    mcp_servers: list[MCPServer] = []
    env: Variables = {}
    skills_dir: str | None = None
    healthcheck: Healthcheck | None = None
    workdir: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _older_spellings(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for name in ("memory", "storage"):
            size = data.pop(name, None)
            if isinstance(size, str):
                megabytes = _megabytes(size)
                if data.setdefault(f"{name}_mb", megabytes) != megabytes:
                    raise ValueError(f"{name} = {size!r} and {name}_mb = {data[f'{name}_mb']!r} contradict each other")
        allow = data.pop("allow_internet", None)
        if allow is not None and not isinstance(allow, bool):
            raise ValueError(f"allow_internet: expected true or false, got {allow!r}")
        if allow is not None and "network_mode" not in data and data.get("allowed_hosts") is None:
            data["network_mode"] = "public" if allow else "no-network"
        return data


class Collect(BaseModel):
    command: str
    service: Service = "main"
    timeout_sec: float = 60.0
    user: User = None


class Verifier(Phase):
    timeout_sec: float = 600.0
    env: Variables = {}
    environment_mode: Literal["shared", "separate"] | None = None
    environment: Environment | None = None
    collect: list[Collect] = []

    @property
    def mode(self) -> Literal["shared", "separate"] | None:
        """What this section says, or None for what the section above it says."""
        return self.environment_mode or ("separate" if self.environment is not None else None)

    @model_validator(mode="after")
    def _shared_has_no_environment(self) -> Verifier:
        if self.environment_mode == "shared" and self.environment is not None:
            raise ValueError("environment_mode = 'shared' goes without [verifier.environment]")
        return self


class Artifact(BaseModel):
    source: Annotated[str, AfterValidator(_inside)]
    destination: Annotated[str, AfterValidator(_destination)] | None = None
    exclude: list[str] = []
    service: Service | None = None

    @model_validator(mode="after")
    def _other_services_need_absolute_paths(self) -> Artifact:
        is_absolute = self.source.startswith("/") or re.match(r"[A-Za-z]:[/\\]", self.source)
        if self.service not in (None, "main") and not is_absolute:
            raise ValueError(f"source {self.source!r} of service {self.service!r} must be an absolute path")
        return self


class TaskStep(BaseModel):
    name: Annotated[str, AfterValidator(_step_name)]
    agent: Agent = Agent()
    verifier: Verifier = Verifier()
    min_reward: float | dict[str, float] | None = None
    healthcheck: Healthcheck | None = None
    artifacts: list[Annotated[str, AfterValidator(_inside)] | Artifact] = []


class TaskConfig(BaseModel):
    schema_version: str = "1.4"
    task: Package | None = None
    metadata: dict[str, Any] = {}
    verifier: Verifier = Verifier()
    agent: Agent = Agent()
    environment: Environment = Environment()
    solution: Solution = Solution()
    source: str | None = None
    multi_step_reward_strategy: Literal["mean", "final"] | None = None
    steps: list[TaskStep] | None = None
    artifacts: list[Annotated[str, AfterValidator(_inside)] | Artifact] = []

    @model_validator(mode="before")
    @classmethod
    def _older_version_key(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "version" in data:
            data = dict(data)
            data.setdefault("schema_version", data.pop("version"))
        return data

    @model_validator(mode="after")
    def _steps_have_different_names(self) -> TaskConfig:
        names = [unicodedata.normalize("NFC", step.name).casefold() for step in self.steps or ()]
        if len(set(names)) < len(names):
            raise ValueError("steps: expected names that differ in more than case")
        return self


def _megabytes(size: str) -> int:
    text = size.strip().upper()
    if text[-1:] not in _MEGABYTES:
        raise ValueError(f"expected a size such as 2G or 512M, got {size!r}")
    return int(float(text[:-1]) * _MEGABYTES[text[-1]])
