"""VLMEvalKit with a judge: what is asked of it, within which budget, and what a judged run leaves."""

from __future__ import annotations

import csv
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_dft.errors import EvaluationError
from vlm_dft.evaluation import mathverse
from vlm_dft.evaluation.items import Item, Picture
from vlm_dft.evaluation.vlmevalkit import guards, outcome
from vlm_dft.evaluation.vlmevalkit.judge_requests import JudgeRequests, JudgeRules, Reply
from vlm_dft.evaluation.vlmevalkit.tables import Table, write_table


def rows_of(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def picture(directory: Path, name: str = "p.png") -> Picture:
    Image.new("RGBA", (30, 30)).save(directory / name)
    return Picture("here", path=directory / name)


def written_table(table: Table, directory: Path) -> list[dict[str, str]]:
    write_table(table, directory)
    return rows_of(directory / f"{table.name}.tsv")


# The judge's requests


def judge_requests(tmp_path: Path, max_requests: int = 10) -> tuple[JudgeRequests, list[dict[str, Any]]]:
    sent: list[dict[str, Any]] = []

    def post(url: str, **request: Any) -> Reply:
        sent.append({"url": url, **request})
        return Reply(200, f"reply {len(sent)}")

    rules = JudgeRules(max_requests=max_requests, cache=tmp_path / "cache", failure=tmp_path / "failure.json")
    return JudgeRequests(rules, "the-key", post), sent


def ask(requests: JudgeRequests, prompt: str, temperature: float = 0) -> str:
    data = json.dumps({"messages": [prompt], "temperature": temperature})
    return requests.post("http://judge/v1", headers={"Authorization": "Bearer elsewhere"}, data=data).text


def test_the_key_is_sent_and_replies_are_remembered_for_the_next_process(tmp_path: Path) -> None:
    requests, sent = judge_requests(tmp_path)
    assert [ask(requests, "a"), ask(requests, "b"), ask(requests, "c", 0.5)] == ["reply 1", "reply 2", "reply 3"]
    assert {request["headers"]["Authorization"] for request in sent} == {"Bearer the-key"}
    later, sent = judge_requests(tmp_path)
    assert [ask(later, "a"), ask(later, "b")] == ["reply 1", "reply 2"]
    assert sent == []
    # Asked again: VLMEvalKit could not use the reply. Sampled: another reply is wanted.
    assert [ask(later, "a"), ask(later, "c", 0.5)] == ["reply 1", "reply 2"]
    assert len(sent) == 2
    assert not any(b"the-key" in path.read_bytes() for path in tmp_path.rglob("*.json"))


def test_a_spent_budget_is_told_and_nothing_is_sent_beyond_it(tmp_path: Path) -> None:
    requests, sent = judge_requests(tmp_path, max_requests=3)
    failures = []

    def work(number: int) -> None:
        try:
            ask(requests, str(number))
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(sent), len(failures)) == (3, 5)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert "budget of 3 requests is spent" in failure["message"]
    assert failure["param"] == "evaluation.judge.max_requests"


# What a judged run leaves


def judged_run(tmp_path: Path, kind: str, rows: list[dict[str, str]]) -> tuple[Path, Table]:
    """Two items of which the second is right, with the rows that VLMEvalKit wrote, in the other order."""
    run = tmp_path / "tuned" / "T20260101-000000"
    run.mkdir(parents=True)
    names = {"MathVerse": "judge_score.tsv", "MathVision": "judge.tsv", "WeMath": "judge.tsv"}
    path = run / f"tuned_b00-{kind}_{names[kind]}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), dialect="excel-tab")
        writer.writeheader()
        writer.writerows(reversed(rows))
    items = {index: Item(f"item {index}", "g", "", None, "") for index in (0, 1)}
    return run, Table(f"b00-{kind}", kind, items)


def grades(tmp_path: Path, kind: str, *rows: dict[str, str]) -> list[tuple[str | None, str, bool]]:
    numbered = [{"index": str(index), **row} for index, row in enumerate(rows)]
    run, table = judged_run(tmp_path, kind, numbered)
    if kind == "MathVision":
        verdicts = [{"index": index, "extracted": "", "correct": index == 1} for index in range(len(rows))]
        name = f"tuned_b00-{kind}_judge.tsv{guards.VERDICTS_SUFFIX}"
        (run / name).write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    found = outcome.read_grades(run, table, "judge")
    return [(grade.extracted, grade.rule, grade.correct) for grade in found.values()]


def test_verdicts_of_a_judge_are_read_by_row_number(tmp_path: Path) -> None:
    fine = {"log_extract": "Succeed", "log_score": "Prefetch succeed"}
    rows = ({"extract": "", "score": "False", **fine}, {"extract": "12", "score": "True", **fine})
    assert grades(tmp_path / "1", "MathVerse", *rows) == [(None, "none", False), ("12", "judge", True)]
    rows = ({"res": "3", "log": "Succeed"}, {"res": "B", "log": "Prefetch succeed"})
    assert grades(tmp_path / "2", "MathVision", *rows) == [("3", "judge", False), ("B", "benchmark", True)]
    options = {"A": "1", "B": "2"}
    silent = {"prediction": "hm", "hit": "0", "log": "Match Log: Z. ", **options}
    marked = {"prediction": "(B)", "hit": "1", "log": "Match Log: (B). ", **options}
    judged = {"prediction": "well", "hit": "1", "log": "Match Log: A. ", **options}
    assert grades(tmp_path / "3", "WeMath", silent, marked) == [(None, "judge", False), ("B", "benchmark", True)]
    assert grades(tmp_path / "4", "WeMath", judged, marked)[0] == ("A", "judge", True)


RETRIED = "Try 0: output is x, failed to parse.\nAll 5 retries failed.\n"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (
            "MathVerse",
            {"extract": "", "score": "False", "log_extract": "All 5 retries failed.\n", "log_score": "Succeed"},
        ),
        (
            "MathVerse",
            {"extract": "1", "score": "False", "log_extract": "Succeed", "log_score": "All 5 retries failed.\n"},
        ),
        ("MathVision", {"res": "", "log": "Try 0: output is x, failed to parse.\nAll 5 retries failed.\n"}),
        (
            "WeMath",
            {"prediction": "x", "hit": "1", "log": "Match Log: Failed to predict, thus randomly generate one. . "},
        ),
    ],
)
def test_a_judge_that_failed_on_one_item_fails_the_score(tmp_path: Path, kind: str, row: dict[str, str]) -> None:
    """VLMEvalKit counts it as wrong, or draws an option by lot, and goes on."""
    with pytest.raises(EvaluationError, match="no usable answer on 2 of 2 items"):
        grades(tmp_path, kind, row, row)


def test_a_judge_that_wemath_silently_left_out_fails_the_score(tmp_path: Path) -> None:
    run, table = judged_run(tmp_path, "WeMath", [{"index": "0"}])
    (run / "tuned_b00-WeMath_judge.tsv").unlink()
    with pytest.raises(EvaluationError, match=r"judge\.tsv is absent"):
        outcome.read_grades(run, table, "judge")


@pytest.mark.parametrize(
    ("text", "value"), [("99.43%", 99.43), ("0.19% (1)", 0.19), ("50.0", 50.0), ("0", 0), ("1e-05", 1e-5), ("-3", -3)]
)
def test_numbers_are_read_from_percentages(text: str, value: float) -> None:
    assert outcome.number(text) == value


def test_nan_is_a_number_that_is_near_no_other_and_words_are_none() -> None:
    assert all(outcome.number(text) != outcome.number(text) for text in ("nan%", "nan% (0)", ""))
    with pytest.raises(EvaluationError, match="'done' where a number belongs"):
        outcome.number("done")


def mathverse_items(shared: Path) -> dict[int, Item]:
    return dict(enumerate(mathverse.load(shared, "direct").first(10).items))


def test_mathverses_table_is_checked_in_whatever_order_its_lines_come(shared_data: Path, tmp_path: Path) -> None:
    from vlm_dft.evaluation.grading import Grade

    items = mathverse_items(shared_data / "mathverse")
    table = Table("b00-MathVerse", "MathVerse", items)
    right = {item.id: Grade("x", "judge", index % 2 == 0) for index, item in items.items()}
    by_version: dict[str, list[bool]] = {}
    for item in items.values():
        by_version.setdefault(item.categories["version"], []).append(right[item.id].correct)
    lines = [f'"{name}","{100 * sum(found) / len(found)}","nan"' for name, found in reversed(by_version.items())]
    run = tmp_path / "tuned" / "T1"
    run.mkdir(parents=True)
    path = run / "tuned_b00-MathVerse_judge_score.csv"
    path.write_text("\n".join(['"split","Overall","Area"', *lines]) + "\n")
    outcome.check_score(run, table, "judge", right)
    wrong = {**right, items[0].id: Grade("x", "judge", not right[items[0].id].correct)}
    with pytest.raises(EvaluationError, match=r"Overall is .*, but the rows add up to"):
        outcome.check_score(run, table, "judge", wrong)
    path.write_text(path.read_text().replace(lines[0].split(",")[1], '"nan"'))
    with pytest.raises(EvaluationError, match="Overall is nan"):
        outcome.check_score(run, table, "judge", right)
