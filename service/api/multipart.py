"""Read one multipart/form-data request, its single file straight to disk, hashed and counted on the way.

Starlette's form parsing would write the body to the system's temporary directory first and copy it afterwards, and
would not notice a full disk before the copy. Knows nothing about what the file is for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import anyio.to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import InvalidRequestError, StorageFullError, TooLargeError
from vlm_dft.run_dir import disk_errors

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FLUSH_BYTES = 2**20
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 2**16
OVERHEAD_BYTES = _MAX_FIELDS * _MAX_FIELD_BYTES
"""What boundaries, part headers and text fields may add to the file itself."""
INCOMING_SUFFIX = ".incoming"


@dataclass(frozen=True)
class Received:
    """A file that arrived whole, still under its temporary name, and the text fields around it."""

    path: Path
    filename: str
    bytes: int
    sha256: str
    fields: dict[str, str]

    def keep(self, target: Path) -> None:
        """Rename into place; without it the file is gone when the request ends."""
        self.path.replace(target)
        sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Make the renames in a directory survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def need_space(directory: Path, incoming_bytes: int, min_free_bytes: int) -> None:
    """Raise StorageFullError when writing so much would leave less than min_free_bytes free."""
    free = shutil.disk_usage(directory).free
    if free - incoming_bytes < min_free_bytes:
        raise StorageFullError(
            f"the disk has {free} bytes free; {incoming_bytes} are arriving and {min_free_bytes} must stay free "
            "(VLM_DFT_MIN_FREE_BYTES): free space and upload again"
        )


@asynccontextmanager
async def receive_file(
    request: Request, *, field_name: str, directory: Path, max_bytes: int, min_free_bytes: int
) -> AsyncIterator[Received]:
    """Yield the file of the part called field_name; its temporary file is gone afterwards unless it was kept.

    Raises InvalidRequestError for a body that is not such a form, TooLargeError above max_bytes, and StorageFullError
    or DiskFullError when the disk cannot take it.
    """
    boundary = _boundary(request)
    declared = request.state.body.content_length or 0
    if declared > max_bytes + OVERHEAD_BYTES:
        raise _too_large(field_name, max_bytes)
    request.state.body.allow(max_bytes + OVERHEAD_BYTES)
    need_space(directory, declared, min_free_bytes)
    path = directory / f"{uuid.uuid4().hex}{INCOMING_SUFFIX}"
    try:
        with disk_errors(path):
            form = await _read_form(request, boundary, path, _Form(field_name, max_bytes), min_free_bytes)
        yield Received(path, form.filename or "", form.file_bytes, form.digest.hexdigest(), form.texts())
    finally:
        path.unlink(missing_ok=True)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InvalidRequestError("the body must be multipart/form-data")
    if not options.get(b"boundary"):
        raise InvalidRequestError("the content-type multipart/form-data lacks its boundary")
    return options[b"boundary"]


async def _read_form(request: Request, boundary: bytes, path: Path, form: _Form, min_free_bytes: int) -> _Form:
    try:
        parser = MultipartParser(boundary, form.callbacks())
        with path.open("xb") as file:
            async for chunk in request.stream():
                parser.write(chunk)
                if len(form.pending) >= _FLUSH_BYTES:
                    need_space(path.parent, 0, min_free_bytes)
                    await anyio.to_thread.run_sync(form.flush, file)
            await anyio.to_thread.run_sync(form.finish, file)
    except FormParserError as error:
        raise InvalidRequestError(f"the multipart body cannot be read: {error}") from None
    if not form.ended:
        raise InvalidRequestError("the multipart body ends before its last boundary: it was cut off")
    if form.filename is None:
        raise InvalidRequestError(f"{form.field_name} is required: a file part", param=form.field_name)
    return form


@dataclass
class _Form:
    """The push parser's callbacks: text fields are collected, the file's bytes wait in pending to be written."""

    field_name: str
    max_bytes: int
    filename: str | None = None
    file_bytes: int = 0
    pending: bytearray = field(default_factory=bytearray)
    ended: bool = False
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    _fields: dict[str, bytearray] = field(default_factory=dict)
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""
    _text: bytearray | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = _text(options.get(b"name", b""))
        if not name:
            raise InvalidRequestError("a part of the multipart body has no name")
        if name == self.field_name:
            if self.filename is not None:
                raise InvalidRequestError(f"{name} was given twice: one file per request", param=name)
            self.filename = plain_filename(_text(options.get(b"filename", b"")))
            self._text = None
            return
        if b"filename" in options:
            raise InvalidRequestError(f"unknown file part {name!r}: the file goes into {self.field_name}", param=name)
        if name in self._fields:
            raise InvalidRequestError(f"{name} was given twice", param=name)
        if len(self._fields) == _MAX_FIELDS:
            raise InvalidRequestError(f"more than {_MAX_FIELDS} text fields")
        self._text = self._fields[name] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                raise InvalidRequestError(f"a text field is longer than {_MAX_FIELD_BYTES} bytes")
            return
        self.pending += data[start:end]
        self.file_bytes += end - start
        if self.file_bytes > self.max_bytes:
            raise _too_large(self.field_name, self.max_bytes)

    def _on_end(self) -> None:
        self.ended = True

    def flush(self, file: BinaryIO) -> None:
        """Write and hash what is pending; runs in a thread, while the event loop waits for it."""
        file.write(self.pending)
        self.digest.update(self.pending)
        self.pending.clear()

    def finish(self, file: BinaryIO) -> None:
        self.flush(file)
        file.flush()
        os.fsync(file.fileno())

    def texts(self) -> dict[str, str]:
        return {name: _text(bytes(value)) for name, value in self._fields.items()}


def _too_large(field_name: str, max_bytes: int) -> TooLargeError:
    message = f"{field_name} is larger than the {max_bytes} bytes taken in one request: use the Uploads API"
    return TooLargeError(f"{message} (client.uploads.upload_file_chunked) or register a directory", param=field_name)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("a text field or filename is not UTF-8") from None


def plain_filename(name: str) -> str:
    """The last path component, without control characters; stored as a label, never used as a path."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:255] or "upload"
