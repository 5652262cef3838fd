"""Before an attempt: is a trainer of an earlier attempt still on our GPU? Then wait for it to go, or end it.

A rank ends itself when its lease is not renewed, so a stray is rare: a process stuck in a driver call, or one whose
supervisor died a moment ago. A trainer whose lease file still changes belongs to a living worker that shares the
GPU on purpose: it is left alone. Knows nothing about jobs; a process is ours when its command line says so.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from vlm_dft.run_dir import RunDir

log = structlog.get_logger(__name__)
POLL_SECONDS = 0.5


def run_dir_of(pid: int, runs_dir: Path) -> RunDir | None:
    """The run directory that process works in, when it is a trainer of this service; None for any other process."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or of another process namespace
        return None
    paths = [Path(os.fsdecode(argument)) for argument in arguments if argument.startswith(os.fsencode(runs_dir))]
    return RunDir(paths[0]) if paths else None


def clear_strays(
    processes: Callable[[], set[int]],
    runs_dir: Path,
    patience_seconds: float,
    give_up: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Wait until no trainer of ours without a living supervisor is among the processes; kill what outlives patience.

    ``patience_seconds`` is how long a trainer may live without a renewed lease. Returns the killed process ids.
    """
    first_seen: dict[int, tuple[float, bytes]] = {}
    killed: list[int] = []
    while True:
        waiting = False
        for pid in processes():
            run = run_dir_of(pid, runs_dir)
            if run is None:
                continue
            lease = run.lease_path.read_bytes() if run.lease_path.exists() else b""
            since, lease_then = first_seen.setdefault(pid, (time.monotonic(), lease))
            if lease != lease_then:  # renewed meanwhile: somebody supervises it
                continue
            waiting = True
            if time.monotonic() - since > patience_seconds:
                log.warning("killing a stray trainer on our GPU", pid=pid, run=str(run.path))
                _kill(pid)
                killed.append(pid)
        if not waiting or give_up():
            return killed
        time.sleep(POLL_SECONDS)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it went by itself
        os.kill(pid, signal.SIGKILL)
