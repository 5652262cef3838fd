"""`vlm-dft up`: the whole service on this machine, as one supervisor of real processes.

Broker, migrations, API, janitor, workers; what dies starts again; Ctrl-C or SIGTERM drains, a second one kills. Knows
nothing about jobs: a worker that is killed loses no job, because leases and checkpoints are what brings it back.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import httpx

from cli import programs
from cli.children import Child, Program, stop_all
from service.jobs.database import open_database
from service.jobs.phases import Queue
from service.settings import Settings
from vlm_dft.errors import ConfigError

READY_SECONDS = 120.0
SHUTDOWN_MARGIN_SECONDS = 15.0
"""What a worker needs beside its trainer's grace: Celery's soft shutdown, the last rows, the exit."""
API_STARTS = 3
BROKER_SECONDS = 10.0
TEND_SECONDS = 0.25


class DataDirectoryInUseError(ConfigError):
    """Another `vlm-dft up` holds this data directory: stop it, or choose another with --data-dir."""

    code = "data_directory_in_use"


class PortInUseError(ConfigError):
    """The port is taken: choose another with --port."""

    code = "port_in_use"


class StartError(ConfigError):
    """The service did not become ready: see its logs."""

    code = "not_ready"


def up(
    settings: Settings,
    *,
    gpu_workers: int | None = None,
    cpu_workers: int = 1,
    ready: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Run the service until it is told to stop; returns the exit code: 0, or 1 when something had to be killed.

    gpu_workers: None: one per GPU, or one on the CPU. ready: called with the API's address once /readyz answers.
    stop: another way to say Ctrl-C, for callers in a thread of their own.
    Raises DataDirectoryInUseError, PortInUseError and StartError; nothing is left running then.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    with _lock(settings.data / "up.lock"), _Signals(stop) as signals:
        settings = settings.model_copy(update={"port": _checked_port(settings), "data_dir": settings.data})
        broker = None if settings.broker_url else programs.embedded_broker(settings)
        with _Service(settings, signals) as service:
            if broker is not None:
                settings = service.start_broker(broker)
            open_database(settings).upgrade()
            service.start(programs.api(settings), programs.janitor(settings))
            service.start(*programs.workers(settings, Queue.CPU, cpu_workers))
            service.start(*programs.workers(settings, Queue.GPU, gpu_workers))
            if service.wait_until_ready():
                address = programs.address(settings)
                _say(f"vlm-dft is ready at {address}  (data in {settings.data}; Ctrl-C stops it)")
                if ready is not None:
                    ready(address)
                service.tend_until_stopped()
    return 1 if service.killed else 0


def work(settings: Settings, queue: Queue, *, workers: int | None = None) -> int:
    """Run workers alone, against the settings' database and broker, until told to stop."""
    with _Signals(None) as signals, _Service(settings, signals) as service:
        service.start(*programs.workers(settings, queue, workers))
        service.tend_until_stopped()
    return 1 if service.killed else 0


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the data directory; the kernel lets go of it however this process ends. Raises DataDirectoryInUseError."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise DataDirectoryInUseError(
                f"{path.parent} is in use by another `vlm-dft up` (process {holder}): "
                "stop that one, or choose another directory with --data-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class _Signals:
    """Counts requests to stop: SIGINT and SIGTERM, and the caller's event. The second one means: at once."""

    def __init__(self, stop: threading.Event | None) -> None:
        self._stop = stop
        self._received = 0
        self._before: dict[int, object] = {}

    @property
    def count(self) -> int:
        return max(self._received, int(self._stop is not None and self._stop.is_set()))

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)  # pyright: ignore[reportArgumentType] - what signal.signal returned

    def _receive(self, _signum: int, _frame: FrameType | None) -> None:
        self._received += 1


class _Service:
    """The running processes. When its block ends they have drained, or were killed: none is left."""

    def __init__(self, settings: Settings, signals: _Signals) -> None:
        self._settings = settings
        self._signals = signals
        self._children: list[Child] = []
        self._broker: Child | None = None
        self._embedded: programs.Broker | None = None
        self.killed: list[str] = []

    def __enter__(self) -> _Service:
        (self._settings.data / "logs").mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        grace = self._settings.drain_seconds + SHUTDOWN_MARGIN_SECONDS
        if self._children:
            _say(f"stopping: running jobs write a checkpoint and resume later (up to {grace:g} s; Ctrl-C again kills)")
        asked = max(1, self._signals.count)
        self.killed = stop_all(self._children, grace, hurry=lambda: self._signals.count > asked)
        if self._broker is not None and self._embedded is not None:  # last: the workers give their messages back
            self.killed += stop_all([self._broker], BROKER_SECONDS, hurry=lambda: self._signals.count > asked)
            self._embedded.remove_socket()
        if self.killed:
            _say(f"killed: {', '.join(self.killed)}")

    def start(self, *parts: Program) -> None:
        started = [Child(program, _say) for program in parts]
        self._children += started
        for child in started:
            child.tend()

    def start_broker(self, broker: programs.Broker) -> Settings:
        """Start it and wait until it answers; returns the settings that name it. Raises StartError."""
        self._embedded = broker
        self._broker = Child(broker.program, _say)
        self._wait(
            lambda: _accepts(broker.socket_path),
            BROKER_SECONDS,
            f"the broker does not answer: see {broker.program.log_path}",
        )
        return self._settings.model_copy(update={"broker_url": broker.url})

    def wait_until_ready(self) -> bool:
        """False when told to stop meanwhile. Raises StartError."""
        url = f"{programs.address(self._settings)}/readyz"
        api = next(child for child in self._children if child.program.name == "api")
        what = f"{url} does not answer: see {api.program.log_path}"

        def is_over() -> bool:
            if api.num_starts > API_STARTS:
                raise StartError(f"the API ends as soon as it is started: see {api.program.log_path}")
            return _is_ready(client, url) or self._signals.count > 0

        with httpx.Client(timeout=2.0, trust_env=False) as client:
            self._wait(is_over, READY_SECONDS, what)
        return self._signals.count == 0

    def tend_until_stopped(self) -> None:
        while self._signals.count == 0:
            self._tend()
            time.sleep(TEND_SECONDS)

    def _tend(self) -> None:
        for child in (self._broker, *self._children):
            if child is not None:
                child.tend()

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise StartError(f"not within {seconds:g} s: {what}")
            self._tend()
            time.sleep(0.05)


def _accepts(path: Path) -> bool:
    """Whether a server listens on the unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _checked_port(settings: Settings) -> int:
    """The port, or a free one for 0. Raises PortInUseError: uvicorn's own message would be in a log file only."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise PortInUseError(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror}): choose another with --port"
            ) from None
        return probe.getsockname()[1]
