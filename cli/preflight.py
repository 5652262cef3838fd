"""`vlm-dft preflight`: SFT or DFT? The verdict, its reasons and its evidence, before anything is trained."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cli.client import (
    EXIT_FAILED,
    AsJson,
    connect,
    err,
    messages,
    out,
    post,
    print_error,
    print_json,
    readable_errors,
)
from cli.sparkline import bars
from cli.submit import upload
from cli.watch import wait_quietly

_POLL_SECONDS = 1.0


def preflight(
    training_file: Annotated[str, typer.Argument(help="A file to upload, or the id of one (file-...).")],
    model: Annotated[str, typer.Option(help="The model that would be tuned.")],
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows to look at.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Look at the data with the base model and say which objective suits it, and why."""
    with readable_errors():
        client = connect()
        file_id = upload(client, training_file, {"model": model}, messages(as_json))
        body = {"model": model, "training_file": file_id, "num_rows": rows}
        preflight_id = post(client, "/fine_tuning/preflights", body)["id"]
        with err.status(f"preflight {preflight_id}"):
            found = wait_quietly(client, preflight_id, _POLL_SECONDS)
    if as_json:
        print_json(found)
    elif found["status"] == "succeeded":
        print_report(found["report"])
    else:
        print_error((found["error"] or {}).get("message", ""), word=found["status"])
    if found["status"] != "succeeded":
        raise typer.Exit(EXIT_FAILED)


def print_report(report: dict[str, Any]) -> None:
    """Verdict and reasons first, the evidence below."""
    verdict = report["verdict"]
    rest = f"  ({verdict['rule']}, {report['num_rows']} rows)"
    out.print(Text.assemble((verdict["label"], "bold green"), rest))
    for reason in verdict["reasons"]:
        out.print(Text(f"  {reason}"))
    for change in verdict["would_change"]:
        out.print(Text(f"  would change it: {change}"))
    table = Table("part", "tokens", "mean p", "p<0.01", "p<0.1", "entropy", "DFT discards", "0 .. p .. 1", box=None)
    for part in report["parts"]:
        if part["num_tokens"]:
            shares = [part[name] for name in ("mean_p", "share_p_below_001", "share_p_below_01", "entropy")]
            cells = [f"{share:.3f}" for share in shares]
            discards = "" if part["dft_discards"] is None else f"{part['dft_discards']:.0%}"
            table.add_row(part["part"], str(part["num_tokens"]), *cells, discards, bars(part["counts"]))
    out.print(table)
    for limit in verdict["limits"]:
        out.print(Text(limit, "dim"))
