"""Unpack an upload (tar, tar.gz or zip) so that it can do no harm. Torch-free.

Covered: entries that leave the target, links, devices, sparse files, nested archives, bombs (by total, by ratio, by
number of entries, inside headers too), names that collide, encrypted or damaged archives. Only regular files are
written, each newly created by us, so no link that could be followed ever exists in the target. Not covered: what the
files hold.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Self, cast

from vlm_dft.config import ValidationLimits
from vlm_dft.data.problems import FileError, shown
from vlm_dft.run_dir import disk_errors

_NESTED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error),
    *(EOFError, ValueError, OverflowError, NotImplementedError),
)
"""What tarfile, zipfile and gzip raise for bytes that are no archive of theirs."""
_READ_ERROR, _HEADER_ERROR = tarfile.ReadError, tarfile.HeaderError
_END_OF_ARCHIVE = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]  # absent from the stubs
_RATIO_FLOOR_BYTES = 32 * 2**20
"""Below it a high ratio is no bomb: text that repeats itself packs a thousandfold."""


def archive_kind(path: Path) -> str | None:
    """tar, tar.gz or zip, by content; None when the file is no archive."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if start.startswith(b"\x1f\x8b"):
        return "tar.gz"
    return "tar" if start[257:262] == b"ustar" else None


def unpack(path: Path, name: str, target: Path, limits: ValidationLimits) -> None:
    """Write the archive's regular files below target, an empty directory. Raises FileError, DiskFullError."""
    kind = archive_kind(path)
    assert kind, f"{path} is no archive"
    with disk_errors(target), _archive_errors(name):
        if kind == "zip":
            _unpack_zip(path, name, target, limits)
        else:
            _unpack_tar(path, name, target, limits, packed=kind == "tar.gz")


@contextmanager
def _archive_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except _DAMAGE as error:
        raise FileError(name, "broken_archive", f"the archive is damaged or cut off: {error}") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        reason = f"two entries claim the same place: {shown(Path(error.filename).name)}"
        raise FileError(name, "duplicate_entry", reason) from None
    except MemoryError:
        raise FileError(name, "archive_too_large", "the archive's headers need too much memory") from None


def _unpack_tar(path: Path, name: str, target: Path, limits: ValidationLimits, *, packed: bool) -> None:
    with path.open("rb") as file:
        source = gzip.GzipFile(fileobj=file) if packed else file
        metered = _Metered(cast(BinaryIO, source), file, name, limits)
        count, places = 0, _Places(name)
        # As a stream, so that whatever is unpacked, headers included, passes the meter.
        with tarfile.open(fileobj=cast("IO[bytes]", metered), mode="r|", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members.clear()  # else a million headers stay in memory
                count += 1
                _check_count(count, name, limits)
                if member.isdir():
                    safe_path(member.name, name)
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    reason = f"{shown(member.name)} is no regular file: pack plain files, without links or devices"
                    raise FileError(name, "archive_entry_refused", reason, field=printable(member.name))
                if member.size > limits.max_archive_bytes:
                    raise _too_large(name, limits)
                content = archive.extractfile(member)
                assert content is not None
                places.take(member.name)
                _write(content, member.size, member.name, name, target)
        while metered.read(1 << 20):  # to the end: the gzip checksum comes last
            pass


def _unpack_zip(path: Path, name: str, target: Path, limits: ValidationLimits) -> None:
    with zipfile.ZipFile(path) as archive:
        entries, places = archive.infolist(), _Places(name)
        _check_count(len(entries), name, limits)
        if sum(entry.file_size for entry in entries) > limits.max_archive_bytes:
            raise _too_large(name, limits)
        for entry in entries:
            mode = entry.external_attr >> 16
            if entry.is_dir():
                safe_path(entry.filename, name)
                continue
            if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                reason = f"{shown(entry.filename)} is no regular file: pack plain files, without links"
                raise FileError(name, "archive_entry_refused", reason, field=printable(entry.filename))
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                reason = f"{shown(entry.filename)} is encrypted or packed by an unusual method: use plain zip"
                raise FileError(name, "archive_entry_refused", reason, field=printable(entry.filename))
            if entry.file_size > max(_RATIO_FLOOR_BYTES, limits.max_archive_ratio * entry.compress_size):
                raise _bomb(name, limits)
            places.take(entry.filename)
            with archive.open(entry) as content:
                _write(content, entry.file_size, entry.filename, name, target)


def _check_count(count: int, name: str, limits: ValidationLimits) -> None:
    if count > limits.max_archive_entries:
        reason = f"the archive has more than {limits.max_archive_entries} entries"
        raise FileError(name, "archive_too_large", reason)


def _too_large(name: str, limits: ValidationLimits) -> FileError:
    reason = f"the archive unpacks to more than {limits.max_archive_bytes} bytes"
    return FileError(name, "archive_too_large", reason)


def _bomb(name: str, limits: ValidationLimits) -> FileError:
    reason = f"the archive unpacks to more than {limits.max_archive_ratio:g} times its size: that is no training data"
    return FileError(name, "archive_bomb", reason)


def safe_path(entry: str, name: str) -> PurePosixPath | None:
    """The entry's place below the target; None for the litter of macOS. Raises FileError for a place outside."""
    path = PurePosixPath(entry)
    reason = None
    if not entry or "\0" in entry or "\\" in entry or len(entry.encode(errors="surrogateescape")) > 1024:
        reason = "its name is empty, too long, or has a backslash or NUL in it"
    elif path.is_absolute() or ".." in path.parts:
        reason = "it is absolute or leaves the archive's directory by .."
    elif any(len(part.encode(errors="surrogateescape")) > 255 for part in path.parts):
        reason = "a part of its name is longer than 255 bytes"
    elif path.suffix.lower() in _NESTED:
        reason = "it is an archive itself: unpack it before packing"
    if reason:
        raise FileError(name, "archive_entry_refused", f"entry {shown(entry)}: {reason}", field=printable(entry))
    litter = "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"
    return None if litter else path


def printable(text: str) -> str:
    """A name as JSON and a database can hold it."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")[:200]


class _Places:
    """Which places are taken, as a file system sees it that knows no case and no composed letters."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._taken: set[bytes] = set()

    def take(self, entry: str) -> None:
        """Raises FileError when an earlier entry has the same place, exactly or but for case."""
        same = unicodedata.normalize("NFC", str(PurePosixPath(entry))).casefold().encode(errors="surrogateescape")
        digest = hashlib.blake2b(same, digest_size=12).digest()
        if digest in self._taken:
            reason = f"two entries claim the same place, exactly or but for upper and lower case: {shown(entry)}"
            raise FileError(self._name, "duplicate_entry", reason, field=printable(entry))
        self._taken.add(digest)


def _write(content: IO[bytes], size: int, entry: str, name: str, target: Path) -> None:
    relative = safe_path(entry, name)
    if relative is None:
        return
    path = target / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        written = file.tell()
    if written != size:
        raise FileError(name, "broken_archive", f"{shown(entry)} has {written} bytes instead of {size}: it was cut off")


class _Member(tarfile.TarInfo):
    """A header that is damaged or missing is an error: tarfile itself would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _END_OF_ARCHIVE:
            raise
        except _HEADER_ERROR as error:
            raise _READ_ERROR(f"a header cannot be read ({error})") from None


class _Metered(io.RawIOBase):
    """A stream that refuses to unpack more than the limits allow."""

    def __init__(self, source: BinaryIO, packed: BinaryIO, name: str, limits: ValidationLimits) -> None:
        self._source = source
        self._packed = packed
        self._name = name
        self._limits = limits
        self._total = 0

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size if size >= 0 else 1 << 20)
        self._total += len(data)
        if self._total > self._limits.max_archive_bytes:
            raise _too_large(self._name, self._limits)
        if self._total > max(_RATIO_FLOOR_BYTES, self._limits.max_archive_ratio * self._packed.tell()):
            raise _bomb(self._name, self._limits)
        return data
