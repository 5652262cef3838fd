"""What `vlm-dft up` runs: the command and environment of each process of the service, and the embedded broker.

Knows nothing about watching them (``cli.children``) or about the order in which they start and stop (``cli.up``).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from cli.children import Program
from service.jobs.phases import Queue
from service.settings import Settings
from worker.inventory import visible_gpus

# sockaddr_un holds 108 bytes on Linux and 104 on macOS, with the terminating zero.
LONGEST_SOCKET_PATH = 100
TEMPORARY_PREFIX = "vlm-dft-broker-"


@dataclass(frozen=True)
class Broker:
    """The embedded broker: a server of the Redis protocol on a unix socket."""

    program: Program
    socket_path: Path

    @property
    def url(self) -> str:
        return f"redis+socket://{self.socket_path}"

    def remove_socket(self) -> None:
        """Remove a temporary directory that was made for the socket."""
        self.socket_path.unlink(missing_ok=True)
        if self.socket_path.parent.name.startswith(TEMPORARY_PREFIX):
            self.socket_path.parent.rmdir()


def address(settings: Settings) -> str:
    """Where a client on this machine finds the API."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - a comparison
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def environment_of(settings: Settings, **extra: str) -> dict[str, str]:
    """Our environment with these settings in it, so that every process reads the same ones."""
    chosen = {f"VLM_DFT_{name.upper()}": _text(getattr(settings, name)) for name in settings.model_fields_set}
    chosen["VLM_DFT_DATA_DIR"] = str(settings.data)
    return os.environ | {name: value for name, value in chosen.items() if value is not None} | extra


def _text(value: Any) -> str | None:
    """As pydantic-settings reads it back."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return json.dumps([str(item) for item in value])
    return None if value is None else str(value)


def log_path(settings: Settings, name: str) -> Path:
    return settings.data / "logs" / f"{name}.log"


def embedded_broker(settings: Settings) -> Broker | None:
    """A valkey-server or redis-server from PATH, on a unix socket that only we may open; None: there is none."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        return None
    directory = settings.data / "broker"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    socket = directory / "broker.sock"
    if len(os.fsencode(socket)) > LONGEST_SOCKET_PATH:
        socket = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX)) / "broker.sock"  # mkdtemp is 0700 too
    # Nothing is kept over a restart: the database is the truth, and the janitor publishes what got lost.
    options = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(directory)]
    options += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction", "--daemonize", "no"]
    return Broker(Program("broker", [binary, *options], dict(os.environ), log_path(settings, "broker")), socket)


def api(settings: Settings) -> Program:
    serve = ["-m", "uvicorn", "--factory", "service.api.app:create_app", "--no-access-log"]
    where = ["--host", settings.host, "--port", str(settings.port), "--timeout-graceful-shutdown", "5"]
    return Program("api", [sys.executable, *serve, *where], environment_of(settings), log_path(settings, "api"))


def janitor(settings: Settings) -> Program:
    command = [sys.executable, "-m", "worker.janitor"]
    return Program("janitor", command, environment_of(settings), log_path(settings, "janitor"))


def workers(settings: Settings, queue: Queue, num_workers: int | None) -> list[Program]:
    """Celery workers for one queue; None: one per GPU that we may use, or one where there is none.

    GPU workers share the GPUs out in turn.
    """
    gpus = visible_gpus() if queue is Queue.GPU else []
    number = max(1, len(gpus)) if num_workers is None else num_workers
    programs = []
    for index in range(number):
        name = f"{queue}-worker-{index}"
        extra = {"REMAP_SIGTERM": "SIGQUIT"}
        if gpus:
            extra["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)].uuid
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-P", "prefork", "-c", "1"]
        command += ["-Q", str(queue), "-n", f"{name}@%h", "--without-mingle", "--without-gossip"]
        programs.append(Program(name, command, environment_of(settings, **extra), log_path(settings, name)))
    return programs
