"""`vlm-dft compare`: fine-tunings on equal terms, submitted by one request, and their results. Through the client."""

from __future__ import annotations

import time
from typing import Annotated, Any

import openai
import typer
from rich.progress import BarColumn, Progress, TextColumn

from cli.client import EXIT_FAILED, AsJson, connect, get, messages, out, post, print_json, readable_errors
from cli.comparison_table import print_comparison
from cli.requests import Hyperparameters, Lora, evaluation_of, parse_pairs, supervised_method
from cli.submit import upload
from cli.watch import TERMINAL

PATH = "/fine_tuning/comparisons"
_POLL_SECONDS = 1.0


_SHOWING = frozenset({"training_file", "reference", "watch", "as_json"})
"""Options that mean something where a comparison is only shown."""
_OF_AN_ARM = ("learning_rate", "batch_size", "seed")


def compare(
    context: typer.Context,
    training_file: Annotated[str, typer.Argument(help="A file, a file's id, or a comparison (ftcmp-...) to show.")],
    model: Annotated[str | None, typer.Option(help="Base model or ft:... model.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="NAME=OBJECTIVE[,KEY=VALUE...]: floor=dft,weight_floor=0.1,learning_rate=1e-4; repeatable."),
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(help="Comma-separated, an arm for each.  [default: nll,dft, unless --arm is given]")
    ] = None,
    learning_rates: Annotated[str | None, typer.Option(help="Comma-separated; an arm for each.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Comma-separated; an arm for each.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated; an arm for each.")] = None,
    validation_file: Annotated[str | None, typer.Option(help="Held-out file or file id.")] = None,
    hyperparameter: Hyperparameters = None,
    lora: Lora = False,
    suffix: Annotated[str | None, typer.Option(help="Goes into the tuned models' names.")] = None,
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated benchmarks to score afterwards.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each benchmark.")] = None,
    reference: Annotated[str | None, typer.Option(help="Compare with this arm, or base; else with the first.")] = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the arms to their end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train arms on the same data, in the same order, for as long, and compare them; or show such a comparison."""
    if training_file.startswith("ftcmp-"):
        _refuse_settings(context)
        arms: dict[str, Any] = {}
    else:
        if model is None:
            raise typer.BadParameter("--model is needed to train")
        axes = (objectives, learning_rates, batch_sizes, seeds)
        grid = _grid(*axes) if any(axes) or not arm else None
        arms = {"arms": [_arm(text) for text in arm or []], **({"grid": grid} if grid else {})}
    job: dict[str, Any] = {"model": model, **evaluation_of(benchmarks, limit)}
    job["method"] = {"type": "supervised", "supervised": supervised_method(hyperparameter, lora=lora)}
    if suffix is not None:
        job["suffix"] = suffix
    with readable_errors():
        client = connect()
        comparison_id = training_file
        if arms:
            job["training_file"] = upload(client, training_file, {"model": model}, messages(as_json))
            if validation_file is not None:
                job["validation_file"] = upload(client, validation_file, {"model": model}, messages(as_json))
            comparison_id = post(client, PATH, {"job": job, **arms})["id"]
            messages(as_json).print(f"comparison {comparison_id}", highlight=False)
        chosen = {"reference": reference} if reference else {}  # from the first look on: a wrong name is told at once
        shown = get(client, f"{PATH}/{comparison_id}", **chosen)
        if watch and shown["status"] not in TERMINAL:
            shown = _follow(client, comparison_id, chosen, quiet=as_json)
        if as_json:
            print_json(shown)
        else:
            print_comparison(shown, get(client, f"{PATH}/{comparison_id}/curves", keys="nll")["data"])
    if shown["status"] in ("failed", "cancelled"):
        raise typer.Exit(EXIT_FAILED)


def _refuse_settings(context: typer.Context) -> None:
    """Raises BadParameter for options that a comparison which was made before can have no use for."""
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in _SHOWING and str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            raise typer.BadParameter(f"{parameter.opts[0]} makes a new comparison; ftcmp-... shows one as it is")


def _arm(text: str) -> dict[str, Any]:
    """NAME=OBJECTIVE,KEY=VALUE,... as the API takes an arm. Raises BadParameter."""
    first, *rest = text.split(",")
    name, _, objective = first.partition("=")
    given = parse_pairs(rest, option="--arm")
    arm = {"name": name, **({"objective": objective} if objective else {})}
    arm |= {key: given.pop(key) for key in _OF_AN_ARM if key in given}
    return arm | ({"options": given} if given else {})


def _grid(
    objectives: str | None, learning_rates: str | None, batch_sizes: str | None, seeds: str | None
) -> dict[str, Any]:
    """Axes as the API takes them. Raises BadParameter for what is no number."""
    grid: dict[str, Any] = {"objective": [name.strip() for name in (objectives or "nll,dft").split(",")]}
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


def _follow(client: openai.OpenAI, comparison_id: str, chosen: dict[str, str], *, quiet: bool) -> dict[str, Any]:
    """A bar for each arm until all have ended; answers the comparison as it then is."""
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
                return shown
            time.sleep(_POLL_SECONDS)
