"""Migrated databases for tests, quick to make: each is a copy of one that was migrated once."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from service.jobs.database import Database

POSTGRES_TEMPLATE = "vlm_dft_template"


@contextmanager
def postgres_database(server_url: str, template: str | None = None) -> Iterator[str]:
    """A new PostgreSQL database, empty or a copy of the template; dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    copied = f" TEMPLATE {template}" if template else ""
    _administer(server_url, f"CREATE DATABASE {name}{copied}")
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        _administer(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def migrated_postgres(server_url: str) -> Iterator[str]:
    """Make the template database and yield its name; a server of the developer's own is left as it was."""
    _administer(server_url, f"DROP DATABASE IF EXISTS {POSTGRES_TEMPLATE}")
    _administer(server_url, f"CREATE DATABASE {POSTGRES_TEMPLATE}")
    database = Database(make_url(server_url).set(database=POSTGRES_TEMPLATE))
    database.upgrade()
    database.close()
    yield POSTGRES_TEMPLATE
    _administer(server_url, f"DROP DATABASE {POSTGRES_TEMPLATE} WITH (FORCE)")


def migrated_sqlite(path: Path) -> Path:
    """A migrated SQLite file to copy."""
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    return path


def copied_sqlite(source: Path, target: Path) -> str:
    """The URL of a copy."""
    shutil.copyfile(source, target)
    return f"sqlite:///{target}"


def _administer(server_url: str, command: str) -> None:
    url = make_url(server_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(command)
