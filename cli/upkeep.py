"""`vlm-dft gc`, `backup` and `restore`: what keeps a service's disk in order and its data safe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.client import EXIT_FAILED, err, out

_MIB = 2**20


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and why; change nothing.")] = False,
) -> None:
    """Give up what is past its retention, and remove what nothing refers to. The janitor does so too."""
    from service.jobs.collection import collect, preview
    from service.jobs.database import open_database
    from service.settings import get_settings

    settings = get_settings()
    database = open_database(settings)
    try:
        if dry_run:
            found = preview(database, settings)
        else:
            collected = collect(database, settings, trash_seconds=0.0, say=False)
            found = collected.garbage
            for name in (*collected.files, *collected.checkpoints):
                out.print(f"given up: {name}", highlight=False)
    finally:
        database.close()
    for one in found:
        out.print(f"{one.bytes / _MIB:10.1f} MiB  {one.path}  ({one.reason})", highlight=False, soft_wrap=True)
    total = sum(one.bytes for one in found) / _MIB
    out.print(f"{total:10.1f} MiB  {'would be' if dry_run else 'were'} removed in {len(found)} places")


def backup(target: Annotated[Path, typer.Argument(help="A directory that is not there yet.")]) -> None:
    """Back up database, files, runs and secret, while the service runs. Base models are not in it."""
    from service.backup import back_up
    from service.settings import get_settings
    from vlm_dft.errors import VlmDftError

    try:
        manifest = back_up(get_settings(), target)
    except VlmDftError as error:
        err.print(error.message, highlight=False)
        raise typer.Exit(EXIT_FAILED) from None
    out.print(f"{target}: {manifest['database']} and {', '.join(manifest['trees']) or 'no files'}", highlight=False)


def restore(source: Annotated[Path, typer.Argument(help="What `vlm-dft backup` wrote.")]) -> None:
    """Bring a backup back into an empty data directory and database."""
    from service.backup import restore as bring_back
    from service.settings import get_settings
    from vlm_dft.errors import VlmDftError

    try:
        missing = bring_back(get_settings(), source)
    except VlmDftError as error:
        err.print(error.message, highlight=False)
        raise typer.Exit(EXIT_FAILED) from None
    for line in missing:
        err.print(line, highlight=False)
    out.print("restored; start the service")
