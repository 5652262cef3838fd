"""`vlm-dft preflight`: SFT or DFT? The verdict, its reasons and its evidence, before anything is trained."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.client import (
    EXIT_FAILED,
    AsJson,
    connect,
    err,
    messages,
    post,
    print_error,
    print_json,
    readable_errors,
)
from cli.preflight_report import print_report
from cli.requests import Looked, TrainingFile, put_pairs
from cli.submit import upload
from cli.watch import wait_quietly

_POLL_SECONDS = 1.0


def preflight(
    training_file: TrainingFile,
    model: Annotated[str, typer.Option(help="The model that would be tuned.")],
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows to look at.")] = 200,
    setting: Looked = None,
    as_json: AsJson = False,
) -> None:
    """Look at the data with the base model and say which objective suits it, and why."""
    with readable_errors():
        client = connect()
        file_id = upload(client, training_file, {"model": model}, messages(as_json))
        body: dict[str, Any] = {"model": model, "training_file": file_id, "num_rows": rows}
        put_pairs(body, setting or [])
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
