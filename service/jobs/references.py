"""Which paths the records name: what garbage collection must never touch. Reads only; deletes nothing.

A path is named by a file, its dataset, a model, a checkpoint, or anywhere in the configuration of a job that has not
ended. The whole run directory of such a job belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.jobs.phases import TERMINAL
from service.jobs.tables import Checkpoint, File, Job, Model


@dataclass(frozen=True)
class References:
    """What the records say at one moment."""

    kept: frozenset[Path]
    """Named paths: each stays, and everything below it."""
    ancestors: frozenset[Path]
    """Every directory above a named path."""
    ended: dict[Path, float]
    """Run directories of jobs that have ended, and when."""
    unended: frozenset[Path]
    """Run directories of jobs that have not."""

    @classmethod
    def of(cls, named: Iterable[Path], ended: dict[Path, float], unended: Iterable[Path]) -> References:
        unended = frozenset(unended)
        kept = frozenset(named) | unended
        return cls(kept, frozenset(parent for path in kept for parent in path.parents), ended, unended)

    def protects(self, path: Path) -> bool:
        """Whether something named is at, above or below the path."""
        return path in self.kept or path in self.ancestors or any(parent in self.kept for parent in path.parents)


def read_references(s: Session) -> References:
    """The references that hold now."""
    named: set[Path] = set()
    for statement in (
        select(Model.path).where(Model.deleted_at.is_(None)),
        select(Checkpoint.path),
        select(File.path).where(File.deleted_at.is_(None)),
        select(File.dataset_path).where(File.deleted_at.is_(None)),
    ):
        named |= {Path(path) for path in s.scalars(statement) if path is not None}
    unended: set[Path] = set()
    for run_path, config in s.execute(select(Job.run_path, Job.config).where(Job.phase.not_in(sorted(TERMINAL)))):
        unended.add(Path(run_path))
        named |= set(paths_in(config))
    over = select(Job.run_path, Job.finished_at).where(Job.phase.in_(sorted(TERMINAL)))
    ended = {Path(path): finished_at or 0.0 for path, finished_at in s.execute(over)}
    return References.of(named, ended, unended)


def paths_in(document: Any) -> Iterator[Path]:
    """Every absolute path anywhere in a document."""
    if isinstance(document, str):
        if document.startswith("/"):
            yield Path(document)
    elif isinstance(document, dict):
        for value in document.values():
            yield from paths_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from paths_in(value)
