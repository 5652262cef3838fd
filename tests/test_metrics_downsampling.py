"""Many steps as few points: nothing is lost that a mean or an extreme keeps."""

from __future__ import annotations

import pytest

from service.api.fine_tuning.downsampling import downsample


def record(step: int, nll: float, num_tokens: int, **more: float | None) -> dict[str, float | int | None]:
    return {"step": step, "nll": nll, "num_tokens": num_tokens, "grad_norm": float(step), "time": 100.0 + step, **more}


def test_few_records_are_given_as_they_are() -> None:
    records = [record(1, 2.0, 3), record(2, 1.0, 5)]
    assert downsample(records, 2) == records
    assert downsample(records, 2, ["nll"]) == [{"step": 1, "nll": 2.0}, {"step": 2, "nll": 1.0}]


def test_a_mean_over_tokens_stays_one() -> None:
    """By hand: (2 x 30 + 1 x 10) / 40 = 1.75, and not 1.5."""
    records = [record(1, 2.0, 30), record(2, 1.0, 10), record(3, 4.0, 5), record(4, 4.0, 5)]
    first, second = downsample(records, 2)
    assert first["nll"] == pytest.approx(1.75)
    assert (first["min"]["nll"], first["max"]["nll"]) == (1.0, 2.0)
    assert (first["first_step"], first["step"], first["num_steps"]) == (1, 2, 2)
    assert first["num_tokens"] == 40
    assert first["grad_norm"] == 1.5
    assert first["time"] == 102.0
    assert second["nll"] == 4.0


def test_points_together_have_the_mean_of_all_steps() -> None:
    records = [record(step, 1 / step, step % 7 + 1) for step in range(1, 1001)]
    points = downsample(records, 37)
    assert len(points) == 37
    assert sum(point["num_steps"] for point in points) == 1000
    tokens = sum(row["num_tokens"] for row in records)
    mean = sum(row["nll"] * row["num_tokens"] for row in records) / tokens
    assert sum(point["nll"] * point["num_tokens"] for point in points) / tokens == pytest.approx(mean)
    assert max(point["max"]["nll"] for point in points) == 1.0


def test_a_number_that_few_steps_have_is_taken_over_those() -> None:
    records = [record(step, 1.0, 1, eos_nll=None) for step in range(1, 9)]
    records[2] |= {"valid_nll": 3.0, "valid_num_tokens": 10, "eos_nll": 0.5}
    records[3] |= {"valid_nll": 1.0, "valid_num_tokens": 30}
    first, second = downsample(records, 2)
    assert first["valid_nll"] == pytest.approx(1.5)
    assert first["eos_nll"] == 0.5
    assert "valid_nll" not in second
    assert "eos_nll" not in second["min"]
