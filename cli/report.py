"""`vlm-dft report` and `bundle`: a job's report card, as a page too, its gate as an exit code; what reruns it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import typer
from rich.text import Text

from cli.client import EXIT_FAILED, AsJson, connect, err, get, out, print_error, print_json, readable_errors
from cli.comparison_table import pair_line

_STREAMED = {"X-Stainless-Raw-Response": "stream"}
"""How the client is asked for an answer that may not fit into memory."""


def report(
    job_id: Annotated[str, typer.Argument(help="ftjob-...")],
    html: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a fine-tuned model is worth; exit code 1 if the job has a gate and the model does not pass it."""
    with readable_errors():
        client = connect()
        card = get(client, f"/fine_tuning/jobs/{job_id}/report")
        if html is not None:
            _write_page(client, job_id, html)
    if as_json:
        print_json(card)
    else:
        _print(card)
    if card["gate"] and not card["gate"]["passed"]:
        raise typer.Exit(EXIT_FAILED)


def bundle(
    job_id: Annotated[str, typer.Argument(help="ftjob-..., one that has succeeded.")],
    to: Annotated[Path | None, typer.Option(help="File to write.  [default: JOB.tar.gz]")] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="With the pictures that were trained on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Save what it takes to train a job again, number by number: python -m vlm_dft.rerun FILE."""
    path = to or Path(f"{job_id}.tar.gz")
    options: Any = {"params": {"images": str(pictures).lower()}, "headers": _STREAMED}
    with readable_errors():
        url = f"/fine_tuning/jobs/{job_id}/bundle"
        answer = connect().get(url, cast_to=httpx.Response, options=options)
        half = path.with_name(f"{path.name}.part")
        with closing(answer), _written(path), half.open("wb") as file:
            for part in answer.iter_bytes():
                file.write(part)
            half.replace(path)
    if as_json:
        print_json({"path": str(path), "bytes": path.stat().st_size})
    else:
        out.print(f"written: {path}; again with: python -m vlm_dft.rerun {path}", highlight=False, markup=False)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, httpx.HTTPError) as error:
        print_error(f"{path} cannot be written: {error}")
        raise typer.Exit(EXIT_FAILED) from None


def _write_page(client: openai.OpenAI, job_id: str, path: Path) -> None:
    page = client.get(f"/fine_tuning/jobs/{job_id}/report.html", cast_to=str)
    with _written(path):
        path.write_text(page, encoding="utf-8")
    err.print(f"written: {path}", highlight=False, markup=False)


def _print(card: dict[str, Any]) -> None:
    out.print(
        f"{card['fine_tuned_model'] or card['job_id']}: {card['objective']} from {card['model']}",
        highlight=False,
        markup=False,
    )
    for each in card["benchmarks"]:
        sides = ", ".join(
            f"{label} {100 * each[label]['value']:.1f} ± {100 * each[label]['standard_error']:.1f}"
            for label in ("base", "tuned")
            if each[label]
        )
        name = f"{each['benchmark']}{' (regression set)' if each['is_regression'] else ''}"
        out.print(f"{name}: {sides}", highlight=False, markup=False)
        if each["pair"]:
            out.print(f"  {pair_line(each['pair'])}", highlight=False, markup=False)
        for line in _overlap(each["benchmark"], {label: each[label] for label in ("base", "tuned") if each[label]}):
            out.print(f"  {line}", highlight=False, markup=False)
    if failure := card["evaluation_error"]:
        print_error(f"{failure['code']}: {failure['message']}", word="the evaluation failed")
    if training := card["training"]:
        known = {name: value for name, value in training.items() if value is not None}
        numbers = ", ".join(f"{name} {f'{n:g}' if isinstance(n, float) else n}" for name, n in known.items())
        out.print(f"training: {numbers}", highlight=False)
    if gate := card["gate"]:
        for check in gate["checks"]:
            word = Text("kept") if check["passed"] else Text("broken", "red")
            out.print(word + Text(f": {check['reason']}"))
        out.print("[green]the gate is passed[/]" if gate["passed"] else "[red]the gate is not passed[/]")


def _overlap(name: str, sides: dict[str, dict[str, Any]]) -> list[str]:
    """What the training data held of the benchmark."""
    from vlm_dft.evaluation.report import overlap_notes
    from vlm_dft.results import Score

    scores = {label: Score.model_validate(side) for label, side in sides.items()}
    if all(score.contaminated is None for score in scores.values()):
        return [f"{name}: whether its items stand in the training data was not checked"]
    return overlap_notes(name, scores) or [f"{name}: none of its items stands in the training data"]
