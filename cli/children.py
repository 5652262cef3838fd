"""Child processes of `vlm-dft up`: started, watched, started again with growing pauses, ended.

A child leads a session of its own, so that a Ctrl-C in the terminal reaches the supervisor alone, and the kernel kills
it when the supervisor dies (Linux). Knows no program by name.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
SETTLED_SECONDS = 60.0
"""A child that lived this long starts again at once when it ends."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


@dataclass(frozen=True)
class Program:
    """What to run, and where its output goes."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log_path: Path


class Child:
    """One program that is to be running until ``ask_to_stop``."""

    def __init__(self, program: Program, say: Callable[[str], None]) -> None:
        self.program = program
        self.num_starts = 0
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause = FIRST_PAUSE_SECONDS
        self._start_at = 0.0
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def tend(self) -> None:
        """Start it when it is time to; notice when it has ended."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._process = None
            if now - self._started_at > SETTLED_SECONDS:
                self._pause = FIRST_PAUSE_SECONDS
            self._start_at = now + self._pause
            if not self._stopping:
                again = f"starting it again in {self._pause:g} s"
                self._say(f"{self.program.name} ended ({_words(code)}): {again}; see {self.program.log_path}")
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        if not self._stopping and now >= self._start_at:
            self._start(now)

    def _start(self, now: float) -> None:
        self.num_starts += 1
        self._started_at = now
        with self.program.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.program.environment,
                start_new_session=True,
                # Only a system call on a library that is already loaded: safe between fork and exec.
                preexec_fn=partial(_die_with, os.getpid()) if _libc is not None else None,
            )

    def ask_to_stop(self) -> None:
        """SIGTERM, and no more starts."""
        self._stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._stopping = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def stop_all(children: Sequence[Child], grace_seconds: float, hurry: Callable[[], bool]) -> list[str]:
    """Ask all children to stop and wait; kill what is left after the grace, or at once when ``hurry`` says so.

    Returns the names of those that had to be killed.
    """
    for child in children:
        child.ask_to_stop()
    deadline = time.monotonic() + grace_seconds
    while not all(child.has_ended() for child in children):
        if time.monotonic() > deadline or hurry():
            break
        time.sleep(0.05)
    late = [child for child in children if not child.has_ended()]
    for child in late:
        child.kill()
    return [child.program.name for child in late]


def _die_with(parent: int) -> None:
    assert _libc is not None, "only given to Popen where there is a prctl"
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def _words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
