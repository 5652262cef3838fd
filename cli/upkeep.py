"""`vlm-dft gc`, `backup` and `restore`: what keeps a service's disk in order and its data safe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cli.client import EXIT_FAILED, AsJson, err, out, print_json, print_refusal

_MIB = 2**20


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and why; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give up what is past its retention, and remove what nothing refers to. The janitor does so too."""
    from service.jobs.collection import collect, preview
    from service.jobs.database import open_database
    from service.settings import get_settings

    settings = get_settings()
    database = open_database(settings)
    given_up: list[str] = []
    try:
        if dry_run:
            found = preview(database, settings)
        else:
            collected = collect(database, settings, trash_seconds=0.0, say=False)
            found, given_up = collected.garbage, [*collected.files, *collected.checkpoints]
    finally:
        database.close()
    if as_json:
        places = [{"path": str(one.path), "reason": one.reason, "bytes": one.bytes} for one in found]
        print_json({"removed": not dry_run, "given_up": given_up, "data": places})
        return
    for name in given_up:
        out.print(f"given up: {name}", highlight=False)
    for one in found:
        out.print(Text(f"{one.bytes / _MIB:10.1f} MiB  {one.path}  ({one.reason})"))
    total = sum(one.bytes for one in found) / _MIB
    out.print(f"{total:10.1f} MiB  {'would be' if dry_run else 'were'} removed in {len(found)} places")


def backup(
    target: Annotated[Path, typer.Argument(help="A directory that is not there yet.")], as_json: AsJson = False
) -> None:
    """Back up database, files, runs and secret, while the service runs. Base models are not in it."""
    from service.backup import back_up
    from service.settings import get_settings
    from vlm_dft.errors import VlmDftError

    try:
        manifest = back_up(get_settings(), target)
    except VlmDftError as error:
        print_refusal(error)
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        print_json({"path": str(target), **manifest})
        return
    out.print(Text(f"{target}: {manifest['database']} and {', '.join(manifest['trees']) or 'no files'}"))


def restore(
    source: Annotated[Path, typer.Argument(help="What `vlm-dft backup` wrote.")], as_json: AsJson = False
) -> None:
    """Bring a backup back into an empty data directory and database."""
    from service.backup import restore as bring_back
    from service.settings import get_settings
    from vlm_dft.errors import VlmDftError

    try:
        missing = bring_back(get_settings(), source)
    except VlmDftError as error:
        print_refusal(error)
        raise typer.Exit(EXIT_FAILED) from None
    for line in missing:
        err.print(Text(line))
    if as_json:
        print_json({"path": str(source), "missing": missing})
        return
    out.print("restored; start the service")
