"""Join the stored parts of an upload into one file, hashed on the way."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service import storage
from service.api.multipart import INCOMING_SUFFIX, Received, need_space
from service.errors import InvalidRequestError
from service.jobs.tables import UploadPart
from vlm_dft.run_dir import disk_errors

_CHUNK_BYTES = 4 * 2**20


@contextmanager
def joined(
    parts: Sequence[UploadPart], directory: Path, *, filename: str, md5: str | None, min_free_bytes: int
) -> Iterator[Received]:
    """Yield the parts as one file, still under a temporary name that is gone afterwards unless it was kept.

    The parts stay: an interrupted or refused completion can be repeated. Raises InvalidRequestError when the md5 is
    another one, StorageFullError or DiskFullError when the disk cannot take the whole file beside its parts.
    """
    need_space(directory, sum(part.bytes for part in parts), min_free_bytes)
    path = directory / f"{uuid.uuid4().hex}{INCOMING_SUFFIX}"
    sha256, md5_found = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    size = 0
    try:
        with disk_errors(path), path.open("xb") as target:
            for part in parts:
                storage.fetch(Path(part.path))
                with Path(part.path).open("rb") as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        target.write(chunk)
                        sha256.update(chunk)
                        md5_found.update(chunk)
                        size += len(chunk)
            target.flush()
            os.fsync(target.fileno())
        if md5 is not None and md5.lower() != md5_found.hexdigest():
            message = f"md5: the joined parts have {md5_found.hexdigest()}, not {md5}: a part differs, or the order"
            raise InvalidRequestError(message, param="md5", code="checksum_mismatch")
        yield Received(path, filename, size, sha256.hexdigest(), {})
    finally:
        path.unlink(missing_ok=True)
