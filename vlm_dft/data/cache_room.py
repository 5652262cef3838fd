"""Room in a directory of files that can be made again: what nobody uses goes, the longest unused first.

    ROOT/.in-use/<random>     the files that one process uses, by path, locked as long as it lives
    ROOT/.in-use/lock         held while somebody looks, removes and says what it uses

A process that dies takes its lock along, so nothing is in use for ever. Knows nothing about what the files hold.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vlm_dft.run_dir import disk_errors

_IN_USE: Final = ".in-use"
_MUTEX: Final = "lock"
_ABANDONED_AFTER_SECONDS: Final = 3600.0


@dataclass
class _Use:
    """What this process uses of one directory."""

    path: Path
    descriptor: int
    """Never closed. A child that was forked holds its lock as well."""
    wanted: set[str] = field(default_factory=set)


_uses: dict[Path, _Use] = {}


def hold(root: Path, wanted: Collection[Path], *, needed_bytes: int, budget_bytes: float) -> None:
    """Use files below root, there already or to be written, from now until this process ends.

    Files that no process uses are removed until needed_bytes more keep within the budget. Raises DiskFullError.
    """
    with disk_errors(root), _alone(root):
        if root not in _uses:
            _uses[root] = _begin(root)
        use = _uses[root]
        use.wanted.update(str(path.relative_to(root)) for path in wanted)
        _make_room(root, use.wanted | _wanted_by_others(root, use), budget_bytes - needed_bytes)
        os.ftruncate(use.descriptor, 0)
        os.pwrite(use.descriptor, "\n".join(sorted(use.wanted)).encode(), 0)
        for path in wanted:
            if path.exists():
                os.utime(path)


def size_of(root: Path) -> int:
    """Bytes below root."""
    return sum(status.st_size for _, status in _files(root))


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    (root / _IN_USE).mkdir(parents=True, exist_ok=True)
    with (root / _IN_USE / _MUTEX).open("w") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        yield


def _begin(root: Path) -> _Use:
    path = root / _IN_USE / uuid.uuid4().hex
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return _Use(path, descriptor)


def _wanted_by_others(root: Path, mine: _Use) -> set[str]:
    """Of processes that live; the lists of others are removed."""
    wanted: set[str] = set()
    for path in (root / _IN_USE).iterdir():
        if path in (mine.path, root / _IN_USE / _MUTEX):
            continue
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wanted.update(file.read().split("\n"))
            else:
                path.unlink()
    return wanted


def _make_room(root: Path, wanted: Collection[str], allowed_bytes: float) -> None:
    found = sorted(_files(root), key=lambda item: item[1].st_mtime)
    total = sum(status.st_size for _, status in found)
    for path, status in found:
        if total <= allowed_bytes:
            return
        if str(path.relative_to(root)) not in wanted and path.name != "settings.json":
            path.unlink(missing_ok=True)
            total -= status.st_size


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All but what is kept here; what a killed writer has left half-written is removed."""
    now = time.time()
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name != _IN_USE]
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
