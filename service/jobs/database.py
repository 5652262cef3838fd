"""Connections, transactions and the clock, the same on SQLite and PostgreSQL. Knows nothing about jobs.

``write()`` is a transaction that may change rows: BEGIN IMMEDIATE on SQLite, so that writers queue instead of failing
with "database is locked". ``read()`` may not change anything; the database refuses it. No network call and no long
computation belongs inside either.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, Float, create_engine, event, make_url, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.functions import FunctionElement

from service.jobs.stored_paths import translate_paths
from service.settings import Settings

SQLITE_BUSY_MILLISECONDS = 15_000
MIGRATION_LOCK = "vlm-dft migrations"


class clock(FunctionElement[float]):  # noqa: N801 - reads as an SQL function
    """The database's wall clock as an SQL expression, in seconds since the epoch."""

    type = Float(53)
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite_clock(*_: Any, **__: Any) -> str:
    # SQLite's own clock has milliseconds only, in which several rows may be made; its users share one host's clock.
    return "vlm_dft_clock()"


@compiles(clock, "postgresql")
def _postgresql_clock(*_: Any, **__: Any) -> str:
    # Not now(): that is the start of the transaction, which may have waited for a lock.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


def now(s: Session) -> float:
    """The database's clock, in seconds since the epoch: one clock for leases, whatever the hosts' clocks say."""
    return s.scalars(select(clock())).one()


def serialize(s: Session, name: str) -> None:
    """Let no other transaction that gave the same name go on until this one ends.

    SQLite's write transactions are serial already.
    """
    if s.get_bind().dialect.name == "postgresql":
        s.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(name)})


def _lock_key(name: str) -> int:
    return (zlib.crc32(b"vlm-dft") << 31) | (zlib.crc32(name.encode()) >> 1)


class Database:
    """One database: its connections, and its schema's version. Open it after a fork, never before."""

    def __init__(self, url: str | URL, *, data: Path | None = None) -> None:
        """data: where this host keeps what others know by its name in the object store (``stored_paths``)."""
        self.url = make_url(url)
        self.before_commit: list[Callable[[Session], None]] = []
        """Run at the end of each write transaction that did not raise, within it."""
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # As many connections as a web server has threads; they are opened only when needed.
        engine = create_engine(self.url, pool_size=10, max_overflow=40, pool_pre_ping=not self.is_sqlite)
        if self.is_sqlite:
            _prepare_sqlite(engine, foreign_keys=True)
        if data is not None:
            translate_paths(engine, data)
        self._write = engine.execution_options(sqlite_begin="BEGIN IMMEDIATE", sqlite_query_only="OFF")
        self._read = engine.execution_options(
            sqlite_begin="BEGIN", sqlite_query_only="ON", **({} if self.is_sqlite else {"postgresql_readonly": True})
        )

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may change rows; commits at the end of the block, rolls back when it raises."""
        with Session(self._write, expire_on_commit=False) as session, session.begin():
            yield session
            for finish in self.before_commit:
                finish(session)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that changes nothing; objects stay usable after it."""
        with Session(self._read, expire_on_commit=False, autoflush=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close every connection."""
        self._write.dispose()

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema to a revision; processes that start together wait for one another."""
        with self._migration() as config:
            command.upgrade(config, revision)

    def downgrade(self, revision: str = "base") -> None:
        """Take the schema back to a revision."""
        with self._migration() as config:
            command.downgrade(config, revision)

    def check(self) -> None:
        """Raise alembic.util.CommandError when the tables differ from what the migrations make."""
        with self._migration() as config:
            command.check(config)

    def at_head(self) -> bool:
        """Whether the schema is the newest one."""
        with self._read.connect() as connection:
            current = MigrationContext.configure(connection).get_current_heads()
        return set(current) == set(ScriptDirectory.from_config(_alembic_config()).get_heads())

    @contextmanager
    def _migration(self) -> Iterator[Config]:
        """One transaction around all migrations, under a lock; nothing half-migrated is ever committed."""
        engine = create_engine(self.url, poolclass=NullPool)
        if self.is_sqlite:
            # Rebuilding a table drops the old one, which enforced foreign keys would refuse; checked below instead.
            _prepare_sqlite(engine, foreign_keys=False)
        with engine.execution_options(sqlite_begin="BEGIN IMMEDIATE", sqlite_query_only="OFF").begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(MIGRATION_LOCK)})
            config = _alembic_config()
            config.attributes["connection"] = connection
            yield config
            if self.is_sqlite:
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                assert not broken, f"a migration left rows that refer to nothing: {broken[:3]}"


def open_database(settings: Settings) -> Database:
    """The service's database; its schema is brought up by ``upgrade()``, not here."""
    return Database(settings.resolved_database_url, data=settings.data if settings.storage_url else None)


def _alembic_config() -> Config:
    config = Config()
    location = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", location.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _prepare_sqlite(engine: Engine, *, foreign_keys: bool) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        connection.create_function("vlm_dft_clock", 0, time.time)
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_MILLISECONDS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        # FULL, not NORMAL: a submit that was answered must survive a power loss.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        connection.exec_driver_sql(f"PRAGMA query_only = {options.get('sqlite_query_only', 'OFF')}")
        connection.exec_driver_sql(options.get("sqlite_begin", "BEGIN IMMEDIATE"))
