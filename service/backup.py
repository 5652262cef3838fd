"""Back a service up into a directory, and bring it back, perhaps elsewhere. The service may run during a backup.

    BACKUP/
    ├── manifest.json      what it is, and where its paths lay
    ├── database.db | database.dump     SQLite's own snapshot, or pg_dump's
    ├── secret             what API keys and webhooks are signed with, unless VLM_DFT_SECRET holds it
    └── files/ runs/ scores/

The database comes first: what its rows name exists already and is never changed, so that it is still there when the
files are copied, unless somebody deleted it meanwhile. The other way round, rows would name what the copy lacks.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from sqlalchemy import make_url, select, update
from sqlalchemy.orm import Session

from service.jobs.database import open_database
from service.jobs.garbage import TRASH
from service.jobs.stored_paths import StoredDocument, StoredPath
from service.jobs.tables import Base, Checkpoint, File, Model
from service.settings import Settings
from vlm_dft.errors import VlmDftError
from vlm_dft.run_dir import CHECKPOINT_MARKER, directory_in_place, write_json

TREES: Final = ("files", "runs", "scores")
_SECRET: Final = "secret"  # noqa: S105 - a file's name


class BackupError(VlmDftError):
    """The backup or the restore cannot be done."""

    code = "backup_failed"


def back_up(settings: Settings, target: Path) -> dict[str, Any]:
    """Write a whole backup to a directory that is not there yet; returns its manifest. Raises BackupError."""
    if target.exists():
        raise BackupError(f"{target} is there already: name a directory that is not")
    url = make_url(settings.resolved_database_url)
    with directory_in_place(target.resolve()) as directory:
        if url.get_backend_name() == "sqlite":
            _dump_sqlite(Path(url.database or ""), directory / "database.db")
        else:
            _run("pg_dump", "--format=custom", f"--file={directory / 'database.dump'}", f"--dbname={_plain(settings)}")
        secret = settings.data / _SECRET
        if secret.exists():
            shutil.copy2(secret, directory / _SECRET)
        trees = [] if settings.storage_url else [name for name in TREES if (settings.data / name).is_dir()]
        for name in trees:
            _copy_tree(settings.data / name, directory / name)
        manifest = {
            "version": version("vlm-dft"),
            "created_at": time.time(),
            "database": url.get_backend_name(),
            "data": str(settings.data),
            "trees": trees,
        }
        write_json(directory / "manifest.json", manifest)
    return manifest


def restore(settings: Settings, source: Path) -> list[str]:
    """Bring a backup back into the settings' empty data directory and database, and move every path in it there.

    Returns what the rows name and the backup lacks, of which checkpoints are forgotten. Raises BackupError.
    """
    try:
        manifest = json.loads((source / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise BackupError(f"{source} holds no whole backup: manifest.json is missing") from None
    url = make_url(settings.resolved_database_url)
    if url.get_backend_name() != manifest["database"]:
        raise BackupError(f"the backup is of {manifest['database']}, the settings say {url.get_backend_name()}")
    for name in manifest["trees"]:
        if (settings.data / name).is_dir() and any((settings.data / name).iterdir()):
            raise BackupError(f"{settings.data / name} is not empty: restore into a fresh data directory")
    settings.data.mkdir(parents=True, exist_ok=True)
    for name in manifest["trees"]:
        shutil.copytree(source / name, settings.data / name, symlinks=True, dirs_exist_ok=True)
    if (source / _SECRET).exists():
        shutil.copy2(source / _SECRET, settings.data / _SECRET)
    # The database last: a service that finds it finds everything else.
    if manifest["database"] == "sqlite":
        _load_sqlite(source / "database.db", Path(url.database or ""))
    else:
        _run(
            "pg_restore", "--no-owner", "--exit-on-error", f"--dbname={_plain(settings)}", str(source / "database.dump")
        )
    database = open_database(settings)
    try:
        database.upgrade()
        with database.write() as s:
            relocate(s, Path(manifest["data"]), settings.data)
            return _missing(s)
    finally:
        database.close()


def relocate(s: Session, before: Path, after: Path) -> None:
    """Let every path in every row that lay below one data directory lie below another."""
    if before == after:
        return
    for table in Base.metadata.sorted_tables:
        names = [c.name for c in table.columns if isinstance(c.type, StoredPath | StoredDocument)]
        if not names:
            continue
        keys = list(table.primary_key.columns)
        for row in s.execute(select(*keys, *(table.c[name] for name in names))).mappings().all():
            moved = {name: _moved(row[name], str(before), str(after)) for name in names}
            if any(moved[name] != row[name] for name in names):
                s.execute(update(table).where(*(key == row[key.name] for key in keys)).values(**moved))


def _moved(value: Any, before: str, after: str) -> Any:
    if isinstance(value, str):
        return after + value[len(before) :] if value == before or value.startswith(f"{before}/") else value
    if isinstance(value, dict):
        return {key: _moved(item, before, after) for key, item in value.items()}
    return [_moved(item, before, after) for item in value] if isinstance(value, list) else value


def _missing(s: Session) -> list[str]:
    missing = []
    for checkpoint in s.scalars(select(Checkpoint)).all():
        if not (Path(checkpoint.path) / CHECKPOINT_MARKER).exists():
            missing.append(f"checkpoint {checkpoint.name}: it was pruned during the backup and is forgotten")
            s.delete(checkpoint)
    for model in s.scalars(select(Model).where(Model.deleted_at.is_(None))):
        if not Path(model.path).is_dir():
            missing.append(f"model {model.id}: {model.path} is missing")
    for file in s.scalars(select(File).where(File.deleted_at.is_(None))):
        if not Path(file.path).exists():
            missing.append(f"file {file.id}: {file.path} is missing")
    return missing


def _dump_sqlite(source: Path, target: Path) -> None:
    """SQLite's online backup: a consistent snapshot, whoever writes meanwhile."""
    if not source.exists():
        raise BackupError(f"there is no database {source}")
    with closing(sqlite3.connect(source)) as reader, closing(sqlite3.connect(target)) as writer:
        reader.backup(writer)
        writer.execute("PRAGMA journal_mode = DELETE")


def _load_sqlite(source: Path, target: Path) -> None:
    if target.exists():
        raise BackupError(f"the database {target} is there already: restore into a fresh data directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _copy_tree(source: Path, target: Path) -> None:
    """Copy what is complete; what vanishes under our hands was deleted, and its half copy goes too."""
    target.mkdir()
    for path in _complete(source):
        copy = target / path.relative_to(source)
        try:
            if path.is_dir() and not path.is_symlink():
                copy.mkdir(exist_ok=True)
            else:
                shutil.copy2(path, copy, follow_symlinks=False)
        except FileNotFoundError:
            continue
    for marker in list(target.rglob(CHECKPOINT_MARKER)):
        if not (source / marker.relative_to(target)).exists():
            shutil.rmtree(marker.parent)


def _complete(directory: Path) -> Iterator[Path]:
    """Everything below a directory, parents first, without the trash and what is still being written."""
    for path in sorted(directory.iterdir()):
        if path.name == TRASH or path.name.endswith((".tmp", ".incoming")):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _complete(path)


def _plain(settings: Settings) -> str:
    """As PostgreSQL's own programs take it."""
    url = make_url(settings.resolved_database_url).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def _run(program: str, *arguments: str) -> None:
    found = shutil.which(program)
    if found is None:
        raise BackupError(f"{program} is not on PATH: install PostgreSQL's client programs")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackupError(f"{program} failed: {done.stderr.strip()}")
