"""Files and run directories in an object store, which hosts with disks of their own share. Torch-free.

The store is behind the disk: whoever writes below the data directory puts it afterwards, whoever reads fetches it
before; trainers only ever see local directories. A single object appears whole or not at all; of a directory the
manifest is put last and removed first, so that half a directory is never seen. Without VLM_DFT_STORAGE_URL all this
does nothing, for then the hosts share the data directory itself.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from service.settings import Settings
from vlm_dft.data.canonical import ROWS_NAME
from vlm_dft.errors import VlmDftError
from vlm_dft.run_dir import directory_in_place

_LEASE: Final = "lease"
_OUTPUTS: Final = ("checkpoints/*", "export", "dataset")
_WHOLE: Final = frozenset({"checkpoints", "export", "dataset", _LEASE})
MANIFEST: Final = ".stored.json"
"""In a stored directory: {"files": {relative path: bytes}}."""
SMALL_BYTES: Final = 64 * 2**20
"""Largest file that is fetched for a look at a directory: configurations, tokenizers, rows; no weights."""


class StorageError(VlmDftError):
    """The object store did not do what it was asked to: see VLM_DFT_STORAGE_URL and AWS's own variables."""

    code = "storage_failed"
    category = "server"
    retryable = True


class Storage:
    """One object store, behind one data directory. Safe for threads; after a fork the child opens its own."""

    def __init__(self, url: str, data: Path) -> None:
        """Raises StorageError when s3fs is not installed."""
        self.data = data
        self._pid = os.getpid()
        self._locks: dict[Path, threading.Lock] = {}
        """One for each path that is being fetched: threads that want the same one wait for the first."""
        self._final: set[Path] = set()
        """Runs whose texts are here and will not change."""
        try:
            import s3fs
        except ImportError:
            raise StorageError("VLM_DFT_STORAGE_URL needs s3fs: install vlm-dft[s3]") from None
        # No caches: other hosts write while we read.
        self._fs: Any = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        self._root = url.removeprefix("s3://").rstrip("/")

    def key(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self.data)}"

    def check(self) -> None:
        """Raises StorageError when the bucket cannot be reached."""
        bucket = self._root.partition("/")[0]
        with _told(f"the bucket {bucket} cannot be reached"):
            self._fs.call_s3("head_bucket", Bucket=bucket)

    def put(self, path: Path) -> None:
        """Put a file, or a directory that is complete and does not change any more. Raises StorageError."""
        with _told(f"{path} could not be stored"):
            if not path.is_dir():
                self._fs.put_file(str(path), self.key(path))
                return
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(".tmp")]
            sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
            if files:
                self._fs.put([str(file) for file in files], [self.key(file) for file in files])
            self._fs.pipe_file(f"{self.key(path)}/{MANIFEST}", json.dumps({"files": sizes}).encode())

    def has(self, path: Path) -> bool:
        """Whether a whole file or directory is in the store."""
        with _told(f"{path} could not be looked for"):
            return self._fs.exists(f"{self.key(path)}/{MANIFEST}") or self._fs.isfile(self.key(path))

    def fetch(self, path: Path) -> None:
        """Have a stored file or directory on disk, whole. Raises StorageError when it is neither there nor here.

        What is on disk is ours, or was fetched whole, unless a look has left its manifest.
        """
        with self._alone(path), _told(f"{path} could not be fetched"):
            if path.exists() and not (path / MANIFEST).exists():
                path.touch()  # used: see evict
                return
            sizes = self._manifest(path)
            if sizes is None:
                if not self._fs.isfile(self.key(path)):
                    raise StorageError(f"{path} is neither on this host nor in the object store")
                self._get([path.name], path.parent)
                return
            with directory_in_place(path) as directory:
                self._get(list(sizes), directory, self.key(path))
                _check(directory, sizes)

    def look(self, path: Path) -> None:
        """Have at least a stored directory's small files on disk, and its rows; nothing of its own directories."""
        with self._alone(path), _told(f"{path} could not be fetched"):
            sizes = None if path.exists() else self._manifest(path)
            if sizes is None:
                return
            with directory_in_place(path) as directory:
                small = [name for name, size in sizes.items() if size <= SMALL_BYTES or name == ROWS_NAME]
                self._get([name for name in small if "/" not in name], directory, self.key(path))
                (directory / MANIFEST).write_text(json.dumps({"files": sizes}))

    def listing(self, directory: Path) -> list[tuple[str, int]]:
        """Every object below a directory: its name from there on, and its bytes."""
        with _told(f"{directory} could not be listed"):
            if not self._fs.exists(self.key(directory)):
                return []
            found: dict[str, Any] = self._fs.find(self.key(directory), detail=True)
            return [(key[len(self.key(directory)) + 1 :], about["size"]) for key, about in found.items()]

    def remove(self, path: Path) -> None:
        """Remove a file or directory from the store; its manifest goes first. The disk is the caller's."""
        with _told(f"{path} could not be removed"):
            manifest = f"{self.key(path)}/{MANIFEST}"
            if self._fs.exists(manifest):
                self._fs.rm_file(manifest)
            if self._fs.exists(self.key(path)):
                self._fs.rm(self.key(path), recursive=True)

    def evict(self, older_than_seconds: float, used: Collection[Path] = ()) -> list[Path]:
        """Remove from disk what the store has too and nobody here has fetched for that long; returns it.

        used: what is read here now, however long ago it was fetched.
        """
        horizon = time.time() - older_than_seconds
        idle = [run for run in self.data.glob("runs/*/attempt-*") if not (run / _LEASE).exists()]
        copies = [path for run in idle for name in _OUTPUTS for path in run.glob(name)]
        copies += self.data.glob("files/*")
        gone = [path for path in copies if path not in used and path.stat().st_mtime < horizon and self.has(path)]
        for path in gone:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return gone

    def put_texts(self, run: Path, known: dict[str, tuple[int, int]]) -> None:
        """Put what changes while a run goes on: every file outside the directories that are put whole.

        known: sizes and times of what was put before, updated here.
        """
        with _told(f"the logs of {run} could not be stored"):
            changed = {}
            for file in _texts(run):
                found = file.stat()
                name = str(file.relative_to(run))
                if known.get(name) != (found.st_size, found.st_mtime_ns):
                    changed[name] = (found.st_size, found.st_mtime_ns)
            if changed:
                self._fs.put([str(run / name) for name in changed], [f"{self.key(run)}/{name}" for name in changed])
            known.update(changed)

    def fetch_texts(self, run: Path, *, ended: bool = False) -> None:
        """Have the newest stored logs, metrics and predictions of a run on disk, unless this host runs it itself.

        ended: nobody writes it any more, so that it is fetched once and the store not asked again.
        """
        if (run / _LEASE).exists():  # never stored: only the host that runs it has one, and what it has is newer
            return
        if run in self._final and run.is_dir():
            return
        with self._alone(run), _told(f"the logs of {run} could not be fetched"):
            for again in (True, True, False):
                found = self.listing(run)
                wanted = [name for name, size in found if not _is_whole(name) and _differs(run / name, size)]
                try:
                    self._get(wanted, run, self.key(run))
                    if ended:
                        self._final.add(run)
                    return
                except FileNotFoundError:  # a worker on this host has just freed the disk of what is stored
                    if not again:
                        raise

    def steps(self, run: Path) -> list[Path]:
        """Checkpoint directories of a run that are whole in the store, oldest first."""
        with _told(f"the checkpoints of {run} could not be listed"):
            below = f"{self.key(run)}/checkpoints"
            names = (
                [one.rpartition("/")[2] for one in self._fs.ls(below, detail=False)] if self._fs.exists(below) else []
            )
            paths = [run / "checkpoints" / name for name in sorted(names) if name.startswith("step-")]
            return [path for path in paths if self._fs.exists(f"{self.key(path)}/{MANIFEST}")]

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        with self._locks.setdefault(path, threading.Lock()):
            yield

    def _manifest(self, path: Path) -> dict[str, int] | None:
        try:
            return json.loads(self._fs.cat_file(f"{self.key(path)}/{MANIFEST}"))["files"]
        except FileNotFoundError:
            return None

    def _get(self, names: list[str], directory: Path, key: str | None = None) -> None:
        """Each file appears by rename."""
        key = self.key(directory) if key is None else key
        targets = [directory / name for name in names]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        halves = [target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp") for target in targets]
        if names:
            self._fs.get([f"{key}/{name}" for name in names], [str(half) for half in halves])
        for half, target in zip(halves, targets, strict=True):
            half.replace(target)


_storages: dict[Path, Storage] = {}


def open_storage(settings: Settings) -> Storage | None:
    """The settings' object store, from now on also behind ``put``, ``fetch`` and the like; None: there is none."""
    if settings.storage_url is None:
        return None
    storage = _storages.get(settings.data)
    if storage is None or storage._pid != os.getpid():
        storage = _storages[settings.data] = Storage(settings.storage_url, settings.data)
    return storage


def _behind(path: Path) -> Storage | None:
    return next((storage for data, storage in _storages.items() if path.is_relative_to(data)), None)


def _if_behind(path: Path, act: Callable[[Storage], None]) -> None:
    if (storage := _behind(path)) is not None:
        act(storage)


def put(path: Path) -> None:
    """Storage.put, where there is a store behind the path."""
    _if_behind(path, lambda storage: storage.put(path))


def fetch(path: Path) -> None:
    """Storage.fetch, where there is a store behind the path."""
    _if_behind(path, lambda storage: storage.fetch(path))


def look(path: Path) -> None:
    """Storage.look, where there is a store behind the path."""
    _if_behind(path, lambda storage: storage.look(path))


def fetch_texts(path: Path, *, ended: bool = False) -> None:
    """Storage.fetch_texts, where there is a store behind the path."""
    _if_behind(path, lambda storage: storage.fetch_texts(path, ended=ended))


def remove(path: Path) -> None:
    """Storage.remove, where there is a store behind the path."""
    _if_behind(path, lambda storage: storage.remove(path))


def delete(path: Path) -> None:
    """Remove a file or directory from the disk, and from the store where there is one behind it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    remove(path)


def _texts(run: Path) -> Iterator[Path]:
    for file in sorted(run.rglob("*")):
        if file.is_file() and not _is_whole(str(file.relative_to(run))):
            yield file


def _is_whole(name: str) -> bool:
    """Below a directory that is put as one thing, or of this host alone: what is not finished has a hidden name."""
    parts = name.split("/")
    return parts[0] in _WHOLE or any(part.startswith(".") for part in parts)


def _differs(path: Path, size: int) -> bool:
    """Logs only grow, and what is replaced changes its size or does not matter while the run goes on."""
    return not path.exists() or path.stat().st_size != size or path.name in {"progress.json", "result.json"}


def _check(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if (found := (directory / name).stat().st_size) != size:
            raise StorageError(f"{directory.name}/{name} came with {found} bytes instead of {size}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Every way in which a store fails, as one error."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        raise StorageError(f"{what}: {type(error).__name__}: {error}") from error


def forget_local(run: Path) -> None:
    """Remove the disk's copy of what is in the store."""
    shutil.rmtree(run, ignore_errors=True)
