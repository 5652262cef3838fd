"""`vlm-dft up`, `migrate`, `work`, `demo`: what runs on the service's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.client import EXIT_FAILED, EXIT_USAGE, out, print_error

if TYPE_CHECKING:
    from service.jobs.database import Database


def up(
    host: Annotated[str | None, typer.Option(help="Address to serve on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is written.")] = None,
    gpu_workers: Annotated[int | None, typer.Option(min=0, help="Default: one per GPU, or one on the CPU.")] = None,
    cpu_workers: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Start the service: broker, API, janitor and workers. Ctrl-C drains."""
    from cli.up import up as start
    from service.settings import Settings
    from vlm_dft.errors import VlmDftError

    chosen = {"host": host, "port": port, "data_dir": data_dir}
    settings = Settings.model_validate({name: value for name, value in chosen.items() if value is not None})
    try:
        raise typer.Exit(start(settings, gpu_workers=gpu_workers, cpu_workers=cpu_workers))
    except VlmDftError as error:
        print_error(error.message)
        raise typer.Exit(EXIT_FAILED) from None


def migrate() -> None:
    """Bring the database to this version's schema."""
    migrated_database()
    out.print("the database is at this version's schema")


def work(
    queue: Annotated[str, typer.Option(help="gpu or cpu.")] = "gpu",
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one per GPU, or one.")] = None,
) -> None:
    """Run workers alone, against the database and broker of VLM_DFT_DATABASE_URL and VLM_DFT_BROKER_URL."""
    from cli.up import work as start
    from service.jobs.phases import Queue
    from service.settings import get_settings

    if queue not in set(Queue):
        print_error(f"--queue takes {' or '.join(Queue)}, not {queue!r}")
        raise typer.Exit(EXIT_USAGE)
    raise typer.Exit(start(get_settings(), Queue(queue), workers=workers))


def demo(
    data_dir: Annotated[Path | None, typer.Option(help="Default: a temporary directory.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running afterwards.")] = False,
) -> None:
    """Watch the whole mission on a tiny model: SFT, then SFT against DFT, with scores. Minutes on two cores."""
    from cli.demo import demo as run

    raise typer.Exit(run(data_dir=data_dir, keep=keep))


def migrated_database() -> Database:
    """The database at this version's schema."""
    from service.jobs.database import open_database
    from service.settings import get_settings

    settings = get_settings()
    settings.data.mkdir(parents=True, exist_ok=True)
    database = open_database(settings)
    database.upgrade()
    return database
