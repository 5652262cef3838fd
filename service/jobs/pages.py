"""Cursor pages over rows that have created_at and id, newest first as OpenAI lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

from service.errors import InvalidRequestError

Row = TypeVar("Row")
Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Rows, and whether more follow."""

    rows: list[Row]
    has_more: bool


def cut(rows: Sequence[Row], limit: int) -> Page[Row]:
    """A page of ``limit`` rows from a query that asked for one more."""
    return Page(list(rows[:limit]), len(rows) > limit)


def paginate(
    s: Session, statement: Select[Any], table: Any, *, after: str | None, limit: int, order: Order = "desc"
) -> Page[Any]:
    """Run a statement over one table's rows from the row named ``after`` on.

    Raises InvalidRequestError when there is no such row among those that the statement selects.
    """
    key = tuple_(table.created_at, table.id)
    if after is not None:
        cursor = s.scalars(statement.where(table.id == after)).one_or_none()
        if cursor is None:
            raise InvalidRequestError(f"after: there is no {after!r} in this list", param="after")
        place = (cursor.created_at, cursor.id)
        statement = statement.where(key > place if order == "asc" else key < place)
    columns = (table.created_at, table.id)
    statement = statement.order_by(*(c.asc() if order == "asc" else c.desc() for c in columns))
    return cut(s.scalars(statement.limit(limit + 1)).all(), limit)
