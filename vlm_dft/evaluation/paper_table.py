"""Scores in the layout of the DFT paper's tables: one row per model, one column per number. Torch-free.

Table 4 for MathVerse, MathVision and We-Math; Table 1 for text mathematics; both where both were scored. Rows that must
not be compared are refused, not printed side by side. Knows nothing about where scores come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlm_dft.evaluation.comparison import comparable
from vlm_dft.evaluation.report import ABSENT, aligned
from vlm_dft.results import Score

VERSIONS = ("Vision Only", "Vision Intensive", "Vision Dominant")
Column = Callable[[Sequence[Score]], float | None]


def paper_table(rows: Mapping[str, Sequence[Score]]) -> str:
    """Markdown; rows: label -> scores of one model. Raises ValueError naming the benchmark and what differs."""
    notes = _checked(rows)
    parts = [_markdown(table) for table in paper_values(rows)]
    if any(score.kind == "custom" for scores in rows.values() for score in scores):
        notes.append("Custom benchmarks have no place in the paper's tables.")
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def paper_values(rows: Mapping[str, Sequence[Score]]) -> list[dict[str, dict[str, float | None]]]:
    """The tables that paper_table prints: label -> column -> value from 0 to 1, None where there is none."""
    kinds = {score.kind for scores in rows.values() for score in scores}
    tables = []
    if kinds & {"mathverse", "mathvision", "wemath"}:
        tables.append(_table_4())
    if "text_math" in kinds:
        tables.append(_table_1(rows))
    return [
        {label: {name: column(scores) for name, column in columns.items()} for label, scores in rows.items()}
        for columns in tables
    ]


def _table_4() -> dict[str, Column]:
    columns: dict[str, Column] = {version: _version(version) for version in VERSIONS}
    columns["MathVerse Overall"] = _value("mathverse", "mean_over_versions")
    columns |= {"MathVision": _value("mathvision"), "WeMath": _value("wemath")}
    return columns


def _table_1(rows: Mapping[str, Sequence[Score]]) -> dict[str, Column]:
    names = dict.fromkeys(s.benchmark for scores in rows.values() for s in scores if s.kind == "text_math")
    columns: dict[str, Column] = {name: _named(name) for name in names}
    if len(names) > 1:

        def mean(scores: Sequence[Score]) -> float | None:
            found = [value for column in names if (value := _named(column)(scores)) is not None]
            return sum(found) / len(found) if len(found) == len(names) else None

        columns["Avg."] = mean
    return columns


def _version(version: str) -> Column:
    def value(scores: Sequence[Score]) -> float | None:
        found = [s.by_category.get(f"version: {version}") for s in scores if s.kind == "mathverse"]
        return next((rates["value"] for rates in found if rates), None)

    return value


def _value(kind: str, metric: str | None = None) -> Column:
    """Of the score with most items, where a run has the benchmark in several cuts."""

    def value(scores: Sequence[Score]) -> float | None:
        found = [s for s in scores if s.kind == kind and (metric is None or s.metric.startswith(metric))]
        return max(found, key=lambda score: score.n).value if found else None

    return value


def _named(name: str) -> Column:
    return lambda scores: next((score.value for score in scores if score.benchmark == name), None)


def _markdown(table: Mapping[str, Mapping[str, float | None]]) -> str:
    lines = [["", *next(iter(table.values()))]]
    for label, values in table.items():
        lines.append([label, *(ABSENT if value is None else f"{100 * value:.2f}" for value in values.values())])
    return "\n".join(aligned(lines))


def _checked(rows: Mapping[str, Sequence[Score]]) -> list[str]:
    """What a reader must know of each benchmark. Raises ValueError where two rows must not stand side by side."""
    notes: dict[str, None] = {}
    first: dict[str, tuple[str, Score]] = {}
    for label, scores in rows.items():
        for score in scores:
            known_label, known = first.setdefault(score.benchmark, (label, score))
            if reason := comparable(known, score):
                raise ValueError(
                    f"{score.benchmark}: {known_label} and {label} must not be compared: {reason}: score both alike"
                )
            size = "the whole benchmark" if score.whole else f"a SUBSET, {score.n} of {score.n_total} items in the file"
            notes[
                f"{score.benchmark}: {size}; {score.metric}; standard error at most "
                f"{100 * _largest_error(rows, score.benchmark):.2f}; {score.scorer}, judge {score.judge}, "
                f"prompt {score.prompt}."
            ] = None
    return list(notes)


def _largest_error(rows: Mapping[str, Sequence[Score]], benchmark: str) -> float:
    return max(score.standard_error for scores in rows.values() for score in scores if score.benchmark == benchmark)
