"""Find and remove what no record names any more below the directory of runs. Knows no database but its references.

Removing is a rename into a trash directory on the same disk, then, TRASH_SECONDS later, the deletion: whatever has come
to be named meanwhile goes back to its place. A crash at any point leaves the path, or its whole content in the trash.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.jobs.references import References
from service.settings import Settings
from vlm_dft.run_dir import write_atomically

TRASH: Final = ".trash"
TRASH_SECONDS: Final = 600.0
_ORIGIN, _CONTENT = "origin", "content"
_DAY_SECONDS: Final = 86_400.0
_NEW_DAYS: Final = 1 / 24
_OUTPUTS: Final = ("checkpoints/*", "export", "dataset", ".*.tmp", "*/.*.tmp")
"""What is large in an attempt's run directory and useless once nothing names it; the rest is for readers."""


@dataclass(frozen=True)
class Garbage:
    """A file or directory that may go, and why."""

    path: Path
    reason: str
    bytes: int


def find(references: References, settings: Settings, now: float | None = None) -> list[Garbage]:
    """Everything below runs_dir and scores_dir that may go now, largest directories whole. Changes nothing."""
    now = time.time() if now is None else now
    found = [*_of_runs(references, settings, now), *_of_scores(references, settings, now)]
    return [Garbage(path, reason, size_of(path)) for path, reason in found]


def _of_runs(references: References, settings: Settings, now: float) -> Iterator[tuple[Path, str]]:
    if not settings.runs_dir.is_dir():
        return
    for run in sorted(settings.runs_dir.iterdir()):
        if run.name == TRASH or not run.is_dir() or run in references.unended:
            continue
        if run not in references.ended:
            days = (now - _newest(run)) / _DAY_SECONDS
            # A run directory may be younger than the references: its job was submitted since they were read.
            if days >= max(settings.unreferenced_days, _NEW_DAYS) and not references.protects(run):
                yield run, f"no job has this run directory, untouched for {days:.1f} days"
            continue
        yield from _of_ended_run(run, references, settings, (now - references.ended[run]) / _DAY_SECONDS)


def _of_ended_run(run: Path, references: References, settings: Settings, days: float) -> Iterator[tuple[Path, str]]:
    over = settings.retention_days is not None and days >= settings.retention_days
    if over:
        reason = f"its job ended {days:.1f} days ago, retention_days is {settings.retention_days:g}"
        yield from ((path, reason) for path in _unprotected(run, references))
    elif days >= settings.unreferenced_days:
        for attempt in sorted(path for path in run.iterdir() if path.is_dir()):
            for pattern in _OUTPUTS:
                for path in sorted(attempt.glob(pattern)):
                    if not references.protects(path):
                        yield path, f"no record names it, and its job ended {days:.1f} days ago"


def _unprotected(path: Path, references: References) -> Iterator[Path]:
    """The largest pieces of path that hold nothing named."""
    if not references.protects(path):
        yield path
    elif path in references.ancestors and path not in references.kept:
        for child in sorted(path.iterdir()):
            yield from _unprotected(child, references)


def _of_scores(references: References, settings: Settings, now: float) -> Iterator[tuple[Path, str]]:
    days_kept = settings.cache_retention_days
    if days_kept is None or not settings.scores_dir.is_dir():
        return
    for path in sorted(settings.scores_dir.iterdir()):
        days = (now - _newest(path)) / _DAY_SECONDS
        # A job that has not ended names the directory of all scores; single ones are made again when they are missed.
        if days >= days_kept and path not in references.kept:
            yield path, f"a shared score written {days:.1f} days ago, cache_retention_days is {days_kept:g}"


def discard(garbage: Garbage, settings: Settings) -> None:
    """Move it into the trash; a crash in between leaves it whole in one place or the other."""
    place = settings.runs_dir / TRASH / uuid.uuid4().hex
    place.mkdir(parents=True)
    write_atomically(place / _ORIGIN, str(garbage.path).encode())
    try:
        garbage.path.rename(place / _CONTENT)
    except FileNotFoundError:  # another collector was first
        shutil.rmtree(place, ignore_errors=True)


def empty_trash(references: References, settings: Settings, *, older_than_seconds: float = TRASH_SECONDS) -> list[Path]:
    """Delete what has lain in the trash for that long, and put back what is named again; returns what was put back."""
    restored = []
    trash = settings.runs_dir / TRASH
    for place in sorted(trash.iterdir()) if trash.is_dir() else []:
        origin, content = place / _ORIGIN, place / _CONTENT
        path = Path(origin.read_text()) if origin.exists() else None
        if path is not None and content.exists() and references.protects(path) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            content.rename(path)
            restored.append(path)
        elif time.time() - place.stat().st_mtime < older_than_seconds:
            continue
        _delete(content)
        shutil.rmtree(place, ignore_errors=True)
    return restored


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes at and below a path; links are not followed."""
    below = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(one.lstat().st_size for one in below if one.is_file() or one.is_symlink())


def _newest(path: Path) -> float:
    """When anything at or below the path was last changed."""
    return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
