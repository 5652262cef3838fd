"""Scores side by side as a Markdown table that reads well in a terminal, too. Torch-free.

One row per benchmark, one column per model. What makes numbers incomparable or partial stands below the table. Knows
nothing about where the scores come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vlm_dft.evaluation.comparison import comparable
from vlm_dft.results import Score

ABSENT = "-"
_HEADLINES = ("version: ", "loose", "S1", "S2", "S3")
"""Categories that get a row of their own where rows by category are wanted."""


def by_role(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Columns base and tuned of one run, in that order, absent roles left out."""
    columns: dict[str, list[Score]] = {"base": [], "tuned": []}
    for score in scores:
        columns[score.model_role].append(score)
    return {role: found for role, found in columns.items() if found}


def score_table(columns: Mapping[str, Sequence[Score]], *, categories: bool = False) -> str:
    """Markdown table; columns: label -> scores, in the order they are shown, the first being the reference.

    categories: rows for MathVerse's versions and We-Math's other metrics as well.
    """
    names = list(dict.fromkeys(score.benchmark for scores in columns.values() for score in scores))
    found = {label: {score.benchmark: score for score in scores} for label, scores in columns.items()}
    rows = [["benchmark", "metric", "n", *columns]]
    notes: list[str] = []
    for name in names:
        scores = {label: by_name[name] for label, by_name in found.items() if name in by_name}
        first = next(iter(scores.values()))
        size = f"{first.n} of {first.n_total}" if first.n != first.n_total else str(first.n)
        cells = [_cell(scores.get(label)) for label in columns]
        rows.append([name, first.metric, size, *cells])
        if categories:
            rows += _category_rows(scores, list(columns))
        notes += _notes(name, scores)
    notes += _ways(score for scores in columns.values() for score in scores)
    return "\n".join([*aligned(rows), "", *notes]) + "\n"


def difference(reference: Score, other: Score) -> tuple[float, float]:
    """other - reference in percentage points, and its standard error were the two independent: an upper bound.

    Both models answer the same items, so that the true error is smaller. Raises ValueError when not comparable.
    """
    if reason := comparable(reference, other):
        raise ValueError(f"scores of {reference.benchmark} must not be compared: {reason}")
    error = (reference.standard_error**2 + other.standard_error**2) ** 0.5
    return 100 * (other.value - reference.value), 100 * error


def overlap_notes(name: str, scores: Mapping[str, Score]) -> list[str]:
    """What the training data held of the items; the models of one table have been trained on the same."""
    first = max(scores.values(), key=lambda score: score.contaminated or 0)
    notes = []
    if first.contaminated:
        listed = _clean(scores, "clean_value")
        notes.append(
            f"{name}: {first.contaminated} of {first.n} items stand in the training data, question and picture in one "
            f"row; without them: {listed}."
        )
    if (first.contaminated_questions or 0) + (first.contaminated_pictures or 0) > (first.contaminated or 0):
        notes.append(
            f"{name}: the question of {first.contaminated_questions or 0} items and the picture of "
            f"{first.contaminated_pictures or 0} stand in the training data, together or alone; without all of these: "
            f"{_clean(scores, 'clean_value_strict')}."
        )
    return notes


def _cell(score: Score | None) -> str:
    return ABSENT if score is None else f"{100 * score.value:.1f} ± {100 * score.standard_error:.1f}"


def _category_rows(scores: Mapping[str, Score], labels: Sequence[str]) -> list[list[str]]:
    first = next(iter(scores.values()))
    rows = []
    for category, rates in first.by_category.items():
        if category.startswith(_HEADLINES) and ";" not in category:
            shown = [_rate(scores[label].by_category.get(category)) if label in scores else ABSENT for label in labels]
            rows.append([f"  {category.removeprefix('version: ')}", "", str(int(rates["n"])), *shown])
    return rows


def _rate(rates: Mapping[str, float] | None) -> str:
    return ABSENT if rates is None else f"{100 * rates.get('value', rates.get('score', float('nan'))):.1f}"


def _notes(name: str, scores: Mapping[str, Score]) -> list[str]:
    """What a reader of the row must know."""
    notes = []
    (first_label, first), *others = scores.items()
    if not first.whole:
        notes.append(f"{name}: a subset of the published benchmark, not comparable with published numbers.")
    for label, score in others:
        if reason := comparable(first, score):
            notes.append(f"{name}: {first_label} and {label} must not be compared: {reason}.")
    notes += overlap_notes(name, scores)
    for what, field in (("no usable answer", "failure_rate"), ("no answer that a rule could find", "extraction_rate")):
        rates = {label: getattr(score, field) for label, score in scores.items()}
        if field == "extraction_rate":
            rates = {label: 1 - rate for label, rate in rates.items()}
        if any(rates.values()):
            listed = ", ".join(f"{label} {100 * rate:.1f} %" for label, rate in rates.items())
            notes.append(f"{name}: {what}: {listed}.")
    return notes


def _clean(scores: Mapping[str, Score], field: str) -> str:
    values = {label: getattr(score, field) for label, score in scores.items()}
    return ", ".join(f"{label} {ABSENT if value is None else f'{100 * value:.1f}'}" for label, value in values.items())


def _ways(scores: Iterable[Score]) -> list[str]:
    """How the numbers were made, once for all rows that were made in the same way."""
    ways = dict.fromkeys(
        f"Scored by {s.scorer}, judge {s.judge}, prompt {s.prompt}; in percent ± one standard error." for s in scores
    )
    return list(ways)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown table lines of equal width; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
