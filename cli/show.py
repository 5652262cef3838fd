"""Look and cancel: `vlm-dft logs`, `histograms`, `cancel`, `models`, through the openai client."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from cli.client import AsJson, connect, get, out, post, print_json, readable_errors
from cli.sparkline import bars
from cli.watch import TERMINAL, fine_tuning_path, job_path, wait_quietly

_FOLLOW_SECONDS = 1.0

models_app = typer.Typer(help="List and delete models.", invoke_without_command=True)


def logs(
    job_id: Annotated[str, typer.Argument()],
    tail_bytes: Annotated[int, typer.Option(min=1, max=2**20)] = 16384,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the end of the trainer's log."""
    with readable_errors():
        client = connect()
        if as_json:
            if follow:
                wait_quietly(client, job_id, _FOLLOW_SECONDS)
            print_json(get(client, f"{job_path(job_id)}/logs", tail_bytes=tail_bytes))
            return
        text = get(client, f"{job_path(job_id)}/logs", tail_bytes=tail_bytes)["text"]
        out.print(text, end="", markup=False, highlight=False)
        while follow and get(client, job_path(job_id))["status"] not in TERMINAL:
            time.sleep(_FOLLOW_SECONDS)
            newer = get(client, f"{job_path(job_id)}/logs", tail_bytes=tail_bytes)["text"]
            out.print(_new_part(text, newer), end="", markup=False, highlight=False)
            text = newer


def _new_part(before: str, after: str) -> str:
    """What a tail shows that the one before did not: the text after the last line they share."""
    last = before.rstrip("\n").rsplit("\n", 1)[-1] + "\n"
    at = after.rfind(last) if before else -1
    return after[at + len(last) :] if at >= 0 else after


def histograms(job_id: Annotated[str, typer.Argument()], as_json: AsJson = False) -> None:
    """Show how probable the targets of the probe's rows were, step by step: p from 0 on the left to 1 on the right."""
    with readable_errors():
        answer = get(connect(), f"{fine_tuning_path(job_id)}/histograms")
    if as_json:
        print_json(answer)
        return
    found = answer["data"]
    table = Table("rows", "part", "step", "tokens", "p = 0 ... 1", "p < 0.1", "p > 0.9", box=None)
    for one in sorted(found, key=lambda one: (one["split"] != "train", one["part"], one["step"])):
        low, high = (f"{share:.0%}" if one["num_tokens"] else "" for share in _tails(one))
        line = bars(one["counts"])
        table.add_row(one["split"], one["part"], str(one["step"]), str(one["num_tokens"]), line, low, high)
    out.print(table)


def _tails(one: dict[str, Any]) -> tuple[float, float]:
    """Shares of tokens below 0.1 and above 0.9."""
    edges, counts, total = one["bin_edges"], one["counts"], max(one["num_tokens"], 1)
    low = sum(count for edge, count in zip(edges[1:], counts, strict=True) if edge <= 0.1)
    return low / total, sum(count for edge, count in zip(edges[:-1], counts, strict=True) if edge >= 0.9) / total


def cancel(job_id: Annotated[str, typer.Argument()], as_json: AsJson = False) -> None:
    """Cancel a job; a running one stops within seconds."""
    with readable_errors():
        job = post(connect(), f"{job_path(job_id)}/cancel", {})
    if as_json:
        print_json(job)
        return
    out.print(f"{job['id']} {job.get('phase') or job['status']}", highlight=False)


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List base and tuned models."""
    if context.invoked_subcommand:
        return
    with readable_errors():
        page = get(connect(), "/models")
    if as_json:
        print_json(page)
        return
    table = Table(Column("model", overflow="fold"), "owner", "parent", "objective", box=None)
    for model in page["data"]:
        table.add_row(
            escape(model["id"]), escape(model["owned_by"]), escape(model.get("parent") or ""), model.get("objective")
        )
    out.print(table)


@models_app.command()
def delete(name: Annotated[str, typer.Argument()], as_json: AsJson = False) -> None:
    """Delete a tuned model and its weights."""
    with readable_errors():
        deleted = connect().models.delete(name)
    if as_json:
        print_json(deleted.to_dict())
        return
    out.print(f"deleted {name}", highlight=False, markup=False)
