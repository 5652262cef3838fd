"""What may go from the object store, by the same references as the disk's garbage (``garbage``).

An object cannot be renamed into a trash: the manifest of a directory goes first, after which nobody sees the rest.
Objects of runs that no job has are left to the bucket's own life cycle rules.
"""

from __future__ import annotations

import time

from service.jobs.garbage import Garbage
from service.jobs.references import References
from service.settings import Settings
from service.storage import Storage

_DAY_SECONDS = 86_400.0
_OUTPUTS = {"checkpoints": 4, "export": 3, "dataset": 3}
"""Directories of a run directory that are put and removed whole, and how many names below runs/ theirs have."""


def find_stored(storage: Storage, references: References, settings: Settings) -> list[Garbage]:
    """Directories and files of ended jobs in the store that may go now. Changes nothing."""
    now = time.time()
    found: dict[tuple[str, ...], tuple[int, str]] = {}
    for key, size in storage.listing(settings.runs_dir):
        parts = tuple(key.split("/"))
        ended_at = references.ended.get(settings.runs_dir / parts[0])
        if ended_at is None or len(parts) < 3:
            continue
        days = (now - ended_at) / _DAY_SECONDS
        depth = _OUTPUTS.get(parts[2])
        over = settings.retention_days is not None and days >= settings.retention_days
        if over or (depth is not None and days >= settings.unreferenced_days):
            unit = parts[:depth] if depth is not None else parts
            if not references.protects(settings.runs_dir.joinpath(*unit)):
                before = found.get(unit, (0, ""))[0]
                found[unit] = (before + size, f"no record names it, and its job ended {days:.1f} days ago")
    return [
        Garbage(settings.runs_dir.joinpath(*unit), f"in the object store: {reason}", size)
        for unit, (size, reason) in sorted(found.items())
    ]
