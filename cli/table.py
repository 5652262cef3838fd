"""`vlm-dft table`: finished evaluations side by side, in the layout of the DFT paper's tables."""

from __future__ import annotations

from typing import Annotated, Any

import openai
import typer

from cli.client import EXIT_FAILED, AsJson, connect, get, out, print_error, print_json, readable_errors
from cli.watch import job_path
from vlm_dft.evaluation.paper_table import paper_table, paper_values
from vlm_dft.results import Score

_ARMS = {None: "base", "nll": "SFT", "dft": "DFT"}


def table(
    ids: Annotated[list[str], typer.Argument(help="eval-... or ftjob-..., in the order of the rows.")],
    labels: Annotated[str | None, typer.Option(help="Comma-separated, one per row, in the place of ours.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print evaluations of a base model and its SFT and DFT arms as the DFT paper's Table 4 or Table 1."""
    rows: dict[str, list[Score]] = {}
    with readable_errors():
        client = connect()
        for id in ids:
            for label, scores in _rows(client, get(client, job_path(id))).items():
                _add(rows, label, scores)
    if not rows:
        print_error("None of them has a score yet.")
        raise typer.Exit(EXIT_FAILED)
    if labels is not None:
        given = [label.strip() for label in labels.split(",")]
        if len(set(given)) != len(rows):
            raise typer.BadParameter(f"--labels takes {len(rows)} different names here ({', '.join(rows)})")
        rows = dict(zip(given, rows.values(), strict=True))
    try:
        printed = paper_table(rows)
    except ValueError as error:
        print_error(str(error))
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        print_json({"tables": paper_values(rows), "scores": _documents(rows)})
    else:
        out.print(printed, highlight=False, markup=False)


def _documents(rows: dict[str, list[Score]]) -> dict[str, Any]:
    """Where the values come from, and all that a reader must know of them."""
    return {label: [score.model_dump(mode="json") for score in scores] for label, scores in rows.items()}


def _rows(client: openai.OpenAI, job: dict[str, Any]) -> dict[str, list[Score]]:
    """Label -> scores of each model that the job has scored; the base comes first."""
    scores = [Score.model_validate(score) for score in job.get("scores") or ()]
    by_role = {role: [score for score in scores if score.model_role == role] for role in ("base", "tuned")}
    labels: dict[str, str]
    if "fine_tuned_model" in job:
        labels = {"base": "base", "tuned": _label(job.get("objective"))}
    else:
        known = {model["id"]: model for model in get(client, "/models")["data"]}
        labels = dict.fromkeys(("base", "tuned"), _label(known.get(job["model"], {}).get("objective")))
    return {labels[role]: found for role, found in by_role.items() if found}


def _label(objective: str | None) -> str:
    return _ARMS.get(objective, objective or "")


def _add(rows: dict[str, list[Score]], label: str, scores: list[Score]) -> None:
    """Two jobs that share their base give one row for it; another model under the same label gets a number."""
    models = {score.model_sha256 for score in scores}
    number, name = 1, label
    while name in rows and models != {score.model_sha256 for score in rows[name]}:
        number += 1
        name = f"{label} {number}"
    known = {score.benchmark for score in rows.get(name, ())}
    rows.setdefault(name, []).extend(score for score in scores if score.benchmark not in known)
