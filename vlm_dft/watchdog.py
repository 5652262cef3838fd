"""A rank of a supervised run ends itself when its supervisor is gone. Torch-free.

Two independent signs, because each misses cases: the kernel's parent-death signal (Linux; not when a whole host or a
process in between is frozen), and a lease file whose number the supervisor keeps changing (any system; not faster than
its timeout). Knows nothing about jobs: whoever starts the process owns the file (``RunDir.write_lease``).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

EXIT_ABANDONED: Final = 76
"""Exit code of a process that ended itself because its supervisor was gone."""

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; does nothing where the kernel cannot.

    The signal follows the parent's *thread*: a supervisor must start the process from a thread that lives as long.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent:  # it died before the kernel was asked
        _abandon("the parent process is gone")


def follow_lease(path: Path, timeout_seconds: float) -> threading.Thread:
    """Start a thread that ends this process when the file's content has not changed for timeout_seconds.

    Time is this machine's monotonic clock from now on; the content is compared, never read as a time. A file that is
    absent or cannot be read counts as unchanged.
    """
    thread = threading.Thread(target=_follow, args=(path, timeout_seconds), name="lease", daemon=True)
    thread.start()
    return thread


def _follow(path: Path, timeout_seconds: float) -> None:
    seen, changed = _read(path), time.monotonic()
    while True:
        time.sleep(min(1.0, timeout_seconds / 10))
        content = _read(path)
        if content is not None and content != seen:
            seen, changed = content, time.monotonic()
        elif time.monotonic() - changed > timeout_seconds:
            _abandon(f"the lease {path} was not renewed for {timeout_seconds:g} seconds")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _abandon(reason: str) -> None:
    # No clean-up: another process may own the run by now, and every file of ours appears by rename.
    os.write(2, f"vlm_dft: {reason}; this process ends itself\n".encode())
    os._exit(EXIT_ABANDONED)
