"""A pool child ends when its worker's main process does, and not a moment earlier.

Celery ties the child to its parent by the kernel's parent-death signal, which follows the parent's *thread*. A child
that replaced a lost one was forked by the pool's supervisor thread; a shutdown ends that thread first, and the child is
killed in the middle of its drain. A pipe whose write end only the main process holds says exactly what is meant.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_ends: list[int] = []


def hold() -> None:
    """In the main process, before it forks."""
    _ends[:] = os.pipe()


def follow() -> None:
    """In the pool child, after the fork: be killed as soon as no process holds the pipe's other end."""
    read, write = _ends
    os.close(write)
    threading.Thread(target=_wait_for_end, args=(read,), name="lifeline", daemon=True).start()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


def _wait_for_end(read: int) -> None:
    os.read(read, 1)  # nobody ever writes: it returns at end of file
    os.kill(os.getpid(), signal.SIGKILL)  # our trainer has a parent-death signal of its own, and follows
