"""SIGTERM and SIGINT as a request that code can put off until it is at a good place to stop. Torch-free."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The process was asked to stop. Like KeyboardInterrupt no Exception, so that nobody handles it by accident."""


class StopRequest:
    """Whether somebody asked this process to stop.

    Once installed, a signal raises Interrupted in the main thread at once, except inside ``put_off``, where it is
    remembered for the code to look at.
    """

    def __init__(self) -> None:
        self.requested = False
        self._put_off = False

    def install(self) -> None:
        """Answer SIGTERM and SIGINT from now on."""
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._put_off:
            raise Interrupted(signal.Signals(number).name)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Inside, a signal only sets ``requested``: the code looks at it, and raises Interrupted when it is ready."""
        self._put_off = True
        try:
            yield
        finally:
            self._put_off = False
