"""We-Math's four dimensions, S1 to S3 and knowledge areas, from graded items. Torch-free.

Of a group (a problem and its steps asked alone):

    the problem wrong, a step wrong      IK  insufficient knowledge     scores 0
    the problem wrong, all steps right   IG  inadequate generalization  scores 1/2
    the problem right, all steps right   CM  complete mastery           scores 1
    the problem right, a step wrong      RM  rote memorization          scores 0 (strict)

Loose: the problem right and any step right is already mastery. IK, IG and CM are shares of all groups, RM is the share
of rote among right problems. Knows nothing about files or responses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation.grading import Grade, Outcome, Rates, Summary
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.wemath_areas import AREAS

Dimension = Literal["IK", "IG", "CM", "RM"]
VALUES: dict[Dimension, float] = {"IK": 0.0, "IG": 0.5, "CM": 1.0, "RM": 0.0}


@dataclass(frozen=True)
class Group:
    """One complete group, graded."""

    name: str
    steps: tuple[tuple[str, bool], ...]
    """Knowledge concept and whether the step alone was answered right."""
    solved: bool
    """Whether the whole problem was."""

    def dimension(self, *, strict: bool) -> Dimension:
        right = [correct for _, correct in self.steps]
        if not self.solved:
            return "IG" if all(right) else "IK"
        return "CM" if (all(right) if strict else any(right)) else "RM"


def complete_groups(items: Sequence[Item], grades: Mapping[str, Grade]) -> list[Group]:
    """Groups with all their steps and the problem itself. Raises BenchmarkError for a part that comes twice."""
    parts: dict[str, dict[str, Item]] = defaultdict(dict)
    for item in items:
        if item.categories["part"] in parts[item.group]:
            raise BenchmarkError(f"item {item.id}: part {item.categories['part']} of group {item.group} comes twice")
        parts[item.group][item.categories["part"]] = item
    found = []
    for name, group in parts.items():
        steps = [str(number) for number in range(1, int(next(iter(group.values())).categories["steps"]) + 1)]
        if set(group) == {*steps, "multi"}:
            graded = tuple((group[step].categories["concept"], grades[group[step].id].correct) for step in steps)
            found.append(Group(name, graded, grades[group["multi"].id].correct))
    return found


def summarize_groups(benchmark: Benchmark, grades: Mapping[str, Grade]) -> tuple[Summary, int]:
    """The summary over complete groups, and how many they are."""
    groups = complete_groups(benchmark.items, grades)
    if not groups:
        raise BenchmarkError(
            f"{benchmark.path}: no We-Math group is complete (a problem with all its steps), so there is no score"
        )
    strict = tuple(Outcome(VALUES[group.dimension(strict=True)], group.name) for group in groups)
    rates = {**four_dimensions(groups, strict=True), **four_dimensions(groups, strict=False)}
    rates |= step_accuracies(groups) | area_accuracies(groups)
    return Summary("score_strict", strict, rates, whole=False), len(groups)


def four_dimensions(groups: Sequence[Group], *, strict: bool) -> Rates:
    """One entry: score, the shares IK, IG, CM, RM and their counts. RM is absent when no problem was solved."""
    counts: Counter[Dimension] = Counter(group.dimension(strict=strict) for group in groups)
    n = len(groups)
    rates = {"score": sum(VALUES[dimension] * count for dimension, count in counts.items()) / n, "n": float(n)}
    for dimension in ("IK", "IG", "CM"):
        rates |= {dimension: counts[dimension] / n, f"n_{dimension}": float(counts[dimension])}
    if solved := counts["CM"] + counts["RM"]:
        rates["RM"] = counts["RM"] / solved
    return {"strict" if strict else "loose": {**rates, "n_RM": float(counts["RM"])}}


def step_accuracies(groups: Sequence[Group]) -> Rates:
    """S1: steps asked alone. S2, S3: problems of two and three steps."""
    right = {
        "S1": [correct for group in groups for _, correct in group.steps],
        "S2": [group.solved for group in groups if len(group.steps) == 2],
        "S3": [group.solved for group in groups if len(group.steps) == 3],
    }
    return {
        name: {"value": sum(values) / len(values), "n": float(len(values))} for name, values in right.items() if values
    }


def area_accuracies(groups: Sequence[Group]) -> Rates:
    """Mean over an area's knowledge concepts of the accuracy of their steps; n counts the steps."""
    by_concept: dict[str, list[bool]] = defaultdict(list)
    for group in groups:
        for concept, correct in group.steps:
            by_concept[concept].append(correct)
    rates: Rates = {}
    for area, concepts in AREAS.items():
        asked = [by_concept[concept] for concept in concepts if concept in by_concept]
        if asked:
            value = sum(sum(answers) / len(answers) for answers in asked) / len(asked)
            rates[f"area: {area}"] = {"value": value, "n": float(sum(map(len, asked)))}
    return rates
