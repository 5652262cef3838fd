"""Room in a directory of files that can be made again: what nobody uses goes, the longest unused first.

A process that counts on files of the directory holds a shared lock on it until it ends, so that a run of days keeps
what it has found; only who has the lock for itself may remove anything. Knows nothing about what the files hold.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vlm_dft.run_dir import disk_errors

_LOCK_NAME: Final = ".in-use"
_KEPT_NAMES: Final = (_LOCK_NAME, "settings.json")
_ABANDONED_AFTER_SECONDS: Final = 3600.0


@dataclass
class _Use:
    """What this process uses of one directory. A child that was forked holds the lock as well."""

    lock: int
    """A file descriptor that is never closed."""
    wanted: set[Path] = field(default_factory=set)


_uses: dict[Path, _Use] = {}


def hold(root: Path, wanted: Collection[Path], *, needed_bytes: int, budget_bytes: float) -> None:
    """Use files of root, there already or to be written, from now until this process ends.

    Where nobody else uses root, files that are not wanted are removed until needed_bytes more keep within the budget.
    """
    if root not in _uses:
        with disk_errors(root):
            _uses[root] = _Use(os.open(root / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666))
    use = _uses[root]
    use.wanted.update(wanted)
    try:
        fcntl.flock(use.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        _make_room(root, use.wanted, budget_bytes - needed_bytes)
    fcntl.flock(use.lock, fcntl.LOCK_SH)  # waits for somebody who is removing
    for path in wanted:
        if path.exists():
            os.utime(path)


def size_of(root: Path) -> int:
    """Bytes below root."""
    return sum(status.st_size for _, status in _files(root))


def _make_room(root: Path, wanted: Collection[Path], allowed_bytes: float) -> None:
    found = sorted(_files(root), key=lambda item: item[1].st_mtime)
    total = sum(status.st_size for _, status in found)
    for path, status in found:
        if total <= allowed_bytes:
            return
        if path not in wanted and path.name not in _KEPT_NAMES:
            path.unlink(missing_ok=True)
            total -= status.st_size


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file; what a killed writer has left half-written is removed."""
    now = time.time()
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            try:
                status = path.stat()
                if name.endswith(".tmp") and now - status.st_mtime > _ABANDONED_AFTER_SECONDS:
                    path.unlink()
                    continue
            except FileNotFoundError:  # another process's, renamed meanwhile
                continue
            yield path, status
