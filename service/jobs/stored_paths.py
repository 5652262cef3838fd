"""Columns that hold paths, written so that hosts with different data directories mean the same thing by them.

With an object store each host has a data directory of its own. What lies below it is stored as ``store://runs/...`` and
read back as a path below the reader's data directory; other paths, such as a registered dataset's, are kept as they
are. Without an object store the hosts share one data directory, and nothing is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sqlalchemy import JSON, Dialect, Engine, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator, TypeEngine

SCHEME: Final = "store://"
_ROOT: Final = "vlm_dft_data"


def translate_paths(engine: Engine, data: Path) -> None:
    """Let this engine's paths below ``data`` (absolute) be stored without it."""
    setattr(engine.dialect, _ROOT, str(data))


def named(value: Any, root: str) -> Any:
    """A document with every path below root named as in the store."""
    if isinstance(value, str):
        return SCHEME + value[len(root) + 1 :] if value.startswith(f"{root}/") else value
    return _each(value, root, named)


def placed(value: Any, root: str) -> Any:
    """A document with every name of the store as a path below root."""
    if isinstance(value, str):
        return f"{root}/{value[len(SCHEME) :]}" if value.startswith(SCHEME) else value
    return _each(value, root, placed)


def _each(value: Any, root: str, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(item, root) for key, item in value.items()}
    return [change(item, root) for item in value] if isinstance(value, list) else value


class _Translated(TypeDecorator[Any]):
    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        root = getattr(dialect, _ROOT, None)
        return value if root is None else named(value, root)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        root = getattr(dialect, _ROOT, None)
        return value if root is None else placed(value, root)


class StoredPath(_Translated):
    """The text of a path."""

    cache_ok = True


class StoredDocument(_Translated):
    """A JSON document that may hold paths anywhere."""

    impl = JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind = JSONB if dialect.name == "postgresql" else JSON
        return dialect.type_descriptor(kind(none_as_null=True))
