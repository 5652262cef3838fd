"""Scores side by side: what may not be compared is said, what is partial is said."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_dft.evaluation import comparable
from vlm_dft.evaluation.report import by_role, difference, score_table
from vlm_dft.results import Score


def score(**changes: Any) -> Score:
    fields: dict[str, Any] = {
        "benchmark": "mathverse",
        "kind": "mathverse",
        "model": "m",
        "model_role": "base",
        "model_sha256": "a",
        "metric": "mean_over_versions",
        "value": 0.25,
        "numerator": 1.25,
        "denominator": 5,
        "standard_error": 0.03,
        "n": 3940,
        "n_total": 3940,
        "whole": True,
        "items_sha256": "i",
        "by_category": {
            "version: Vision Only": {"value": 0.2, "n": 788.0},
            "version: Vision Only; subject: Functions": {"value": 0.1, "n": 100.0},
        },
        "scorer": "native-rules/v1",
        "judge": "none",
        "prompt": "direct",
        "generation": {"temperature": 0.0, "batch_size": 8},
        "pixels": {"min_pixels": 1, "max_pixels": 2},
        "image_backend": "pil",
        "failure_rate": 0.0,
        "extraction_rate": 1.0,
        "predictions": "p",
        "wall_seconds": 1.0,
    }
    return Score(**(fields | changes))


TUNED = {"model_role": "tuned", "model_sha256": "b", "value": 0.375, "standard_error": 0.04}


def test_base_and_tuned_stand_side_by_side() -> None:
    table = score_table(by_role([score(**TUNED), score()]), categories=True)
    assert table.splitlines() == [
        "| benchmark     | metric             | n    | base       | tuned      |",
        "|---------------|--------------------|------|------------|------------|",
        "| mathverse     | mean_over_versions | 3940 | 25.0 ± 3.0 | 37.5 ± 4.0 |",
        "|   Vision Only |                    | 788  | 20.0       | 20.0       |",
        "",
        "Scored by native-rules/v1, judge none, prompt direct; in percent ± one standard error.",
    ]


def test_the_table_says_what_is_partial_absent_or_failed() -> None:
    columns = {
        "base": [score(whole=False, n=50)],
        "sft": [score(whole=False, n=50, failure_rate=0.5, extraction_rate=0.25)],
        "dft": [],
    }
    table = score_table(columns)
    assert "50 of 3940" in table
    assert "| -   |" in table
    assert "mathverse: a subset of the published benchmark" in table
    assert "mathverse: no usable answer: base 0.0 %, sft 50.0 %." in table
    assert "mathverse: no answer that a rule could find: base 0.0 %, sft 75.0 %." in table


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scorer": "vlmeval@e8e78f05"}, "scorer differs: 'native-rules/v1' and 'vlmeval@e8e78f05'"),
        ({"judge": "gpt"}, "judge differs"),
        ({"prompt": "cot"}, "prompt differs"),
        ({"n": 50}, "n differs"),
        ({"items_sha256": "other"}, "items_sha256 differs"),
        ({"metric": "acc"}, "metric differs"),
        ({"image_backend": "torchvision"}, "image_backend differs"),
        ({"pixels": {"min_pixels": 1, "max_pixels": 3}}, "pixels differs"),
        ({"generation": {"temperature": 1.0}}, "generation.temperature differs: 0.0 and 1.0"),
        ({"generation": {"temperature": 0.0, "system_prompt": "x"}}, "generation.system_prompt differs"),
    ],
)
def test_scores_made_in_different_ways_must_not_be_compared(changes: dict[str, Any], reason: str) -> None:
    other = score(**(TUNED | changes))
    assert (comparable(score(), other) or "").startswith(reason)
    assert f"mathverse: base and tuned must not be compared: {reason}" in score_table(by_role([score(), other]))
    with pytest.raises(ValueError, match=reason.split(":", maxsplit=1)[0]):
        difference(score(), other)


def test_models_and_batch_sizes_may_differ() -> None:
    other = score(**TUNED, generation={"temperature": 0.0, "batch_size": 1}, wall_seconds=9.0)
    assert comparable(score(), other) is None
    points, error = difference(score(), other)
    assert points == pytest.approx(12.5)
    assert error == pytest.approx(5.0)
