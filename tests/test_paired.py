"""The statistics of two models on the same items, against formulas and simulations that know the answer."""

from __future__ import annotations

import math
import random

import pytest

from vlm_dft.evaluation.paired import compare, mcnemar


def verdicts(outcomes: list[tuple[bool, bool]]) -> tuple[dict[tuple[str, int], bool], dict[tuple[str, int], bool]]:
    keys = [(str(number), 0) for number in range(len(outcomes))]
    return (
        dict(zip(keys, [first for first, _ in outcomes], strict=True)),
        dict(zip(keys, [second for _, second in outcomes], strict=True)),
    )


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 2**10), (9, 1, 2 * 11 / 2**10), (8, 2, 2 * 56 / 2**10)],
)
def test_mcnemar_is_the_two_sided_binomial_test(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p)
    assert mcnemar(broken, fixed) == pytest.approx(p)


def test_mcnemar_takes_thousands_of_flips() -> None:
    p = mcnemar(2100, 1900)
    assert p == pytest.approx(math.erfc(199 / math.sqrt(4000) / math.sqrt(2)), rel=0.01)  # the normal approximation


def test_flips_are_counted_and_items_alone_make_the_permutation_mcnemar() -> None:
    outcomes = [(True, True)] * 50 + [(False, True)] * 14 + [(True, False)] * 4 + [(False, False)] * 32
    found = compare(*verdicts(outcomes), {})
    assert (found.both_right, found.fixed, found.broken, found.both_wrong) == (50, 14, 4, 32)
    assert found.difference == pytest.approx(0.10)
    assert found.permutation_p == found.mcnemar_p == mcnemar(14, 4)
    # Standard error of a paired difference: sqrt((b + c)/n - d^2)/sqrt(n).
    error = math.sqrt(0.18 - 0.01) / 10
    assert found.low == pytest.approx(0.10 - 1.96 * error, abs=0.012)
    assert found.high == pytest.approx(0.10 + 1.96 * error, abs=0.012)


def test_items_of_one_problem_are_not_independent_evidence() -> None:
    """Five versions that all flip are one flip: as single items they would look five times as sure."""
    outcomes = [(False, True)] * 30 + [(True, False)] * 10 + [(True, True)] * 60
    groups = {str(number): str(number // 5) for number in range(100)}
    alone, together = compare(*verdicts(outcomes), {}), compare(*verdicts(outcomes), groups)
    assert (alone.groups, together.groups) == (100, 20)
    assert together.difference == alone.difference == 0.2
    assert together.high - together.low > 1.8 * (alone.high - alone.low)
    assert alone.permutation_p < 0.01
    assert together.permutation_p == mcnemar(6, 2)


def test_groups_of_several_sizes_give_the_sign_flip_probability() -> None:
    outcomes = [(False, True)] * 3 + [(False, True)] + [(True, True)] * 6
    groups = {str(number): "one" for number in range(3)}
    # |±3 ±1| >= 4 in two of four assignments.
    assert compare(*verdicts(outcomes), groups).permutation_p == pytest.approx(0.5, abs=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(3)
    truth, covered, trials = 0.08, 0, 200
    for _ in range(trials):
        outcomes = []
        for _ in range(150):
            draw = generator.random()
            outcomes.append((False, True) if draw < 0.16 else (True, False) if draw < 0.24 else (True, True))
        found = compare(*verdicts(outcomes), {})
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / trials <= 0.99


def test_without_a_flip_the_interval_is_what_so_many_groups_rule_out() -> None:
    few, many = (compare(*verdicts([(True, True)] * n), {}) for n in (3, 300))
    assert few.high == -few.low == pytest.approx(1 - 0.025 ** (1 / 3))
    assert few.high > 0.7
    assert many.high < 0.013
    assert not few.told_apart


def test_several_answers_to_an_item_are_one_group_and_have_no_mcnemar() -> None:
    reference = {("a", 0): False, ("a", 1): False, ("b", 0): True, ("b", 1): False}
    other = {("a", 0): True, ("a", 1): True, ("b", 0): True, ("b", 1): False}
    found = compare(reference, other, {})
    assert (found.n, found.groups, found.difference, found.mcnemar_p) == (4, 2, 0.5, None)


def test_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="2 answers have no counterpart"):
        compare({("a", 0): True}, {("b", 0): True}, {})
