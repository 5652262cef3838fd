"""`vlm-dft estimate`: what a job would take, before it is submitted."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from cli.client import AsJson, connect, messages, out, post, print_json, readable_errors
from cli.requests import Hyperparameters, Lora, TrainingFile, supervised_method
from cli.submit import upload
from cli.watch import duration

_NAMED_ROWS: Final = 3


def estimate(
    training_file: TrainingFile,
    model: Annotated[str, typer.Option(help="Base model or ft:... model; `vlm-dft models` lists them.")],
    lora: Lora = False,
    hyperparameter: Hyperparameters = None,
    as_json: AsJson = False,
) -> None:
    """Print tokens, steps, memory, time and waiting of a fine-tuning job that is not submitted."""
    supervised = supervised_method(hyperparameter, lora=lora)
    with readable_errors():
        client = connect()
        file_id = upload(client, training_file, {"model": model}, messages(as_json))
        method = {"type": "supervised", "supervised": supervised}
        found = post(client, "/fine_tuning/estimates", {"model": model, "training_file": file_id, "method": method})
    if as_json:
        print_json(found)
        return
    print_estimate(found)


def print_estimate(found: dict[str, Any]) -> None:
    """A line per question, and the table of pixel limits."""
    for name, value in lines(found):
        out.print(f"[bold]{name:<8}[/] {value}", highlight=False)
    if found["pixels"]:
        counts = ("visual tokens", "per picture", "longest row", "too long")
        table = Table("min pixels", "max pixels", *counts, "", box=None)
        for choice in found["pixels"]:
            cells = [choice["visual_tokens"], choice["mean_tokens_per_image"], choice["longest_row_tokens"]]
            shown = [choice["min_pixels"], choice["max_pixels"], *cells, choice["too_long"]]
            style = "bold green" if choice["is_asked"] else None
            asked = "asked for" if choice["is_asked"] else ""
            table.add_row(*("-" if cell is None else f"{cell:,.0f}" for cell in shown), asked, style=style)
        out.print(table)


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each part."""
    rows, tokens, steps, time, queue = (found[name] for name in ("rows", "tokens", "steps", "time", "queue"))
    shown = [("rows", f"{rows['fit']} of {rows['total']} fit into {rows['limit_tokens']} tokens")]
    if rows["too_long"]:
        first = [escape(f"{row['file']}:{row['line']}") for row in rows["too_long_rows"][:_NAMED_ROWS]]
        more = ["..."] if rows["too_long"] > len(first) else []
        what = "left out" if rows["on_overlong"] == "drop" and rows["fit"] else "the job would be refused"
        shown.append(("too long", f"{rows['too_long']} ({', '.join(first + more)}): {what}"))
    if rows["refused"]:
        refused = "; ".join(map(escape, rows["refused_rows"][:_NAMED_ROWS]))
        shown.append(("refused", f"{rows['refused']} that the model's chat template cannot take: {refused}"))
    if tokens:
        counts = f"{tokens['text']:,} text + {tokens['visual']:,} visual in {tokens['images']:,} pictures an epoch"
        shown.append(("tokens", f"{counts}; {tokens['basis']}"))
    shown.append(("steps", f"{steps['total']:,} ({steps['per_epoch']:,} an epoch), {steps['input_tokens']:,} tokens"))
    shown.append(("memory", _memory(found["memory"]) if rows["fit"] else "none: no row fits"))
    for device in found["devices"]:
        fits = {True: "fits", False: "[red]does not fit[/]", None: "its memory is not known"}[device["fits"]]
        size = f", {device['memory_total_gib']:g} GiB" if device["memory_total_gib"] else ""
        shown.append(("device", f"{device['count']} x {device['name']}{size}: {fits}"))
    shown.append(("time", _seconds(time["seconds"], time["basis"])))
    shown.append(("waiting", _seconds(queue["seconds"], queue["basis"])))
    shown += [("note", escape(note)) for note in found["notes"]]
    return shown


def _memory(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return "unknown"
    small = memory["total_gib"] < 1
    scale, unit, digits = (1024, "MiB", 1) if small else (1, "GiB", 2)
    parts = ("weights", "gradients", "optimizer", "activations", "vision", "head", "fixed")
    listed = ", ".join(f"{name} {memory[f'{name}_gib'] * scale:.{digits}f}" for name in parts if memory[f"{name}_gib"])
    total = f"{memory['total_gib'] * scale:.{digits}f} {unit}"
    return f"{total}: {listed}; {memory['precision']}, {memory['largest_micro_batch_tokens']} tokens at once"


def _seconds(seconds: float | None, basis: str) -> str:
    return basis if seconds is None else f"{duration(seconds)} ({basis})"
