"""Follow a job to its end: events as they come, a progress bar with ETA, the result. Polls: leaving changes nothing."""

from __future__ import annotations

import time
from typing import Annotated, Any

import openai
import typer
from openai.types.fine_tuning import FineTuningJob
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cli.client import EXIT_FAILED, AsJson, connect, err, get, out, print_error, print_json, readable_errors
from cli.preflight_report import print_report
from cli.sparkline import sparkline

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
_CURVE_WIDTH = 20
_LEVEL_STYLE = {"warn": "yellow", "error": "red"}


def watch(
    job_id: Annotated[str, typer.Argument(help="ftjob-..., eval-... or preflight-...")],
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Follow a job until it ends; exit code 0 only if it succeeded."""
    if job_id.startswith("ftcmp-"):
        raise typer.BadParameter(f"follow a comparison with `vlm-dft compare {job_id}`")
    with readable_errors():
        job = at_its_end(connect(), job_id, poll_seconds, quiet=as_json)
    if as_json:
        print_json(job)
    if job["status"] != "succeeded":
        raise typer.Exit(EXIT_FAILED)


def wait_quietly(client: openai.OpenAI, job_id: str, poll_seconds: float) -> dict[str, Any]:
    """The job's last state, with nothing printed before."""
    while (job := get(client, job_path(job_id)))["status"] not in TERMINAL:
        time.sleep(poll_seconds)
    return job


def follow(client: openai.OpenAI, job_id: str, poll_seconds: float) -> dict[str, Any]:
    """Print events and progress until the job ends; answers its last state."""
    path = job_path(job_id)
    job = get(client, path)  # before the bar: an id that is wrong has none
    after_seq = 0
    with Progress(
        TextColumn("{task.fields[phase]:<14}"), BarColumn(), TextColumn("{task.fields[counts]}"), console=out
    ) as bar:
        task = bar.add_task("job", total=None, phase="queued", counts="")
        while True:
            after_seq = _print_events(client, path, after_seq) if job_id.startswith("ftjob") else after_seq
            _show(bar, task, job, _curve(client, path) if job_id.startswith("ftjob") else "")
            if job["status"] in TERMINAL:
                break
            time.sleep(poll_seconds)
            job = get(client, path)
    print_result(job)
    return job


def job_path(job_id: str) -> str:
    """Path of a fine-tuning job, an evaluation, a preflight or a comparison, by its id's prefix."""
    kinds = {"eval": "evaluations", "preflight": "fine_tuning/preflights", "ftcmp": "fine_tuning/comparisons"}
    return f"/{kinds.get(job_id.partition('-')[0], 'fine_tuning/jobs')}/{job_id}"


def fine_tuning_path(job_id: str) -> str:
    """The same of what only a fine-tuning has. Raises BadParameter for another kind's id."""
    path = job_path(job_id)
    if not path.startswith("/fine_tuning/jobs/"):
        raise typer.BadParameter(f"only a fine-tuning (ftjob-...) has this, not {job_id}")
    return path


def _print_events(client: openai.OpenAI, path: str, after_seq: int) -> int:
    while True:
        page = get(client, f"{path}/events", order="asc", after_seq=after_seq, limit=100)
        for event in page["data"]:
            after_seq = event["seq"]
            if event["type"] != "metrics":
                clock = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
                style = _LEVEL_STYLE.get(event["level"], "")
                out.print(f"{clock} {event['message']}", style=style, highlight=False, markup=False)
        if not page["has_more"]:
            return after_seq


def _curve(client: openai.OpenAI, path: str) -> str:
    """Raw NLL so far as a sparkline; empty before the first step."""
    records = get(client, f"{path}/metrics", keys="nll", resolution=_CURVE_WIDTH)["data"]
    line = sparkline([record["nll"] for record in records if record.get("nll") is not None], _CURVE_WIDTH)
    return f"  NLL {line}" if line else ""


def _show(bar: Progress, task: TaskID, job: dict[str, Any], curve: str) -> None:
    progress = job.get("progress") or {}
    queue = job.get("queue") or {}
    phase = job.get("phase") or job["status"]
    if queue.get("position"):
        reason = f", {queue['blocked_reason']}" if queue.get("blocked_reason") else ""
        counts = f"{queue['ahead']} ahead{reason}"
    elif queue.get("blocked_reason"):
        counts = queue["blocked_reason"]
    else:
        counts = _counts(progress) + curve
    done, total = progress.get("step"), progress.get("total_steps")
    if phase == "evaluating":
        done, total = progress.get("items_done"), progress.get("items_total")
    bar.update(task, phase=phase, counts=counts, completed=done or 0, total=total)


def _counts(progress: dict[str, Any]) -> str:
    parts = []
    if progress.get("total_steps"):
        parts.append(f"step {progress['step']}/{progress['total_steps']}")
    if progress.get("items_total"):
        benchmark = progress.get("benchmark") or ""
        parts.append(f"{benchmark} {progress.get('items_done') or 0}/{progress['items_total']}".strip())
    if progress.get("tokens_per_second"):
        parts.append(f"{progress['tokens_per_second']:,.0f} tokens/s")
    if progress.get("seconds_remaining") is not None:
        parts.append(f"{duration(progress['seconds_remaining'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_result(job: dict[str, Any]) -> None:
    """What a finished job left behind, or why it failed."""
    if job["status"] == "succeeded":
        out.print(f"[green]succeeded[/] {job.get('fine_tuned_model') or job['id']}", highlight=False)
    elif job["status"] == "failed":
        error = job.get("error") or {}
        print_error(f"{error.get('code')}: {error.get('message')}", word="failed")
        if error.get("hint"):
            err.print(error["hint"], highlight=False, markup=False)
        err.print(f"The trainer's log: vlm-dft logs {job['id']}", highlight=False)
    else:
        err.print("[yellow]cancelled[/]")
    print_scores(job)
    if report := job.get("report"):
        print_report(report)


def print_scores(job: dict[str, Any]) -> None:
    """The scores of a job, when it has any."""
    from vlm_dft.evaluation.report import by_role, score_table
    from vlm_dft.results import Score

    scores = [Score.model_validate(score) for score in job.get("scores") or ()]
    if scores:
        out.print(score_table(by_role(scores), categories=True), highlight=False, markup=False)
    if failure := job.get("evaluation_error"):
        print_error(f"{failure['code']}: {failure['message']}", word="evaluation failed")


def at_its_end(client: openai.OpenAI, job_id: str, poll_seconds: float, *, quiet: bool) -> dict[str, Any]:
    """The job's last state; told on the way there, unless quiet."""
    return (wait_quietly if quiet else follow)(client, job_id, poll_seconds)


def job_dict(job: FineTuningJob) -> dict[str, Any]:
    """A client object with our extra fields, as a plain dict."""
    return job.to_dict()
