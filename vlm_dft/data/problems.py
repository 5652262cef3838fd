"""One invalid row as an exception: where, which code, why and what to do. Torch-free.

Knows nothing about files; the reader that catches it adds file and line and makes a ``RowProblem`` of it.
"""

from __future__ import annotations

from vlm_dft.errors import DatasetError
from vlm_dft.results import RowProblem


class RowError(DatasetError):
    """A row cannot be used: the field, the code and the reason say why."""

    def __init__(self, field: str, code: str, reason: str, *, row: str | None = None) -> None:
        self.field = field
        self.reason_code = code
        self.reason = reason
        self.row = row
        place = f"{row}: {field}" if row else field
        super().__init__(f"{place}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.field, self.reason_code, self.reason, self.row))

    def at(self, file: str, line: int) -> RowProblem:
        """The problem as the report lists it."""
        return RowProblem(file=file, line=line, field=self.field, reason=self.reason, code=self.reason_code)


def _rebuild(field: str, code: str, reason: str, row: str | None) -> RowError:
    return RowError(field, code, reason, row=row)


def shown(value: object, limit: int = 60) -> str:
    """A value as messages quote it: repr, shortened, so that a megabyte of base64 never reaches a report."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
