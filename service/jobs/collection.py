"""One round of retention and garbage collection: records first, then what no record names, then the trash.

Safe to run twice at once, and to be killed anywhere: the next round goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog

from service.jobs import garbage
from service.jobs.database import Database
from service.jobs.garbage import Garbage
from service.jobs.references import read_references
from service.jobs.retention import forget_history, forget_pruned, give_up_checkpoints, give_up_files
from service.jobs.stored_garbage import find_stored
from service.settings import Settings
from service.storage import delete, open_storage

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Collected:
    """What one round did."""

    files: list[str]
    """Ids of files that were given up."""
    checkpoints: list[str]
    """Names of checkpoints that were given up."""
    garbage: list[Garbage]
    """What went into the trash."""
    restored: list[Path]
    """What came back from it, for it had become named again."""


def preview(database: Database, settings: Settings) -> list[Garbage]:
    """What a round would remove from disk now, were no record given up. Changes nothing."""
    with database.read() as s:
        references = read_references(s)
    storage = open_storage(settings)
    stored = [] if storage is None else find_stored(storage, references, settings)
    return garbage.find(references, settings) + stored


def collect(
    database: Database, settings: Settings, *, trash_seconds: float = garbage.TRASH_SECONDS, say: bool = True
) -> Collected:
    """One round. trash_seconds: how long what was removed can still come back."""
    with database.write() as s:
        files = give_up_files(s, settings)
        checkpoints = give_up_checkpoints(s, settings)
    if settings.storage_url is None:  # with one, a checkpoint's record goes before its bytes do
        checkpoints += forget_pruned(database)
    forget_history(database, settings)
    ids = [file.id for file in files]
    for file in files:
        if not file.registered:
            delete(Path(file.path))
    with database.read() as s:
        references = read_references(s)
    found = garbage.find(references, settings)
    for one in found:
        garbage.discard(one, settings)
        if say:
            log.info("garbage", path=str(one.path), bytes=one.bytes, reason=one.reason)
    with database.read() as s:  # again: a job may have been submitted that names what was just found
        references = read_references(s)
    restored = garbage.empty_trash(references, settings, older_than_seconds=trash_seconds)
    if (storage := open_storage(settings)) is not None:
        for one in find_stored(storage, references, settings):
            storage.remove(one.path)
            found.append(one)
            if say:
                log.info("garbage", path=str(one.path), bytes=one.bytes, reason=one.reason)
    if say and (files or checkpoints or restored):
        log.info("given up", files=ids, checkpoints=checkpoints, restored=[str(path) for path in restored])
    return Collected(ids, checkpoints, found, restored)
