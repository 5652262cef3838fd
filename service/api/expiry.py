"""Remove what has expired or was orphaned: files, uploads and their parts, bytes that no record knows.

Runs now and then in each API process, and is safe to run twice at once. It deletes bytes only below settings.files_dir
and the datasets of files that are deleted; what a record refers to stays.
"""

from __future__ import annotations

import time
from pathlib import Path

import structlog
from sqlalchemy import select

from service import storage
from service.api.files.storage import remove_bytes
from service.api.multipart import INCOMING_SUFFIX
from service.jobs.database import Database
from service.jobs.files import expire_files
from service.jobs.tables import File, Upload, UploadPart
from service.jobs.uploads import expire_uploads
from service.settings import Settings

SWEEP_SECONDS = 600.0
ORPHAN_SECONDS = 3600.0
"""Bytes are written before their record: only those that have lain for longer without one are orphans."""

log = structlog.get_logger("service.api")


def sweep(database: Database, settings: Settings) -> None:
    """Expire, then remove bytes; a crash in between leaves orphans for the next sweep."""
    with database.write() as s:
        files = expire_files(s)
        parts = expire_uploads(s)
    for file in files:
        remove_bytes(file, settings)
    for part in parts:
        storage.delete(Path(part.path))
    orphans = remove_orphans(database, settings.files_dir)
    if files or parts or orphans:
        log.info("expired", files=len(files), parts=len(parts), orphans=orphans)


def remove_orphans(database: Database, directory: Path) -> int:
    """Remove old bytes without a record that still needs them; returns their number."""
    horizon = time.time() - ORPHAN_SECONDS
    old = [path for path in directory.iterdir() if path.is_file() and _age(path) < horizon]
    if not old:
        return 0
    with database.read() as s:
        known = set(s.scalars(select(File.path).where(File.deleted_at.is_(None))))
        pending = select(UploadPart.path).join(Upload, Upload.id == UploadPart.upload_id)
        known |= set(s.scalars(pending.where(Upload.status == "pending")))
    orphans = [path for path in old if path.suffix == INCOMING_SUFFIX or str(path) not in known]
    for path in orphans:
        path.unlink(missing_ok=True)
    return len(orphans)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed by another process
        return float("inf")
