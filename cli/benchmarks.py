"""`vlm-dft benchmarks list|add`: which benchmarks this machine's service can score, and adding one to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from cli.client import EXIT_FAILED, AsJson, err, out, print_json, print_refusal
from vlm_dft.config import BenchmarkKind, Scoring

if TYPE_CHECKING:
    from vlm_dft.evaluation.provision import Found, Manifest

benchmarks_app = typer.Typer(help="List and add benchmarks on the service's machine.", no_args_is_help=True)

_WORDS = {True: "yes", False: "modified", None: ""}


@benchmarks_app.command("list")
def list_benchmarks(as_json: AsJson = False) -> None:
    """List the benchmarks in VLM_DFT_BENCHMARKS, else in the data directory."""
    from vlm_dft.errors import VlmDftError
    from vlm_dft.evaluation.provision import PUBLISHED, find_benchmarks, how_to_add, unknown_benchmarks

    directory = _directory()
    try:
        found, unknown = find_benchmarks(directory), unknown_benchmarks(directory)
    except VlmDftError as error:
        print_refusal(error)
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        data = [_shown(name, each.path, each.kind, each.manifest) for name, each in found.items()]
        print_json({"data": data, "unknown": [{"path": str(path), "add": how_to_add(path)} for path in unknown]})
        return
    for path in unknown:
        err.print(Text.assemble(("unknown", "yellow"), f" {path}: to score it: {how_to_add(path)}"))
    if not found:
        out.print(Text(f"none in {directory}; known are {', '.join(PUBLISHED)}: vlm-dft benchmarks add PATH"))
        return
    out.print(_table(found, directory))


def _table(found: dict[str, Found], directory: Path) -> Table:
    place = Column(f"in {directory}", overflow="fold")
    table = Table(Column("benchmark", no_wrap=True), "kind", "items", "with pictures", "as published", place, box=None)
    for name, each in found.items():
        manifest = each.manifest
        counts = (str(manifest.items), str(manifest.pictures), _WORDS[manifest.published]) if manifest else ("", "", "")
        table.add_row(escape(name), each.kind, *counts, escape(str(each.path.relative_to(directory))))
    return table


def _shown(name: str, path: Path, kind: str, manifest: Manifest | None) -> dict[str, Any]:
    """A benchmark as JSON; what an older copy does not say of itself is absent."""
    return {"name": name, "kind": kind, "path": str(path)} | (manifest.model_dump(mode="json") if manifest else {})


@benchmarks_app.command()
def add(
    source: Annotated[str, typer.Argument(help="A file, a directory with its pictures, or an https URL.")],
    name: Annotated[str | None, typer.Option(help="Default: the file's or directory's own.")] = None,
    kind: Annotated[str | None, typer.Option(help="Default: by its name, else custom.")] = None,
    scoring: Annotated[str | None, typer.Option(help="Of a custom one: option, number, latex or exact.")] = None,
    checksum: Annotated[str | None, typer.Option(help="md5 or sha256; needed for a URL of an unknown file.")] = None,
    modified: Annotated[bool, typer.Option("--modified", help="Take a file that VLMEvalKit does not publish.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="In the place of one of the same name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a benchmark to where the service finds it, after reading all of it and checking its md5."""
    from vlm_dft.errors import VlmDftError
    from vlm_dft.evaluation import provision

    directory = _directory()
    try:
        chosen, manifest = provision.add(
            source,
            directory,
            name=name,
            kind=_one_of(kind, get_args(BenchmarkKind), "--kind"),
            scoring=_one_of(scoring, get_args(Scoring), "--scoring"),
            checksum=checksum,
            modified=modified,
            replace=replace,
        )
    except VlmDftError as error:
        print_refusal(error)
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        print_json(_shown(chosen, directory / chosen, manifest.kind, manifest))
        return
    checked = {True: ", as VLMEvalKit publishes it", False: ", NOT as VLMEvalKit publishes it", None: ""}
    counts = f"{manifest.items} items, {manifest.pictures} with pictures"
    out.print(Text(f"{chosen} ({manifest.kind}): {counts}{checked[manifest.published]}: {directory / chosen}"))


@benchmarks_app.command()
def regression(
    replace: Annotated[bool, typer.Option("--replace", help="In the place of what stands there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add the small regression set: facts, reading, looking; name it in a job's evaluation.regression."""
    from tempfile import TemporaryDirectory

    from vlm_dft.errors import VlmDftError
    from vlm_dft.evaluation import provision
    from vlm_dft.evaluation.regression import NAME, write

    directory = _directory()
    with TemporaryDirectory() as temporary:
        source = Path(temporary) / NAME
        write(source)
        try:
            chosen, manifest = provision.add(str(source), directory, name=NAME, kind="custom", replace=replace)
        except VlmDftError as error:
            print_refusal(error)
            raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        print_json(_shown(chosen, directory / chosen, manifest.kind, manifest))
        return
    out.print(f"{chosen}: {manifest.items} items, {manifest.pictures} with pictures", highlight=False)


def _one_of(value: str | None, known: tuple[str, ...], option: str) -> Any:
    if value is not None and value not in known:
        raise typer.BadParameter(f"{option} takes {', '.join(known)}, not {value!r}")
    return value


def _directory() -> Path:
    from service.settings import get_settings

    return get_settings().resolved_benchmarks
