"""`vlm-dft jobs` and `workers`: who runs, who waits for what, on which machines; as the dashboard shows it."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from cli.client import AsJson, connect, get, out, print_json, readable_errors
from cli.watch import duration

_JOB_ID_WIDTH = 30


KINDS = {
    "fine-tunings": "/fine_tuning/jobs",
    "comparisons": "/fine_tuning/comparisons",
    "evaluations": "/evaluations",
    "preflights": "/fine_tuning/preflights",
}


def jobs(
    kind: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}.")] = "fine-tunings",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: AsJson = False,
) -> None:
    """List the newest fine-tuning jobs, or others: how far they are, or what they wait for."""
    if kind not in KINDS:
        raise typer.BadParameter(f"--kind takes {', '.join(KINDS)}, not {kind!r}")
    with readable_errors():
        page = get(connect(), KINDS[kind], limit=limit)
    if as_json:
        print_json(page)
        return
    if not page["data"]:
        out.print(f"there are no {kind} yet")
        return
    columns = ("phase", "model", "what", "where it is", "created")
    table = Table(Column("job", min_width=_JOB_ID_WIDTH), *columns, box=None)
    for job in page["data"]:
        created = time.strftime("%m-%d %H:%M", time.localtime(job["created_at"]))
        phase = job.get("phase") or job["status"]
        table.add_row(job["id"], phase, escape(job["model"]), escape(_what(job)), where(job), created)
    out.print(table)


def _what(job: dict[str, Any]) -> str:
    """The objective of a fine-tuning, the benchmarks of an evaluation, a comparison's name, a preflight's verdict."""
    if job["object"] == "fine_tuning.preflight":
        return job["report"]["verdict"]["label"] if job["report"] else ""
    if job["object"] == "evaluation":
        return ", ".join(job["benchmarks"])
    return job["name"] if "name" in job else job["objective"]


def where(job: dict[str, Any]) -> str:
    """Its place in the queue, why it waits and when it may start; or its step and the time that is left."""
    queue, progress = job.get("queue"), job.get("progress") or {}
    parts = []
    if queue:
        if queue["position"]:
            parts.append(f"position {queue['position']}")
        if queue["blocked_reason"]:
            parts.append(queue["blocked_reason"].replace("_", " "))
        if queue["estimated_start"]:
            parts.append(f"starts at about {time.strftime('%H:%M', time.localtime(queue['estimated_start']))}")
    else:
        if progress.get("total_steps"):
            parts.append(f"step {progress['step']}/{progress['total_steps']}")
        if progress.get("items_total"):
            what = escape(progress["benchmark"] or "row")
            parts.append(f"{what} {progress['items_done'] or 0}/{progress['items_total']}")
        if job["status"] == "running" and progress.get("seconds_remaining") is not None:
            parts.append(f"{duration(progress['seconds_remaining'])} left")
    return ", ".join(parts)


def workers(as_json: AsJson = False) -> None:
    """List workers and their GPUs: who is busy with what, memory, utilisation."""
    with readable_errors():
        page = get(connect(), "/workers")
    if as_json:
        print_json(page)
        return
    if not page["data"]:
        out.print("no worker has reported yet: jobs are kept and start as soon as one does")
        return
    table = Table("host", "queue", "state", "device", "memory", "busy", "last seen", "job", box=None)
    for worker in page["data"]:
        state = "lost" if not worker["alive"] else "busy" if worker["busy"] else "idle"
        seen = time.strftime("%H:%M:%S", time.localtime(worker["last_seen"]))
        for device in worker["devices"] or [None]:
            cells = ("CPU", "", "") if device is None else _device(device)
            table.add_row(escape(worker["host"]), worker["queue"], state, *cells, seen, worker["job_id"])
    out.print(table)


def _device(gpu: dict[str, Any]) -> tuple[str, str, str]:
    """Name, memory used of all of it, utilisation."""
    used = f"{gpu['memory_used_gib']:.1f} of {gpu['memory_total_gib']:.1f} GiB"
    busy = "" if gpu["utilisation_percent"] is None else f"{gpu['utilisation_percent']} %"
    return f"{gpu['index']}: {escape(gpu['name'])}", used, busy
