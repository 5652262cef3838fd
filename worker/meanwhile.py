"""Do something that takes its time in a thread, and call something else again and again until it is done."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait


def meanwhile(work: Callable[[], None], beat: Callable[[], None], pause_seconds: float) -> None:
    """Raises what ``work`` raises."""
    with ThreadPoolExecutor(1, thread_name_prefix="meanwhile") as threads:
        future = threads.submit(work)
        while not future.done():
            beat()
            wait([future], timeout=pause_seconds)
    future.result()
