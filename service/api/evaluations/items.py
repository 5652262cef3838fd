"""Predictions page by page, filtered, beside those of the model before; and the items' pictures. Reads files only.

A run directory is written by one trainer while we read: lines that end are whole, a last line without its end is left
for later. A whole line that nothing of ours wrote raises DamagedFileError. Of each file the verdicts are remembered as
long as the file does not change. Knows no web framework.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pydantic import ValidationError

from service.errors import DamagedFileError
from vlm_dft.evaluation.item_files import ITEMS_NAME, PICTURES_NAME, ItemRecord
from vlm_dft.evaluation.predictions import PREDICTIONS_NAME
from vlm_dft.run_dir import RunDir

Flip = Literal["fixed", "broken", "both_right", "both_wrong"]
"""fixed: wrong before and right now. broken: right before and wrong now."""

_FLIPS: dict[tuple[bool, bool], Flip] = {
    (False, True): "fixed",
    (True, False): "broken",
    (True, True): "both_right",
    (False, False): "both_wrong",
}


class Line(NamedTuple):
    """One prediction in its file."""

    number: int
    """1-based."""
    key: tuple[str, int]
    """Item and sample."""
    correct: bool
    offset_bytes: int


@dataclass(frozen=True)
class Filter:
    """Which rows are wanted; None wants all."""

    correct: bool | None = None
    flip: Flip | None = None
    text: str | None = None
    """Stands, in any case, in the item's id, question, reference or in an answer."""
    category: str | None = None
    """As a score's by_category names it, such as "subject: algebra"."""


class Row(NamedTuple):
    """One item as it was answered, and as the model before answered it."""

    number: int
    prediction: dict[str, Any]
    before: dict[str, Any] | None
    flip: Flip | None
    item: ItemRecord | None


class Predictions:
    """A predictions.jsonl that is open, or one that is not there yet."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self.lines: Sequence[Line] = _lines_of(_File.of(file)) if file else ()

    def read(self, line: Line) -> dict[str, Any]:
        assert self._file is not None, "a line is of a file"
        self._file.seek(line.offset_bytes)
        return json.loads(self._file.readline())


@contextmanager
def open_predictions(directory: Path | None) -> Iterator[Predictions]:
    """directory: of one role and benchmark; None, or one without predictions: of none."""
    try:
        file = (directory / PREDICTIONS_NAME).open("rb") if directory else None
    except FileNotFoundError:
        file = None
    with file or nullcontext():
        yield Predictions(file)


class Table:
    """One model's predictions on one benchmark, beside another's on the same."""

    def __init__(self, now: Predictions, before: Predictions, items: Mapping[str, ItemRecord]) -> None:
        self._now, self._before, self._items = now, before, items
        self._lines_before = {line.key: line for line in before.lines}

    def counts(self) -> dict[str, int]:
        """total, correct, and how many of each flip, over all predictions."""
        flips = Counter(flip for line in self._now.lines if (flip := self._flip(line)))
        correct = sum(line.correct for line in self._now.lines)
        return {"total": len(self._now.lines), "correct": correct, **{flip: flips[flip] for flip in _FLIPS.values()}}

    def page(self, wanted: Filter, start: int, limit: int) -> tuple[list[Row], bool]:
        """At most limit rows after line start, and whether there are more."""
        rows = list(islice(self._rows(wanted, start), limit + 1))
        return rows[:limit], len(rows) > limit

    def _rows(self, wanted: Filter, start: int) -> Iterator[Row]:
        for line in self._now.lines[start:]:
            item, flip = self._items.get(line.key[0]), self._flip(line)
            if not _fits(wanted, line, flip, item):
                continue
            before = self._lines_before.get(line.key)
            row = Row(line.number, self._now.read(line), self._before.read(before) if before else None, flip, item)
            if wanted.text is None or wanted.text.casefold() in _text_of(row):
                yield row

    def _flip(self, line: Line) -> Flip | None:
        before = self._lines_before.get(line.key)
        return None if before is None else _FLIPS[before.correct, line.correct]


def find_run(run_paths: Sequence[Path], role: str, benchmark: str) -> RunDir | None:
    """The newest attempt with such predictions: one that was killed early has none, and those before it may."""
    runs = [RunDir(path) for path in reversed(run_paths)]
    return next((run for run in runs if (run.evaluation_path(role, benchmark) / PREDICTIONS_NAME).is_file()), None)


def find_picture(run_paths: Sequence[Path], benchmark: str, item_id: str) -> tuple[Path, str] | None:
    """File and media type of an item's picture; None where there is no such item, or it shows nothing."""
    for path in reversed(run_paths):
        directory = RunDir(path).items_path(benchmark)
        item = items_of(directory).get(item_id)
        if item is not None and item.picture is not None:
            # The name is a checked hash: nothing that a client sent becomes part of a path.
            file = directory / PICTURES_NAME / item.picture.sha256
            return (file, item.picture.media_type) if file.is_file() else None
    return None


def _fits(wanted: Filter, line: Line, flip: Flip | None, item: ItemRecord | None) -> bool:
    if wanted.correct is not None and line.correct != wanted.correct:
        return False
    if wanted.flip is not None and flip != wanted.flip:
        return False
    return wanted.category is None or (item is not None and _is_of(wanted.category, item.categories))


def _is_of(category: str, categories: Mapping[str, str]) -> bool:
    """category: one, or several as "subject: algebra; level: 3"."""
    parts = [part.partition(": ") for part in category.split("; ")]
    return all(categories.get(name) == value for name, _, value in parts)


def _text_of(row: Row) -> str:
    texts = [row.prediction.get(name) for name in ("id", "prompt", "prediction", "answer", "extracted")]
    texts += [row.before.get("prediction")] if row.before else []
    return "\n".join(str(text) for text in texts if text).casefold()


@dataclass(frozen=True)
class _File:
    """What must be equal for a file to hold the same as before."""

    device: int
    inode: int
    size_bytes: int
    changed_at_nanoseconds: int
    file: BinaryIO = field(compare=False)

    @classmethod
    def of(cls, file: BinaryIO) -> _File:
        stat = os.fstat(file.fileno())
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, file)


@lru_cache(maxsize=32)
def _lines_of(opened: _File) -> tuple[Line, ...]:
    lines, offset = [], 0
    for number, text in enumerate(opened.file, start=1):
        if not text.endswith(b"\n"):
            break
        try:
            prediction = json.loads(text)
            key = (prediction["id"], prediction.get("sample", 0))
            lines.append(Line(number, key, prediction["correct"], offset))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(opened, number, error) from None
        offset += len(text)
    return tuple(lines)


def items_of(directory: Path) -> Mapping[str, ItemRecord]:
    """By id; empty before they were written."""
    try:
        with (directory / ITEMS_NAME).open("rb") as file:
            return _items_in(_File.of(file))
    except FileNotFoundError:
        return {}


@lru_cache(maxsize=32)
def _items_in(opened: _File) -> Mapping[str, ItemRecord]:
    items = {}
    for number, text in enumerate(opened.file, start=1):
        try:
            item = ItemRecord.model_validate_json(text)
        except ValidationError as error:
            raise _damaged(opened, number, error) from None
        items[item.id] = item
    return items


def _damaged(opened: _File, line: int, error: Exception) -> DamagedFileError:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    message = f"{opened.file.name}, line {line}, is damaged ({reason}): restore the file, or score the model again"
    return DamagedFileError(message)
