"""What is wrong with a file or a row, as exceptions: where, which code, why and what to do. Torch-free.

A ``RowError`` costs one row and knows nothing about files: the reader that catches it adds file and line.
A ``FileError`` ends the reading: nothing after it can be trusted.
"""

from __future__ import annotations

from vlm_dft.errors import DatasetError
from vlm_dft.results import RowProblem


class RowError(DatasetError):
    """A row cannot be used: the field, the code and the reason say why."""

    def __init__(self, field: str, code: str, reason: str, *, row: str | None = None, turn: int | None = None) -> None:
        self.field = field
        self.reason_code = code
        self.reason = reason
        self.row = row
        self.turn = turn
        """Index of the canonical message, where the field is not the user's own name for it."""
        super().__init__(f"{row}: {field}: {reason}" if row else f"{field}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_row_error, (self.field, self.reason_code, self.reason, self.row, self.turn))

    def at(self, file: str, line: int) -> RowProblem:
        """The problem as the report lists it."""
        return RowProblem(file=file, line=line, field=self.field, reason=self.reason, code=self.reason_code)


def _row_error(field: str, code: str, reason: str, row: str | None, turn: int | None) -> RowError:
    return RowError(field, code, reason, row=row, turn=turn)


class FileError(DatasetError):
    """A file cannot be read: its name, the line or entry, the code and the reason say why."""

    def __init__(self, file: str, code: str, reason: str, *, line: int = 0, field: str = "") -> None:
        self.problem = RowProblem(file=file, line=line, field=field, reason=reason, code=code)
        super().__init__(f"{file}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        problem = self.problem
        return (_file_error, (problem.file, problem.code, problem.reason, problem.line, problem.field))


def _file_error(file: str, code: str, reason: str, line: int, field: str) -> FileError:
    return FileError(file, code, reason, line=line, field=field)


def shown(value: object, limit: int = 60) -> str:
    """A value as messages quote it: repr, shortened, so that a megabyte of base64 never reaches a report."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def kind(value: object) -> str:
    """The JSON name of a value's type, for messages about wrong types."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
