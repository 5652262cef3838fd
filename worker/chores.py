"""What the janitor does beside its rounds, each in a thread of its own: slow work that must not delay a reaping.

A chore's errors are logged and its next round comes; ``wait`` waits for the round under way, within reason. An error
that nobody thought of ends the chore, and ``check`` says so: a janitor that does half its work must not look well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError

from service.storage import StorageError

log = structlog.get_logger(__name__)
STOP_SECONDS = 12.0
"""How long a round under way may take to end; what it leaves half done is done again by the next janitor."""


class Chore:
    """One function, called again and again with a pause between."""

    def __init__(self, name: str, work: Callable[[], object], every_seconds: float) -> None:
        self._name = name
        self._work = work
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        """No more rounds."""
        self._stop.set()

    def wait(self) -> None:
        """Until the round under way has ended."""
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            log.warning("a chore did not end in time and is cut short", chore=self._name)

    def check(self) -> None:
        """Raises RuntimeError when the chore has died; the traceback was printed then."""
        if not self._thread.is_alive() and not self._stop.is_set():
            raise RuntimeError(f"the chore {self._name!r} has died")

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._work()
            except (OperationalError, InterfaceError) as error:
                log.warning("the database is out of reach: trying again", chore=self._name, error=str(error.orig))
            except (OSError, StorageError) as error:
                log.warning("a chore failed and will be repeated", chore=self._name, error=str(error))
            self._stop.wait(self._every_seconds)
