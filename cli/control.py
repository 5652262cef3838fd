"""Control a job after its submit: `vlm-dft pause`, `resume`, `start`, `clone`, `priority`; `cancel` is in ``show``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.client import AsJson, connect, out, post, print_json, readable_errors
from cli.requests import number_or_word, put_pairs
from cli.watch import fine_tuning_path

JobId = Annotated[str, typer.Argument(help="ftjob-...")]


def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Take a job out of the queue, or let it write a checkpoint and give its device back."""
    _ask(job_id, "pause", as_json)


def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a paused job wait again; it goes on from its newest checkpoint."""
    _ask(job_id, "resume", as_json)


def start(job_id: JobId, as_json: AsJson = False) -> None:
    """Queue a job that was submitted with --no-start."""
    _ask(job_id, "start", as_json)


def clone(
    job_id: JobId,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="suffix=b, or method.supervised.hyperparameters.batch_size=8; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job's request again, changed by what is given."""
    body: dict[str, Any] = {}
    put_pairs(body, changes or [])
    _ask(job_id, "clone", as_json, body)


def priority(
    job_id: JobId,
    value: Annotated[str, typer.Argument(help="low, normal, high or a number.")],
    as_json: AsJson = False,
) -> None:
    """Let a waiting job go earlier or later: a higher number goes first."""
    with readable_errors():
        job = connect().patch(fine_tuning_path(job_id), cast_to=object, body={"priority": number_or_word(value)})
    _show(job, as_json)


def _ask(job_id: str, what: str, as_json: bool, body: dict[str, Any] | None = None) -> None:
    with readable_errors():
        job = post(connect(), f"{fine_tuning_path(job_id)}/{what}", body or {})
    _show(job, as_json)


def _show(job: Any, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    queue = job.get("queue") or {}
    place = f", position {queue['position']}" if queue.get("position") else ""
    reason = f", {queue['blocked_reason']}" if queue.get("blocked_reason") else ""
    out.print(f"{job['id']} {job['phase']}{place}{reason}", highlight=False)
