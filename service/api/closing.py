"""Knows when this process was asked to end, so that what would stay open for days can end in good order.

uvicorn closes its listening socket at once, then waits for open answers before it runs the end of the lifespan: an
event stream that did not watch this would only end when uvicorn loses its patience. Knows no resource.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import anyio

RECONNECT_MILLISECONDS = 2000
"""What streams tell their readers when they end before their job: how long to wait before asking again."""


class Closing:
    """Turns true once, when SIGTERM or SIGINT comes."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    @property
    def has_begun(self) -> bool:
        return self._event.is_set()

    def begin(self) -> None:
        """From the event loop's own thread."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Sleep that long, or until closing begins; returns whether it has."""
        with anyio.move_on_after(seconds):
            await self._event.wait()
        return self.has_begun


@contextmanager
def watched_signals() -> Iterator[Closing]:
    """Within the event loop: a Closing that the server's own signals begin, beside what else they do.

    Outside the main thread, where no signal arrives, it never begins by itself.
    """
    closing = Closing()
    if threading.current_thread() is not threading.main_thread():
        yield closing
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, action in before.items():
        signal.signal(number, _also(action, loop, closing))
    try:
        yield closing
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _also(action: Any, loop: asyncio.AbstractEventLoop, closing: Closing) -> Any:
    def both(number: int, frame: FrameType | None) -> None:
        # Not in the handler itself, which may interrupt the event at any bytecode.
        loop.call_soon_threadsafe(closing.begin)
        if callable(action):
            action(number, frame)

    return both
