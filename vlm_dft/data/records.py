"""JSON objects from a JSONL file or a JSON array, one at a time, with their numbers. Torch-free.

Streams: no more than one row is in memory. In JSONL a broken line costs that line; in an array nothing after a broken
element can be trusted, so the file is refused there. Knows nothing about formats.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from vlm_dft.data.problems import FileError, RowError, kind, shown

_SPACE = " \t\r\n"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Record:
    """One row: its object, or what is wrong with it."""

    number: int
    """Line of a JSONL file, element of an array; from 1."""
    value: dict[str, Any] | RowError
    size: int
    """Bytes, as far as they were read."""
    position: int
    """Bytes of the file read so far."""


def read_records(path: Path, name: str, max_row_bytes: int) -> Iterator[Record]:
    """Rows of a file; blank lines are none. Raises FileError when it is no JSON, or its array breaks."""
    with path.open("rb") as file:
        start = file.read(4096)
        _refuse_other_files(start, name)
        skip = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        file.seek(skip)
        opening = start[skip:].lstrip()[:1]
        yield from (_elements if opening == b"[" else _lines)(file, name, max_row_bytes)


def count_lines(path: Path) -> int | None:
    """Lines of a JSONL file, for progress; None for an array."""
    lines, last = 0, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if not lines and not last and chunk.lstrip()[:1] == b"[":
                return None
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last not in (b"", b"\n"))


def _refuse_other_files(start: bytes, name: str) -> None:
    if not start:
        raise FileError(name, "empty_file", "the file is empty")
    known = {
        b"PAR1": "a Parquet file",
        b"%PDF": "a PDF document",
        b"\xff\xfe": "UTF-16 text",
        b"\xfe\xff": "UTF-16 text",
        b"BZh": "a bzip2 archive",
        b"\xfd7zXZ": "an xz archive",
        b"7z\xbc\xaf": "a 7z archive",
        b"\x28\xb5\x2f\xfd": "a zstd archive",
    }
    for magic, what in known.items():
        if start.startswith(magic):
            reason = (
                f"the file is {what}: send UTF-8 JSONL, a JSON array, or a tar, tar.gz or zip with it and its images"
            )
            raise FileError(name, "not_json", reason)


def _lines(file: BinaryIO, name: str, max_row_bytes: int) -> Iterator[Record]:
    number, started = 0, False
    while line := file.readline(max_row_bytes + 1):
        number += 1
        size = len(line)
        if size > max_row_bytes:
            size += _skip_line(file, line)
            started = True
            reason = f"the row has {size} bytes; at most {max_row_bytes} are allowed"
            yield Record(number, RowError("", "row_too_large", reason), max_row_bytes, file.tell())
            continue
        if not line.strip():
            continue
        value = _parse(line)
        if not started and isinstance(value, RowError) and not line.lstrip().startswith(b"{"):
            reason = f"one JSON object per line is expected, but the file starts with {shown(line[:40])}"
            raise FileError(name, "not_json", reason, line=number)
        started = True
        yield Record(number, value, size, file.tell())
    if not started:
        raise FileError(name, "empty_file", "the file holds no rows")


def _skip_line(file: BinaryIO, line: bytes) -> int:
    """Read on to the end of the line; how many bytes that were."""
    size = 0
    while not line.endswith(b"\n"):
        line = file.readline(_CHUNK)
        if not line:
            break
        size += len(line)
    return size


def _parse(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return RowError("", "invalid_utf8", f"the row is no UTF-8: {error.reason} at its byte {error.start}")
    except RecursionError:
        return RowError("", "nested_too_deeply", "the row is nested too deeply")
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        hint = ": one whole JSON object per line is expected" if line.strip() in (b"{", b"[") else ""
        return RowError("", "invalid_json", f"the row is no JSON: {error}{hint}")
    return _object(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError("", "row_not_object", f"a JSON object is expected, not {kind(value)} ({shown(value)})")


def _elements(file: BinaryIO, name: str, max_row_bytes: int) -> Iterator[Record]:
    """Elements of one array, by decoding from a buffer that grows until an element is whole."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    text = _Text(file, name)
    text.take_opening()
    number = 0
    while not text.take_end(after_element=number > 0):
        number += 1
        value, end = _decode(decoder, text, number, name, max_row_bytes)
        size, text.position = end - text.position, end
        yield Record(number, _object(value), size, file.tell())
    if not number:
        raise FileError(name, "empty_file", "the array is empty")


def _decode(decoder: json.JSONDecoder, text: _Text, number: int, name: str, max_row_bytes: int) -> tuple[Any, int]:
    """One element and where it ends."""
    while True:
        try:
            value, end = decoder.raw_decode(text.buffer, text.position)
            if end < len(text.buffer) or not text.grow():
                return value, end
        except (ValueError, RecursionError) as error:
            if len(text.buffer) - text.position > max_row_bytes:
                reason = f"element {number} has more than {max_row_bytes} bytes, or is no JSON"
                raise FileError(name, "row_too_large", reason, line=number) from None
            if isinstance(error, RecursionError) or not text.grow():
                reason = f"element {number} of the array is no JSON: {error}"
                raise FileError(name, "invalid_json", reason, line=number) from None


class _Text:
    """The part of the file that is being decoded."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._chunk = _CHUNK
        self.buffer = ""
        self.position = 0

    def grow(self) -> bool:
        """Read more, twice as much as the last time for the same element; False at the end of the file."""
        data = self._file.read(self._chunk)
        try:
            self.buffer = self.buffer[self.position :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise FileError(self._name, "invalid_utf8", f"the file is no UTF-8: {error}") from None
        self.position = 0
        self._chunk *= 2
        return bool(data)

    def _next(self) -> str:
        """The next character that is no white space, without taking it; empty at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.grow():
                return ""

    def take_opening(self) -> None:
        if self._next() != "[":
            raise FileError(self._name, "not_json", "the file is no JSON array")
        self.position += 1

    def take_end(self, *, after_element: bool) -> bool:
        """True when the array ends here; else what separates two elements is taken."""
        self._chunk = _CHUNK
        following = self._next()
        if following == "]":
            self.position += 1
            if rest := self._next():
                raise FileError(self._name, "invalid_json", f"after the array comes {shown(rest)}")
            return True
        if not following:
            raise FileError(self._name, "invalid_json", "the file ends inside the array: it was cut off")
        if after_element:
            if following != ",":
                reason = f"a comma or ] is expected between elements, not {shown(following)}"
                raise FileError(self._name, "invalid_json", reason)
            self.position += 1
            self._next()
        return False
