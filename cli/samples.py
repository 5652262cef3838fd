"""`vlm-dft samples`: what a job's model answers to a few rows of its own data, before the training and at a step."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from cli.client import AsJson, connect, get, out, print_json, readable_errors
from cli.watch import job_path


def samples(
    job_id: Annotated[str, typer.Argument(help="ftjob-...")],
    step: Annotated[int | None, typer.Option(min=0, help="Not given: the newest one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print rows of the job's data with the model's answers, always the likeliest token: before, and at a step."""
    with readable_errors():
        client, path = connect(), f"{job_path(job_id)}/samples"
        found = get(client, path, **({} if step is None else {"step": step}))
        if as_json:
            print_json(found)
            return
        first = get(client, path, step=found["steps"][0])["data"] if found["data"] else []
    before = {sample["row_id"]: sample for sample in first}
    for sample in found["data"]:
        _print(sample, before.get(sample["row_id"], sample))
    steps = ", ".join(map(str, found["steps"])) or "none yet, or the job's sample_rows is 0"
    out.print(f"rows were answered at the steps: {steps}", highlight=False)


def _print(sample: dict[str, Any], before: dict[str, Any]) -> None:
    out.print(Text(f"{sample['split'].replace('_', '-')} row {sample['row_id']}", "bold"))
    for turn in sample["prompt"]:
        _say(turn["role"], "".join(map(_shown, turn["content"])), "dim")
    _say("reference", sample["reference"], "green")
    for each in (sample,) if before["step"] == sample["step"] else (before, sample):
        cut = ", cut there" if each["finish_reason"] == "length" else ""
        _say(f"step {each['step']} ({each['num_tokens']} tokens{cut})", each["error"] or each["answer"], "")
    out.print()


def _say(name: str, text: str, style: str) -> None:
    """Lines of text below each other; what a terminal would obey is shown as an escape."""
    plain = "".join(one if one.isprintable() else "\n    " if one == "\n" else repr(one)[1:-1] for one in text)
    out.print(Text(f"  {name}: {plain}", style))


def _shown(part: dict[str, Any]) -> str:
    return part["text"] if part["type"] == "text" else f"[{part['name']}, {part['width']} x {part['height']}] "
