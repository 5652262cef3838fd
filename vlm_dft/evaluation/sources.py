"""Benchmark files as records: VLMEvalKit's TSV, or the authors' JSON and JSONL. Torch-free.

A record knows its place, so that every complaint names file, row and field. Image names come from the file and must
stay inside the benchmark's directory. Knows nothing about what the fields mean.
"""

from __future__ import annotations

import ast
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_dft.config import BenchmarkKind
from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation.items import Picture

SUFFIXES = (".tsv", ".json", ".jsonl")
MAX_POINTER_CHARACTERS = 64
"""A TSV image cell this short names another row's index (VLMEvalKit's rule)."""
MAX_LITERAL_CHARACTERS = 100_000


@dataclass(frozen=True)
class Source:
    """One benchmark file."""

    path: Path
    records: tuple[Record, ...]
    is_tsv: bool

    @property
    def root(self) -> Path:
        return self.path.parent

    def picture(self, record: Record) -> Picture:
        """The record's image: the TSV's image or image_path column, JSON's image or image_path."""
        place = record.place("image")
        cell = record.optional("image")
        if not self.is_tsv:
            return Picture(place, path=self._inside(record, "image" if cell else "image_path"))
        if cell is None:
            return Picture(place, path=self._inside(record, "image_path"))
        if len(cell) <= MAX_POINTER_CHARACTERS:
            pointed = self._cells.get(cell)
            if pointed is None:
                raise record.error("image", f"the cell points at row index {cell!r}, which holds no image")
            return Picture(place, base64_text=pointed)
        return Picture(place, base64_text=cell)

    @cached_property
    def _cells(self) -> dict[str, str]:
        """Row index -> image cell, for rows that hold an image themselves."""
        cells = ((record.optional("index"), record.optional("image")) for record in self.records)
        return {index: cell for index, cell in cells if index and cell and len(cell) > MAX_POINTER_CHARACTERS}

    def _inside(self, record: Record, name: str) -> Path:
        value = record.text(name)
        root = self.root.resolve()
        # resolve() follows symbolic links too: what it answers is what would be opened.
        path = (root / value).resolve()
        if not path.is_relative_to(root):
            raise record.error(name, f"{value!r} leaves the benchmark's directory {root}")
        if not path.is_file():
            raise record.error(name, f"{value!r} does not exist: put the image at {root / value}")
        return path


@dataclass(frozen=True)
class Record:
    """One row of a benchmark file."""

    file: Path
    number: int
    """1-based; the line of a JSONL, the element of a JSON array, the row after a TSV's header."""
    values: Mapping[str, Any]

    def place(self, name: str) -> str:
        return f"{self.file}: row {self.number}: {name}"

    def error(self, name: str, reason: str) -> BenchmarkError:
        return BenchmarkError(f"{self.place(name)}: {reason}")

    def optional(self, name: str) -> str | None:
        """The field as text; None when it is absent, null or empty. Numbers are taken as their text."""
        value = self.values.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(name, f"expected text or a number, found {type(value).__name__}")
        return str(value)

    def text(self, name: str) -> str:
        """The field as text, not empty."""
        value = self.optional(name)
        if value is None:
            raise self.error(name, "the field is absent or empty" if name in self.values else self._absent(name))
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings; a TSV spells it as a Python or JSON list."""
        value = self.literal(name)
        if not isinstance(value, list) or not all(isinstance(entry, str | int | float) for entry in value):
            raise self.error(name, "expected a list of strings")
        return [str(entry) for entry in value]

    def mapping(self, name: str) -> dict[str, Any]:
        """An object with string keys; a TSV spells it as a Python or JSON dictionary."""
        value = self.literal(name)
        if not isinstance(value, dict):
            raise self.error(name, "expected an object")
        return {str(key): entry for key, entry in value.items()}

    def literal(self, name: str) -> Any:
        """The field, a Python or JSON literal where it is text."""
        value = self.values.get(name)
        if not isinstance(value, str):
            return value
        if len(value) <= MAX_LITERAL_CHARACTERS:
            for parse in (json.loads, ast.literal_eval):
                try:
                    return parse(value)
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue
        raise self.error(name, "neither a JSON nor a Python literal")

    def _absent(self, name: str) -> str:
        return f"the field is absent; found {', '.join(list(self.values)[:20])}"


def open_source(kind: BenchmarkKind, path: Path, names: tuple[str, ...]) -> Source:
    """Read a benchmark file, or the one that a directory holds (names: what it is usually called).

    Raises BenchmarkError saying which file would go where.
    """
    file = find_source(kind, path, names)
    if file.suffix.lower() == ".tsv":
        records = tuple(_tsv(file))
    elif file.suffix.lower() in (".json", ".jsonl"):
        records = tuple(_json(file))
    else:
        raise BenchmarkError(f"{file}: a benchmark file ends in {', '.join(SUFFIXES)}")
    if not records:
        raise BenchmarkError(f"{file}: the file holds no rows")
    return Source(file, records, is_tsv=file.suffix.lower() == ".tsv")


def find_source(kind: BenchmarkKind, path: Path, names: tuple[str, ...]) -> Path:
    """The benchmark's file: path itself, or the one in it that has one of the names, or its only one."""
    if path.is_file():
        return path
    usual = ", ".join(names)
    if not path.is_dir():
        raise BenchmarkError(f"the benchmark {kind} is not at {path}: put its file there, or a directory with {usual}")
    for name in names:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(found) != 1:
        what = "holds no" if not found else f"holds {len(found)} files ({', '.join(file.name for file in found)}), no"
        raise BenchmarkError(f"the directory {path} {what} file of the benchmark {kind}: put one of {usual} there")
    return found[0]


def _tsv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # images are base64 cells of megabytes
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines, dialect="excel-tab", strict=True)
            header = next(reader, None) or []
            for number, row in enumerate(reader, start=1):
                if len(row) != len(header):
                    raise BenchmarkError(
                        f"{file}: row {number}: {len(row)} columns where the header has {len(header)}: "
                        "the file was cut off or is not VLMEvalKit's TSV"
                    )
                yield Record(file, number, dict(zip(header, row, strict=True)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file}: not a UTF-8 TSV: {error}") from None


def _json(file: Path) -> Iterator[Record]:
    data = file.read_bytes()
    if data.lstrip()[:1] == b"[":
        numbered = enumerate(_parsed(file, data, "the array"), start=1)
    else:
        lines = ((number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip())
        numbered = ((number, _parsed(file, line, f"line {number}")) for number, line in lines)
    for number, values in numbered:
        if not isinstance(values, dict):
            raise BenchmarkError(f"{file}: row {number}: expected an object, found {type(values).__name__}")
        yield Record(file, number, values)


def _parsed(file: Path, data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{file}: {what} is not JSON: {error}") from None
