"""Migrated databases for tests, quick to make: SQLite's is a copy, PostgreSQL's is emptied after each test."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from service.jobs.database import Database
from service.jobs.tables import Base


@contextmanager
def postgres_database(server_url: str) -> Iterator[str]:
    """A new, empty PostgreSQL database; dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    _run(server_url, f"CREATE DATABASE {name}")
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        _run(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def migrated_postgres(server_url: str) -> Iterator[str]:
    """A new, migrated PostgreSQL database."""
    with postgres_database(server_url) as url:
        database = Database(url)
        database.upgrade()
        database.close()
        yield url


def empty_postgres(url: str) -> None:
    """Delete every row, and end what a test left connected: far quicker than a new database."""
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    deletes = [f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables)]
    _run(url, ";".join([f"{others} AND pid <> pg_backend_pid()", *deletes]))


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


def _run(url: str, command: str) -> None:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(command)  # pyright: ignore[reportArgumentType] - we built it
