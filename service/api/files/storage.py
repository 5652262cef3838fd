"""Bytes of files on disk: where they lie, how they get there whole, and which server paths may be registered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service import storage
from service.errors import InvalidRequestError
from service.jobs.tables import File
from service.settings import Settings

_RECORD_SUFFIXES = frozenset({".jsonl", ".json"})


def prepare_directory(settings: Settings) -> None:
    """Make the directory of uploaded bytes; only the service's user may enter."""
    settings.files_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def kept_only_on_success(path: Path) -> Iterator[None]:
    """Remove the stored bytes when the block that records them fails: no record, no bytes.

    Where there is an object store, they are in it before the block begins. Raises StorageError.
    """
    try:
        storage.put(path)
        yield
    except BaseException:
        storage.delete(path)
        raise


def remove_bytes(file: File, settings: Settings) -> None:
    """Remove what a deleted file left on disk: its bytes and its canonical dataset. A registered directory stays."""
    if not file.registered:
        storage.delete(Path(file.path))
    if file.dataset_path is not None:
        dataset = Path(file.dataset_path)
        assert dataset.is_relative_to(settings.runs_dir), f"{dataset} is none of our datasets"
        with contextlib.suppress(FileNotFoundError):
            storage.delete(dataset)


def resolve_registered(path: str, roots: Sequence[Path]) -> Path:
    """The directory that a client names, with every symbolic link followed; it must still be under an allowed root.

    Raises InvalidRequestError; one message for what is outside, there or not.
    """
    if not roots:
        raise InvalidRequestError(
            "path: no directory may be registered on this server: set VLM_DFT_DATASET_ROOTS", param="path"
        )
    resolved_roots = [root.resolve() for root in roots]
    given = Path(path)
    candidates = [given] if given.is_absolute() else [root / given for root in resolved_roots]
    allowed = [
        resolved
        for resolved in (candidate.resolve() for candidate in candidates)
        if any(resolved.is_relative_to(root) for root in resolved_roots)
    ]
    if not allowed:
        names = ", ".join(str(root) for root in roots)
        raise InvalidRequestError(f"path: {path!r} does not lie under an allowed root ({names})", param="path")
    for resolved in allowed:
        if resolved.is_dir():
            return resolved
    raise InvalidRequestError(f"path: {path!r} is no directory on the server", param="path")


def record_bytes(directory: Path) -> int:
    """Size of the record files directly in a dataset directory."""
    return sum(
        entry.stat().st_size
        for entry in directory.iterdir()
        if entry.suffix.lower() in _RECORD_SUFFIXES and entry.is_file()
    )
