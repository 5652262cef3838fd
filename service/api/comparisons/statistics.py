"""Arms against their reference, item by item, from the predictions on disk; and means over seeds. Reads files only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from service.api.comparisons.requests import BASE
from service.api.comparisons.responses import BenchmarkResult, Cell, Pair
from service.api.evaluations.items import find_run, items_of, open_predictions
from service.errors import DamagedFileError
from service.jobs.comparisons import Arm
from vlm_dft.evaluation.comparison import comparable
from vlm_dft.evaluation.paired import Paired, compare
from vlm_dft.results import Score
from vlm_dft.run_dir import RunDir


@dataclass(frozen=True)
class Scored:
    """One arm's score on one benchmark, and the run that holds its predictions; None: they are gone."""

    score: Score
    run: RunDir | None


Scoreboard = dict[str, dict[str, Scored]]
"""Benchmark -> arm -> score; base first."""


def scoreboard(arms: Sequence[Arm]) -> Scoreboard:
    """Every score there is. The model before is scored by every arm, alike: one that still has its answers is taken."""
    board: Scoreboard = {}
    for arm in arms:
        paths = [Path(attempt.run_path) for attempt in arm.attempts]
        for document in (arm.job.result or {}).get("scores") or []:
            score = Score.model_validate(document)
            found = Scored(score, find_run(paths, score.model_role, score.benchmark))
            label = BASE if score.model_role == "base" else arm.name
            scores = board.setdefault(score.benchmark, {})
            if label not in scores or scores[label].run is None:
                scores[label] = found
    return {name: dict(sorted(scores.items(), key=lambda one: one[0] != BASE)) for name, scores in board.items()}


def results(board: Scoreboard, reference: str) -> list[BenchmarkResult]:
    """Each benchmark's scores, and every other arm against the reference, where that has a score."""
    return [
        BenchmarkResult(
            benchmark=name,
            scores={label: scored.score for label, scored in scores.items()},
            pairs=[
                _pair(reference, scores[reference], label, scored)
                for label, scored in scores.items()
                if reference in scores and label != reference
            ],
        )
        for name, scores in board.items()
    ]


def _pair(reference: str, first: Scored, arm: str, other: Scored) -> Pair:
    refused = comparable(first.score, other.score)
    if refused is not None:
        return Pair(arm=arm, reference=reference, refused=refused)
    if first.run is None or other.run is None:
        gone = reference if first.run is None else arm
        refused = f"the answers of {gone} are not kept any more, only their score is"
        return Pair(arm=arm, reference=reference, refused=refused)
    one, two = (
        run.evaluation_path(score.model_role, score.benchmark)
        for run, score in ((first.run, first.score), (other.run, other.score))
    )
    try:
        found = _paired(one, two, other.run.items_path(other.score.benchmark))
    except (ValueError, DamagedFileError) as error:  # the other pairs are as good as they were
        return Pair(arm=arm, reference=reference, refused=str(error))
    numbers = {name: getattr(found, name) for name in Pair.model_fields if hasattr(found, name)}
    return Pair(arm=arm, reference=reference, refused=None, **numbers)


@lru_cache(maxsize=1024)
def _paired(first: Path, other: Path, items: Path) -> Paired:
    """Of two scored sets of predictions, which nobody writes any more."""
    groups = {item.id: item.group for item in items_of(items).values()}
    if not groups:
        raise ValueError("the items are not kept any more, and so which of them belong together")
    return compare(_verdicts(first), _verdicts(other), groups)


def _verdicts(directory: Path) -> dict[tuple[str, int], bool]:
    with open_predictions(directory) as predictions:
        return {line.key: line.correct for line in predictions.lines}


def sweep(arms: Sequence[Arm], board: Scoreboard) -> list[Cell]:
    """Held-out NLL and each benchmark, by objective, learning rate and batch size, over seeds."""
    cells: dict[str, list[Arm]] = {}
    for arm in arms:
        train = arm.job.config["train"]
        key = [train["objective"], train["learning_rate"], train["batch_size"]]
        cells.setdefault(json.dumps(key, sort_keys=True), []).append(arm)
    found = []
    for key, members in cells.items():
        options, learning_rate, batch_size = json.loads(key)
        objective = options.pop("name")
        for value, by_arm in _values(members, board).items():
            numbers = [number for number in by_arm.values() if number is not None]
            found.append(
                Cell(
                    objective=objective,
                    options=options,
                    learning_rate=learning_rate,
                    batch_size=batch_size,
                    arms=list(by_arm),
                    value=value,
                    n=len(numbers),
                    mean=statistics.fmean(numbers) if numbers else None,
                    standard_deviation=statistics.stdev(numbers) if len(numbers) > 1 else None,
                )
            )
    return found


def _values(members: Sequence[Arm], board: Scoreboard) -> dict[str, dict[str, float | None]]:
    trained: dict[str, dict[str, Any]] = {arm.name: (arm.job.result or {}).get("train") or {} for arm in members}
    values: dict[str, dict[str, float | None]] = {
        "valid_nll_after": {name: train.get("valid_nll_after") for name, train in trained.items()}
    }
    for name, scores in board.items():
        metric = next(iter(scores.values())).score.metric
        values[f"{name}.{metric}"] = {
            arm.name: scores[arm.name].score.value if arm.name in scores else None for arm in members
        }
    return values
