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


def jobs(limit: Annotated[int, typer.Option(min=1, max=100)] = 20, as_json: AsJson = False) -> None:
    """List the newest fine-tuning jobs: how far they are, or what they wait for."""
    with readable_errors():
        page = get(connect(), "/fine_tuning/jobs", limit=limit)
    if as_json:
        print_json(page)
        return
    if not page["data"]:
        out.print("no job yet: `vlm-dft submit` makes one")
        return
    columns = ("phase", "model", "objective", "where it is", "created")
    table = Table(Column("job", min_width=_JOB_ID_WIDTH), *columns, box=None)
    for job in page["data"]:
        created = time.strftime("%m-%d %H:%M", time.localtime(job["created_at"]))
        table.add_row(job["id"], job["phase"], escape(job["model"]), job["objective"], where(job), created)
    out.print(table)


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
    elif progress.get("total_steps"):
        parts.append(f"step {progress['step']}/{progress['total_steps']}")
        if progress.get("benchmark") and progress.get("items_total"):
            parts.append(f"{escape(progress['benchmark'])} {progress['items_done'] or 0}/{progress['items_total']}")
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
