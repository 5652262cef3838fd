"""Upload, check, submit: `vlm-dft submit`, through the openai client like any other user."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
from rich.console import Console

from cli.client import (
    EXIT_FAILED,
    AsJson,
    connect,
    err,
    get,
    messages,
    out,
    post,
    print_error,
    print_json,
    readable_errors,
)
from cli.requests import Hyperparameters, Lora, TrainingFile, evaluation_of, number_or_word, supervised_method
from cli.watch import at_its_end, job_dict
from vlm_dft.results import RowProblem

CHUNKED_ABOVE_BYTES = 256 * 2**20
PART_BYTES = 64 * 2**20
SHOWN_PROBLEMS = 10
_POLL_SECONDS = 1.0


def submit(
    training_file: TrainingFile,
    model: Annotated[str, typer.Option(help="Base model or ft:... model; `vlm-dft models` lists them.")],
    objective: Annotated[str, typer.Option(help="nll (SFT), dft, or another of the family.")] = "dft",
    validation_file: Annotated[str | None, typer.Option(help="Held-out file or file id.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Goes into the tuned model's name.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    lora: Lora = False,
    hyperparameter: Hyperparameters = None,
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated benchmarks to score afterwards.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each benchmark.")] = None,
    regression: Annotated[str | None, typer.Option(help="Those of them that ask for what the model knew.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="BENCHMARK.RULE=NUMBER, RULE min_value, min_gain or max_drop, 0 to 1; repeatable."),
    ] = None,
    dataset_format: Annotated[str | None, typer.Option(help="wethink, openai or sharegpt; found out if unset.")] = None,
    max_invalid_fraction: Annotated[float | None, typer.Option(help="Share of invalid rows to leave out.")] = None,
    priority: Annotated[str | None, typer.Option(help="low, normal, high or a number.")] = None,
    deadline_seconds: Annotated[float | None, typer.Option(help="Fail when not ended so long after queueing.")] = None,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Queue it, or leave that to `start`.")] = True,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job to its end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Upload data, wait for its validation, submit a fine-tuning job and follow it."""
    options = {"dataset_format": dataset_format, "max_invalid_fraction": max_invalid_fraction, "model": model}
    supervised = supervised_method(hyperparameter, lora=lora, objective=objective)
    extra: dict[str, Any] = {} if start else {"auto_start": False}
    if priority is not None:
        extra["priority"] = number_or_word(priority)
    if deadline_seconds is not None:
        extra["deadline_seconds"] = deadline_seconds
    extra |= evaluation_of(benchmarks, limit, regression=regression, gate=gate)
    with readable_errors():
        client = connect()
        training = upload(client, training_file, options, messages(as_json))
        validation = upload(client, validation_file, options, messages(as_json)) if validation_file else None
        job = client.fine_tuning.jobs.create(
            model=model,
            training_file=training,
            validation_file=validation,
            suffix=suffix,
            seed=seed,
            method={"type": "supervised", "supervised": supervised},  # pyright: ignore[reportArgumentType] - our keys
            extra_body=extra,
        )
        messages(as_json).print(f"job {job.id}", highlight=False)
        watch = watch and start
        ended = at_its_end(client, job.id, _POLL_SECONDS, quiet=as_json) if watch else None
    if as_json:
        print_json(ended or job_dict(job))
    elif ended is None:
        _print_position(job_dict(job))
    if ended is not None and ended["status"] != "succeeded":
        raise typer.Exit(EXIT_FAILED)


def upload(client: openai.OpenAI, name: str, options: dict[str, Any], told: Console) -> str:
    """File id of a validated file: an id is taken as it is, a directory is registered, a file uploaded.

    told: where what validation found is printed.
    """
    if name.startswith("file-"):
        return name
    path = Path(name)
    fields = {key: value for key, value in options.items() if value is not None}
    if path.is_dir():
        file_id = post(client, "/files/register", {"path": str(path.resolve()), **fields})["id"]
    elif not path.is_file():
        raise typer.BadParameter(f"{name} is neither a file, a directory nor a file id (file-...)")
    elif path.stat().st_size > CHUNKED_ABOVE_BYTES:
        file_id = _upload_in_parts(client, path, fields)
    else:
        with path.open("rb") as file:
            file_id = client.files.create(file=(path.name, file), purpose="fine-tune", extra_body=fields).id
    with told.status(f"validating {path.name}"):
        client.files.wait_for_processing(file_id, poll_interval=_POLL_SECONDS, max_wait_seconds=24 * 3600)
    _report(get(client, f"/files/{file_id}"), told)
    return file_id


def _upload_in_parts(client: openai.OpenAI, path: Path, fields: dict[str, Any]) -> str:
    """As client.uploads.upload_file_chunked does, which takes no fields of ours."""
    begun = client.uploads.create(
        bytes=path.stat().st_size,
        filename=path.name,
        mime_type="application/octet-stream",
        purpose="fine-tune",
        extra_body=fields,
    )
    part_ids = []
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            part_ids.append(client.uploads.parts.create(begun.id, data=part).id)
    done = client.uploads.complete(begun.id, part_ids=part_ids)
    assert done.file is not None, "a completed upload has its file"
    return done.file.id


def _report(file: dict[str, Any], told: Console) -> None:
    report = file.get("validation_report") or {}
    counts = f"{report.get('valid', 0)} valid of {report.get('rows', 0)} rows, {report.get('images', 0)} images"
    if file["status"] == "processed":
        told.print(f"{file['filename']}: {counts} ({file['id']})", highlight=False, markup=False)
        return
    print_error(str(file.get("status_details")), word="refused")
    print_problems(RowProblem.model_validate(problem) for problem in report.get("problems", ())[:SHOWN_PROBLEMS])
    raise typer.Exit(EXIT_FAILED)


def print_problems(problems: Iterable[RowProblem]) -> None:
    """One line per invalid row: where, which field, why."""
    for problem in problems:
        place = ":".join(str(part) for part in (problem.file, problem.line, problem.field) if part)
        err.print(f"  {place}: {problem.reason}", highlight=False, markup=False)


def _print_position(job: dict[str, Any]) -> None:
    queue = job.get("queue") or {}
    place = f"position {queue['position']}" if queue.get("position") else queue.get("blocked_reason") or job["phase"]
    verb = "start" if job["phase"] == "created" else "watch"
    out.print(f"status {job['status']}, {place}: vlm-dft {verb} {job['id']}", highlight=False)
