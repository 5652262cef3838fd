"""`vlm-dft import-job`: a fine-tuning job of OpenAI's, as its API answers or takes it, submitted here as it is.

What decides the training is taken over: method, hyperparameters, seed, suffix, metadata. Names that mean something on
OpenAI's servers alone have to be given anew: the model and the files. A job of a method that is not here is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import EXIT_FAILED, AsJson, connect, messages, post, print_error, print_json, readable_errors
from cli.submit import upload
from cli.watch import at_its_end

_TAKEN = ("seed", "suffix", "metadata")
_NUMBERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
_POLL_SECONDS = 1.0


class JobFileError(ValueError):
    """The file holds no job that can be trained here; the message says why."""


def import_job(
    job_file: Annotated[Path, typer.Argument(help="JSON: what /v1/fine_tuning/jobs answered, or was sent.")],
    training_file: Annotated[str, typer.Option(help="OpenAI's JSONL as it is, or a file's id here.")],
    model: Annotated[str, typer.Option(help="Base model to train; `vlm-dft models` lists them.")],
    validation_file: Annotated[str | None, typer.Option(help="Held-out file or file id.")] = None,
    objective: Annotated[str, typer.Option(help="nll is what OpenAI trained; dft weighs each token.")] = "nll",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request and submit nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job to its end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train again here what was fine-tuned at OpenAI: same rows, same hyperparameters."""
    try:
        request = request_of(json.loads(job_file.read_text(encoding="utf-8")), objective)
    except (OSError, ValueError) as error:
        print_error(f"{job_file}: {error}")
        raise typer.Exit(EXIT_FAILED) from None
    if dry_run:
        shown = {"model": model, "training_file": training_file, "validation_file": validation_file, **request}
        print_json({key: value for key, value in shown.items() if value is not None})
        return
    with readable_errors():
        client = connect()
        body = {
            "model": model,
            "training_file": upload(client, training_file, {"model": model}, messages(as_json)),
            **request,
        }
        if validation_file is not None:
            body["validation_file"] = upload(client, validation_file, {"model": model}, messages(as_json))
        job = post(client, "/fine_tuning/jobs", body)
        messages(as_json).print(f"job {job['id']}", highlight=False)
        if watch:
            job = at_its_end(client, job["id"], _POLL_SECONDS, quiet=as_json)
    if as_json:
        print_json(job)
    if watch and job["status"] != "succeeded":
        raise typer.Exit(EXIT_FAILED)


def request_of(job: Any, objective: str) -> dict[str, Any]:
    """The request's body without model and files. Raises JobFileError."""
    if not isinstance(job, dict) or not job.keys() & {"model", "hyperparameters", "method", "training_file"}:
        raise JobFileError("this is no fine-tuning job: an object with model, training_file and method is expected")
    method = _object(job, "method")
    kind = method.get("type", "supervised")
    if kind != "supervised":
        raise JobFileError(f"method.type is {kind!r}: only supervised jobs can be trained here")
    given = {**_object(job, "hyperparameters"), **_object(_object(method, "supervised"), "hyperparameters")}
    if unknown := given.keys() - set(_NUMBERS):
        raise JobFileError(f"hyperparameters: {', '.join(sorted(unknown))} is not among {', '.join(_NUMBERS)}")
    if job.get("integrations"):
        raise JobFileError("integrations: there is none here; take them out of the file")
    numbers = {name: value for name, value in given.items() if value is not None}
    taken = {name: job[name] for name in _TAKEN if job.get(name) is not None}
    if "suffix" not in taken and (name := job.get("user_provided_suffix")):
        taken["suffix"] = name
    return {
        **taken,
        "method": {"type": "supervised", "supervised": {"objective": objective, "hyperparameters": numbers}},
    }


def _object(whole: dict[str, Any], name: str) -> dict[str, Any]:
    """A part that may be absent or null. Raises JobFileError when it is no object."""
    part = whole.get(name) or {}
    if not isinstance(part, dict):
        raise JobFileError(f"{name}: an object is expected, not {part!r}")
    return part
