"""How many requests a key may make: one token bucket per key, in the memory of this process.

A bucket holds one minute's requests and fills evenly, so a burst of a minute's worth passes and the average holds.
Several API processes count apart: the limit is then per process. Knows nothing about keys or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_MAX_BUCKETS = 10_000


@dataclass(frozen=True)
class Rate:
    """How one request was counted."""

    limit: int
    """Requests a minute."""
    remaining: int
    reset_seconds: float
    """Until the bucket is full again."""
    retry_after_seconds: float | None
    """None: the request may pass."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's names."""
        return [
            (b"x-ratelimit-limit-requests", b"%d" % self.limit),
            (b"x-ratelimit-remaining-requests", b"%d" % self.remaining),
            (b"x-ratelimit-reset-requests", b"%dms" % round(1000 * self.reset_seconds)),
        ]


class Buckets:
    """Every key's bucket; not for use by several threads at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._filled: dict[str, tuple[float, float]] = {}
        """By key: tokens, and when they were counted."""

    def take(self, key: str, per_minute: int) -> Rate:
        """Count one request of the key."""
        now = self._clock()
        tokens, then = self._filled.get(key, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - then) * per_minute / 60)
        allowed = tokens >= 1
        if allowed:
            tokens -= 1
        if len(self._filled) >= _MAX_BUCKETS and key not in self._filled:
            self._forget_full(now)
        self._filled[key] = (tokens, now)
        wait = None if allowed else (1 - tokens) * 60 / per_minute
        return Rate(per_minute, int(tokens), (per_minute - tokens) * 60 / per_minute, wait)

    def _forget_full(self, now: float) -> None:
        """Buckets untouched for a minute are full: forgetting them changes nothing."""
        self._filled = {key: (tokens, then) for key, (tokens, then) in self._filled.items() if now - then < 60}
