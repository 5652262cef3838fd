"""`vlm-dft compare`: fine-tunings on equal terms, submitted by one request, and their results. Through the client."""

from __future__ import annotations

import time
from typing import Annotated, Any

import openai
import typer
from rich.progress import BarColumn, Progress, TextColumn

from cli.client import EXIT_FAILED, AsJson, connect, get, messages, out, post, print_json, readable_errors
from cli.comparison_table import print_comparison
from cli.submit import benchmark_list, parse_pairs, upload
from cli.watch import TERMINAL

PATH = "/fine_tuning/comparisons"
_POLL_SECONDS = 1.0


def compare(
    training_file: Annotated[str, typer.Argument(help="A file, a file's id, or a comparison (ftcmp-...) to show.")],
    model: Annotated[str | None, typer.Option(help="Base model or ft:... model.")] = None,
    objectives: Annotated[str, typer.Option(help="Comma-separated; the first is the reference.")] = "nll,dft",
    learning_rates: Annotated[str | None, typer.Option(help="Comma-separated; an arm for each.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Comma-separated; an arm for each.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated; an arm for each.")] = None,
    validation_file: Annotated[str | None, typer.Option(help="Held-out file or file id.")] = None,
    hyperparameter: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of every arm's hyperparameters; repeatable.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters, rank 8, alpha 16.")] = False,
    suffix: Annotated[str | None, typer.Option(help="Goes into the tuned models' names.")] = None,
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated benchmarks to score afterwards.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each benchmark.")] = None,
    reference: Annotated[str | None, typer.Option(help="The arm, or base, to compare with.")] = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the arms to their end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train arms on the same data, in the same order, for as long, and compare them; or show such a comparison."""
    with readable_errors():
        client = connect()
        comparison_id = training_file
        if not training_file.startswith("ftcmp-"):
            if model is None:
                raise typer.BadParameter("--model is needed to train")
            job: dict[str, Any] = {
                "model": model,
                "training_file": upload(client, training_file, {"model": model}, messages(as_json)),
                "method": _method(parse_pairs(hyperparameter or []), lora=lora),
            }
            if validation_file is not None:
                job["validation_file"] = upload(client, validation_file, {"model": model}, messages(as_json))
            if suffix is not None:
                job["suffix"] = suffix
            if benchmarks is not None:
                job["evaluation"] = {"benchmarks": benchmark_list(benchmarks, limit), "include_base": True}
            body = {"job": job, "grid": _grid(objectives, learning_rates, batch_sizes, seeds)}
            comparison_id = post(client, PATH, body)["id"]
            messages(as_json).print(f"comparison {comparison_id}", highlight=False)
        chosen = {"reference": reference} if reference else {}  # from the first look on: a wrong name is told at once
        if watch:
            _follow(client, comparison_id, chosen, quiet=as_json)
        shown = get(client, f"{PATH}/{comparison_id}", **chosen)
        if as_json:
            print_json(shown)
        else:
            print_comparison(shown, get(client, f"{PATH}/{comparison_id}/curves", keys="nll")["data"])
    if shown["status"] in ("failed", "cancelled"):
        raise typer.Exit(EXIT_FAILED)


def _method(hyperparameters: dict[str, Any], *, lora: bool) -> dict[str, Any]:
    supervised: dict[str, Any] = {"hyperparameters": hyperparameters}
    if lora:
        supervised["adapter"] = {"type": "lora"}
    return {"type": "supervised", "supervised": supervised}


def _grid(objectives: str, learning_rates: str | None, batch_sizes: str | None, seeds: str | None) -> dict[str, Any]:
    """Axes as the API takes them. Raises BadParameter for what is no number."""
    grid: dict[str, Any] = {"objective": [name.strip() for name in objectives.split(",")]}
    for name, text, kind in (
        ("learning_rate", learning_rates, float),
        ("batch_size", batch_sizes, int),
        ("seed", seeds, int),
    ):
        if text is not None:
            try:
                grid[name] = [kind(part) for part in text.split(",")]
            except ValueError:
                raise typer.BadParameter(f"--{name.replace('_', '-')}s takes numbers, not {text!r}") from None
    return grid


def _follow(client: openai.OpenAI, comparison_id: str, chosen: dict[str, str], *, quiet: bool) -> None:
    """A bar for each arm until all have ended."""
    columns = (TextColumn("{task.description:<20}"), TextColumn("{task.fields[phase]:<14}"), BarColumn())
    with Progress(*columns, console=out, disable=quiet) as bars:
        tasks: dict[str, Any] = {}
        while True:
            shown = get(client, f"{PATH}/{comparison_id}", **chosen)
            for arm in shown["arms"]:
                if arm["name"] not in tasks:
                    tasks[arm["name"]] = bars.add_task(arm["name"], total=None, phase=arm["phase"])
                progress = arm["progress"] or {}
                done, total = progress.get("step") or 0, progress.get("total_steps")
                bars.update(tasks[arm["name"]], phase=arm["phase"], completed=done, total=total)
            if shown["status"] in TERMINAL:
                return
            time.sleep(_POLL_SECONDS)
