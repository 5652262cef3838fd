"""What VLMEvalKit wrote, read with suspicion: status.json, predictions, verdicts per row, score tables. Torch-free.

    check_inference   the data set is done without error, and its prediction file holds exactly what the model answered
    read_grades       each row's verdict; a judge that failed on any row fails the whole
    check_score       the score table says the same as the verdicts, counted again

Exit codes are not asked: VLMEvalKit exits with 0 after a failure. Rows and table lines come in any order; percentages
may be text ("99.43%", "nan%", "0.19% (1)"). Knows nothing about processes or models.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm_dft.errors import EvaluationError
from vlm_dft.evaluation.grading import Grade
from vlm_dft.evaluation.options import LETTERS, REJECTED, infer_option
from vlm_dft.evaluation.vlmevalkit.answer_log import Answer
from vlm_dft.evaluation.vlmevalkit.guards import VERDICTS_SUFFIX
from vlm_dft.evaluation.vlmevalkit.tables import Table
from vlm_dft.evaluation.wemath_dimensions import complete_groups

EXACT_MATCHING = "exact_matching"
FAILURE_MARKERS = ("Failed to obtain answer", "All 5 retries failed", "Failed to predict, thus randomly generate one")
"""In what VLMEvalKit writes down of a judge: no answer, no usable answer, an answer drawn by lot."""
WEMATH_GROUPS = 525
"""VLMEvalKit divides by it, however many groups there are."""
TOLERANCE = 0.006
"""Of a percentage that is printed with two decimals."""

Row = dict[str, str]


def run_directories(outputs: Path) -> list[Path]:
    """T<time>, one per start of VLMEvalKit that came so far, oldest first."""
    return sorted(path for path in outputs.glob("T*") if path.is_dir())


def newest_run(outputs: Path, earlier: Collection[Path] = ()) -> Path:
    """The directory of the last start, which is none of the earlier ones. Raises EvaluationError when there is none."""
    runs = [path for path in run_directories(outputs) if path not in earlier]
    if not runs:
        raise EvaluationError(f"VLMEvalKit wrote nothing to {outputs}: see its log")
    return runs[-1]


def check_status(run: Path, table: Table) -> None:
    """Raises EvaluationError when status.json does not say that the data set went well."""
    path = run / "status.json"
    try:
        entry: Mapping[str, Any] = json.loads(path.read_bytes())["datasets"][table.name]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        raise EvaluationError(f"{path} does not know {table.name}: VLMEvalKit did not come so far") from None
    if entry.get("error_message"):
        raise EvaluationError(f"VLMEvalKit failed on {table.name}: {entry['error_message']}")
    skipped = entry.get("skip_reason")
    if skipped and skipped != "mode_infer":
        raise EvaluationError(f"VLMEvalKit left {table.name} out: {skipped}")
    if entry.get("status") != "done":
        raise EvaluationError(f"VLMEvalKit came to {entry.get('status')!r} on {table.name} and did not end it")


def check_predictions(run: Path, table: Table, answers: Mapping[int, Answer]) -> None:
    """Raises EvaluationError unless the prediction file has each row once, with what the model answered."""
    path = run / f"{run.parent.name}_{table.name}.tsv"
    rows = _by_index(path, _read(path, "\t"))
    if rows.keys() != table.rows.keys():
        raise EvaluationError(f"{path} has {len(rows)} rows where {len(table.rows)} items were asked")
    for index, item in table.rows.items():
        if answers[index].prompt != item.prompt:
            raise EvaluationError(f"VLMEvalKit asked item {item.id} in other words than its benchmark file does")
        if rows[index]["prediction"] != answers[index].text:
            found = rows[index]["prediction"][:80]
            raise EvaluationError(f"{path}: row {index} holds {found!r}, which is not what the model answered")


def read_grades(run: Path, table: Table, judge: str) -> dict[str, Grade]:
    """Item id -> VLMEvalKit's verdict. judge: its name in file names. Raises EvaluationError."""
    stem = str(run / f"{run.parent.name}_{table.name}")
    if judge == EXACT_MATCHING:
        grades = _verdicts(Path(f"{stem}.tsv{VERDICTS_SUFFIX}"))
    elif table.class_name == "MathVision":
        grades = _judged_mathvision(Path(f"{stem}_{judge}.tsv"))
    elif table.class_name == "MathVerse":
        grades = _judged_mathverse(Path(f"{stem}_{judge}_score.tsv"))
    else:
        grades = _judged_wemath(Path(f"{stem}_{judge}.tsv"))
    if grades.keys() != table.rows.keys():
        raise EvaluationError(f"VLMEvalKit judged {len(grades)} of {len(table.rows)} items of {table.name}")
    return {item.id: grades[index] for index, item in table.rows.items()}


def check_score(run: Path, table: Table, judge: str, grades: Mapping[str, Grade]) -> None:
    """Raises EvaluationError when the score table is absent or says something else than the verdicts do."""
    path = run / f"{run.parent.name}_{table.name}_{judge}_score.csv"
    lines = _read(path, ",")
    claims = {"MathVerse": _mathverse_claims, "MathVision": _mathvision_claims, "WeMath": _wemath_claims}
    for name, expected in claims[table.class_name](table, grades).items():
        found = _claim(path, table.class_name, lines, name)
        if not abs(found - expected) <= TOLERANCE:  # NaN is never near
            raise EvaluationError(
                f"{path}: {name} is {found:g}, but the rows add up to {expected:g}: the score is not to be trusted"
            )


def number(text: str) -> float:
    """99.43 of "99.43%", "99.43", or "99.43% (524)"; NaN of "nan%" and of an empty cell. Raises EvaluationError."""
    found = re.match(r"\s*(nan|-?\d+(?:\.\d+)?(?:e-?\d+)?)?\s*%?\s*(?:\(\d+\))?\s*$", text, re.IGNORECASE)
    if found is None:
        raise EvaluationError(f"VLMEvalKit wrote {text!r} where a number belongs")
    return float(found[1] or "nan")


def _claim(path: Path, class_name: str, lines: list[Row], name: str) -> float:
    """One number of the score table. name: "column", or "line: column"."""
    key_column = {"MathVerse": "split", "MathVision": "Subject"}.get(class_name)
    line_name, _, column = name.rpartition(": ")
    matching = [line for line in lines if key_column is None or line.get(key_column) == line_name]
    if len(matching) != 1 or matching[0].get(column.removesuffix(" count")) is None:
        raise EvaluationError(f"{path} does not say {name}")
    cell = matching[0][column.removesuffix(" count")]
    if not column.endswith(" count"):
        return number(cell)
    count = re.search(r"\((\d+)\)\s*$", cell)
    if count is None:
        raise EvaluationError(f"{path}: {name}: no count in {cell!r}")
    return float(count[1])


def _mathverse_claims(table: Table, grades: Mapping[str, Grade]) -> dict[str, float]:
    total: Counter[str] = Counter(item.categories["version"] for item in table.rows.values())
    right = Counter(item.categories["version"] for item in table.rows.values() if grades[item.id].correct)
    return {f"{version}: Overall": 100 * right[version] / n for version, n in total.items()}


def _mathvision_claims(table: Table, grades: Mapping[str, Grade]) -> dict[str, float]:
    subjects = [(item.categories["subject"], grades[item.id].correct) for item in table.rows.values()]
    subjects += [("Overall", correct) for _, correct in subjects]
    total, right = Counter(name for name, _ in subjects), Counter(name for name, correct in subjects if correct)
    claims = {f"{name}: tot": float(n) for name, n in total.items()}
    return claims | {f"{name}: hit": float(right[name]) for name in total}


def _wemath_claims(table: Table, grades: Mapping[str, Grade]) -> dict[str, float]:
    """Counts of the four dimensions, and the scores that VLMEvalKit makes of them."""
    groups = complete_groups(list(table.rows.values()), grades)
    names = {"IK": "InsufficientKnowledge", "IG": "InadequateGeneralization", "CM": "CompleteMastery"}
    names["RM"] = "RoteMemorization"
    claims: dict[str, float] = {}
    for strict in (True, False):
        kind = "(Strict)" if strict else "(Loose)"
        counts = Counter(group.dimension(strict=strict) for group in groups)
        claims |= {f"{name} {kind} count": float(counts[short]) for short, name in names.items()}  # type: ignore[index]
        lost = 0.5 * counts["IG"] + counts["RM"] + counts["IK"]
        claims[f"Score {kind}"] = 100 * (WEMATH_GROUPS - lost) / WEMATH_GROUPS
    return claims


def _verdicts(path: Path) -> dict[int, Grade]:
    """The rows that our guards wrote while VLMEvalKit decided."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise EvaluationError(f"{path} is absent: VLMEvalKit did not come to judge the rows") from None
    return {row["index"]: _grade(row["extracted"], row["correct"], judged=False) for row in rows}


def _judged_mathvision(path: Path) -> dict[int, Grade]:
    verdicts = _verdicts(Path(str(path) + VERDICTS_SUFFIX))
    rows = _by_index(path, _read(path, "\t"))
    _check_judge(path, rows, "log")
    return {
        index: _grade(row["res"], verdicts[index].correct, judged=row["log"] != "Prefetch succeed")
        for index, row in rows.items()
        if index in verdicts
    }


def _judged_mathverse(path: Path) -> dict[int, Grade]:
    rows = _by_index(path, _read(path, "\t"))
    for column in ("log_extract", "log_score"):
        _check_judge(path, rows, column)
    return {index: _grade(row["extract"], _truth(row["score"]), judged=True) for index, row in rows.items()}


def _judged_wemath(path: Path) -> dict[int, Grade]:
    """Absent when VLMEvalKit found its judge not to work: it goes on without one and does not say so."""
    rows = _by_index(path, _read(path, "\t"))
    _check_judge(path, rows, "log")
    return {index: _option_grade(row) for index, row in rows.items()}


def _option_grade(row: Row) -> Grade:
    """The log says what the option was read from: the response itself, or the judge's answer, Z where it has none."""
    text = row["log"].strip().removeprefix("Match Log: ").removesuffix(".")
    letter = infer_option(text, {letter: row[letter] for letter in LETTERS if row.get(letter)})
    extracted = None if letter == REJECTED else letter or text
    return Grade(extracted, "benchmark" if row["prediction"] in row["log"] else "judge", _truth(row["hit"]))


def _check_judge(path: Path, rows: Mapping[int, Row], column: str) -> None:
    failed = [index for index, row in rows.items() if any(marker in row[column] for marker in FAILURE_MARKERS)]
    if failed:
        raise EvaluationError(
            f"the judge gave no usable answer on {len(failed)} of {len(rows)} items (see row {failed[0]} of {path}), "
            "which would count as wrong: see whether the judge works, then evaluate again"
        )


def _grade(extracted: str | None, correct: bool, *, judged: bool) -> Grade:
    found = (extracted or "").strip()
    if not found:
        return Grade(None, "none", correct)
    return Grade(found, "judge" if judged else "benchmark", correct)


def _truth(text: str) -> bool:
    if text not in ("True", "False", "0", "1", "0.0", "1.0"):
        raise EvaluationError(f"VLMEvalKit wrote {text!r} where right or wrong belongs")
    return text in ("True", "1", "1.0")


def _by_index(path: Path, rows: list[Row]) -> dict[int, Row]:
    try:
        found = {int(row["index"]): row for row in rows}
    except (KeyError, ValueError, TypeError):
        raise EvaluationError(f"{path} has rows without an index") from None
    if len(found) != len(rows):
        raise EvaluationError(f"{path} has a row twice")
    return found


def _read(path: Path, delimiter: str) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter, strict=True, restval=None))
    except FileNotFoundError:
        raise EvaluationError(f"{path} is absent: VLMEvalKit did not come so far, whatever it says") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from None
    if not rows or any(None in row or None in row.values() for row in rows):
        raise EvaluationError(f"{path} is empty or was cut off")
    return rows
