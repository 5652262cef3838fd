"""Our rules against values that VLMEvalKit's own functions computed (shared data: vlmeval_golden)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.evaluation import mathverse, mathvision, wemath
from vlm_dft.evaluation.equality import is_equal
from vlm_dft.evaluation.grading import Grade, accuracies
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import LETTERS, infer_option


@pytest.fixture(scope="module")
def latex() -> Iterator[LatexProcess]:
    with LatexProcess() as process:
        yield process


def golden(shared_data: Path, name: str) -> Any:
    return json.loads((shared_data / "vlmeval_golden" / f"{name}.json").read_text())


def graded(correct: bool) -> Grade:
    return Grade(None, "benchmark", correct)


def test_option_inference_equals_vlmevalkit_on_every_case(shared_data: Path) -> None:
    cases = golden(shared_data, "option_infer")
    assert len(cases) == 400
    wrong = [case for case in cases if (infer_option(case[0], case[1]) or False) != case[2]]
    assert wrong == []


def test_equality_equals_vlmevalkit_but_for_its_two_variable_names(shared_data: Path, latex: LatexProcess) -> None:
    """Quirk: VLMEvalKit evaluates answers where a and b are its own variables, so "A" or "B" equals any number."""
    cases = golden(shared_data, "is_equal")
    assert len(cases) == 1681
    differing = [case for case in cases if is_equal(case[0], case[1], latex) != case[2]]
    quirks = [case for case in cases if case[3]]
    assert differing == quirks
    assert len(quirks) == 48
    assert all("A" in case[:2] or "B" in case[:2] for case in quirks)
    assert all(case[2] is True for case in quirks)


def test_mathvision_rows_equal_vlmevalkit_with_a_scripted_judge(shared_data: Path, latex: LatexProcess) -> None:
    rows = golden(shared_data, "mathvision_rows")
    assert len(rows) == 80
    for row in rows:
        choices = dict(zip(LETTERS, json.loads(row["choices"].replace("'", '"')), strict=False))
        item = Item("1", "1", "q", None, row["answer"], choices, {"subject": "algebra"})
        fetched = mathvision.prefetched(item, row["prediction"], latex)
        assert (fetched is not None) == row["log_prefetch"], row
        answer = row["res"] if fetched is None else fetched
        assert answer == row["res"], row
        assert mathvision.is_correct(item, answer, latex) == row["hit"], row
        if row["log_prefetch"]:  # no judge: our whole grade is VLMEvalKit's
            assert mathvision.grade(item, row["prediction"], latex).correct == row["hit"], row


def test_mathverse_accuracies_equal_vlmevalkit(shared_data: Path) -> None:
    data = golden(shared_data, "mathverse_acc")
    items, grades = [], {}
    for row in data["rows"]:
        metadata = json.loads(row["metadata"].replace("'", '"'))
        categories = {name: metadata[name] for name in ("subject", "subfield")} | {"version": row["problem_version"]}
        item = Item(str(row["index"]), str(row["index"]), "", None, "", {}, categories)
        items.append(item)
        grades[item.id] = graded(row["score"])
    summary = mathverse.summarize(Benchmark("mathverse", Path("golden"), tuple(items), len(items)), grades)
    compared = 0
    for expected in data["expected"]:
        version = expected.pop("split")
        for name, percent in expected.items():
            key = f"version: {version}"
            if name != "Overall":
                key += f"; subject: {name}" if name in ("Functions", "Solid Geometry", "Plane Geometry") else ""
                key += f"; subfield: {name}" if name in ("Area", "Length", "Angle") else ""
            if percent is None:  # no such item
                assert key not in summary.by_category
            else:
                assert summary.by_category[key]["value"] * 100 == pytest.approx(percent, abs=1e-9), key
                compared += 1
    assert compared > 30
    overall = [summary.by_category[f"version: {version}"]["value"] for version in mathverse.VERSIONS]
    assert summary.estimate.value == pytest.approx(sum(overall) / 5)
    assert accuracies(items, grades, [("version",)]).keys() == {f"version: {version}" for version in mathverse.VERSIONS}


def wemath_case(rows: list[dict[str, str]]) -> tuple[Benchmark, dict[str, Grade]]:
    items, grades = [], {}
    for row in rows:
        steps, part = row["key"].split("steps_")
        item = Item(
            id=f"{row['ID']}:{row['key']}",
            group=f"{steps}steps:{row['ID']}",
            prompt="",
            picture=None,
            answer=row["answer"],
            options=dict.fromkeys("ABCDEFGH", ""),
            categories={"steps": steps, "part": part, "concept": row["knowledge concept"]},
        )
        items.append(item)
        grades[item.id] = wemath.grade_exactly(item, row["prediction"])
    return Benchmark("wemath", Path("golden"), tuple(items), len(items)), grades


def percent_and_count(text: str) -> tuple[float, int]:
    percent, _, count = text.partition("% (")
    return float(percent) / 100, int(count.rstrip(")"))


@pytest.mark.parametrize("case", range(4))
def test_wemath_equals_vlmevalkit_after_undoing_its_525(shared_data: Path, case: int) -> None:
    """VLMEvalKit divides by 525 groups whatever there is; ours divides by the groups at hand."""
    data = golden(shared_data, "wemath")[case]
    expected = data["expected"]
    benchmark, grades = wemath_case(data["rows"])
    summary = wemath.summarize(benchmark, grades)
    groups = summary.estimate.denominator
    assert groups == 60
    for mode in ("strict", "loose"):
        ours, theirs = summary.by_category[mode], f"({mode.title()})"
        for name, key in (
            ("InsufficientKnowledge", "IK"),
            ("InadequateGeneralization", "IG"),
            ("CompleteMastery", "CM"),
        ):
            share, count = percent_and_count(expected[f"{name} {theirs}"])
            assert ours[f"n_{key}"] == count
            assert ours[key] * groups / 525 == pytest.approx(share, abs=5.1e-5)
        share, count = percent_and_count(expected[f"RoteMemorization {theirs}"])
        assert ours["n_RM"] == count
        assert ours["RM"] == pytest.approx(share, abs=5.1e-5)
        lost = (1 - ours["score"]) * groups
        assert (525 - lost) / 525 == pytest.approx(float(expected[f"Score {theirs}"][:-1]) / 100, abs=5.1e-5)
    for name, key in (("One-step(S1)", "S1"), ("Two-step(S2)", "S2"), ("Three-step(S3)", "S3")):
        assert summary.by_category[key]["value"] == pytest.approx(float(expected[name][:-1]) / 100, abs=5.1e-5)
    for area in ("Calculation of Plane Figures", "Understanding of Plane Figures"):
        value = summary.by_category[f"area: {area}"]["value"]
        assert value == pytest.approx(float(expected[area][:-1]) / 100, abs=5.1e-5)
    absent = [name for name, value in expected.items() if value == "nan%"]
    assert not any(f"area: {name}" in summary.by_category for name in absent)


def test_wemath_grades_differ_from_exact_matching_only_where_the_model_marked_its_answer(
    shared_data: Path, latex: LatexProcess
) -> None:
    """Exact matching takes \\boxed{B} for no answer, ours takes it for B; unmarked responses are graded the same."""
    differing = set()
    for case in golden(shared_data, "wemath"):
        benchmark, exact = wemath_case(case["rows"])
        for item, row in zip(benchmark.items, case["rows"], strict=True):
            if wemath.grade(item, row["prediction"], latex) != exact[item.id]:
                differing.add(row["prediction"])
    assert differing
    assert all(prediction.startswith("\\boxed{") for prediction in differing)
