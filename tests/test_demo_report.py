"""The demo's last words: the table's numbers are the score records', and the sentence says no more than they do."""

from __future__ import annotations

from typing import Any

import pytest

from cli.demo_report import Demo, NothingLearnedError, items_right, show, verdict
from vlm_dft.results import Score

CHANCE = {"demo-mathverse": 0.25, "demo-mathvision": 0.25, "demo-wemath": 0.1}


def score(name: str, value: float, *, role: str = "tuned", error: float = 0.03) -> Score:
    kind = name.removeprefix("demo-")
    categories = {
        "mathverse": {
            "version: Text Dominant": {"value": value, "n": 50.0},
            "version: Vision Only": {"value": value, "n": 50.0},
            "version: Vision Only; subject: counting": {"value": value, "n": 20.0},
        },
        "mathvision": {"subject: counting": {"value": value, "n": 100.0}},
        "wemath": {"S1": {"value": 0.5, "n": 80.0}, "S2": {"value": 0.25, "n": 20.0}, "strict": {"score": value}},
    }[kind]
    return Score(
        benchmark=name,
        kind=kind,
        model="m",
        model_role=role,
        model_sha256="0" * 64,
        metric="acc",
        value=value,
        numerator=value * 100,
        denominator=100.0,
        standard_error=error,
        n=100,
        n_total=100,
        whole=False,
        by_category=categories,
        scorer="native-rules/v1",
        judge="none",
        prompt="direct",
        generation={"max_new_tokens": 80},
        pixels={"min_pixels": 3136},
        image_backend="pil",
        failure_rate=0.0,
        extraction_rate=1.0,
        predictions="p.jsonl",
        wall_seconds=2.0,
    )


def scores(value: float, role: str = "tuned", error: float = 0.03) -> dict[str, Score]:
    return {name: score(name, value, role=role, error=error) for name in CHANCE}


def job(value: float, base: float | None = None) -> dict[str, Any]:
    found = [*scores(value).values(), *(scores(base, "base").values() if base is not None else ())]
    return {
        "scores": [item.model_dump() for item in found],
        "result": {"valid_nll_before": 6.5, "valid_nll_after": 0.25, "wall_seconds": 61.0},
    }


def comparison() -> dict[str, Any]:
    """Of SFT and DFT on one benchmark."""
    numbers = {
        "difference": -0.1,
        "low": -0.18,
        "high": -0.02,
        "mcnemar_p": 0.031,
        "permutation_p": 0.02,
        "told_apart": True,
    }
    pair = {"arm": "dft", "reference": "sft", "refused": None, "fixed": 4, "broken": 14, **numbers}
    return {"benchmarks": [{"benchmark": "demo-mathvision", "pairs": [pair | {"arm": "base"}, pair]}]}


def test_items_right_are_counted_in_each_benchmarks_own_categories() -> None:
    assert items_right(score("demo-mathverse", 0.6)) == (60, 100)
    assert items_right(score("demo-mathvision", 0.37)) == (37, 100)
    assert items_right(score("demo-wemath", 0.9)) == (45, 100)


def test_winner_is_named_only_beyond_noise() -> None:
    near = verdict(scores(0.60), scores(0.62))
    assert "not told apart" in near
    assert "DFT is ahead by 2.0 points" in near
    assert verdict(scores(0.70), scores(0.40)).startswith("SFT wins here: it is ahead of DFT by 30.0 points")
    assert verdict(scores(0.40), scores(0.70)).startswith("DFT wins here: it is ahead of SFT by 30.0 points")


def test_error_of_the_difference_is_that_of_a_mean_of_three_differences() -> None:
    # Each of six scores has 3 points: sqrt(6 x 9) / 3 = 2.449.
    assert "standard error at most 2.4" in verdict(scores(0.5), scores(0.5))


def test_table_shows_every_model_with_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show(Demo(start=job(0.6, base=0.0), sft=job(0.8), dft=job(0.7), comparison=comparison(), chance=CHANCE))
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    rows = {label: values for label, *values in cells}
    assert rows["chance"][:3] == ["25.0", "25.0", "10.0"]
    assert rows["base (random)"] == ["0.0 ± 3.0"] * 3 + ["45 = 15.0", "6.500", ""]
    assert rows["start + SFT"] == ["80.0 ± 3.0"] * 3 + ["205 = 68.3", "0.250", "61 s + 6 s"]
    assert rows["start + DFT"][0] == "70.0 ± 3.0"
    assert any("native-rules/v1" in line and "not the published benchmarks" in line for line in lines)
    assert "demo-mathvision: dft against sft: -10.0 points (-18.0 to -2.0), 4 items fixed, 14 broken" in "\n".join(
        lines
    )
    assert lines[-1].startswith("SFT wins here")


@pytest.mark.parametrize(("dft", "base"), [(0.25, 0.0), (0.5, 0.45)])
def test_a_model_that_learned_nothing_fails_the_demo(dft: float, base: float) -> None:
    with pytest.raises(NothingLearnedError, match=r"start \+ DFT scores .* on average"):
        show(Demo(start=job(0.7, base=base), sft=job(0.8), dft=job(dft), comparison=comparison(), chance=CHANCE))
