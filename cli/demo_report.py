"""The demo's table and its one sentence: who won, by how much, and what that is worth. Knows no service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cli.client import out
from cli.comparison_table import pair_line
from vlm_dft.errors import VlmDftError
from vlm_dft.evaluation.report import difference
from vlm_dft.results import Score

CLEAR_ERRORS = 3.0
"""Standard errors by which a tuned model must be above chance for the demo to have shown anything."""
NOISE_ERRORS = 2.0
"""A difference of fewer standard errors is called noise."""
_WIDTH = 200
"""Wider than a terminal that is none: a table whose cells wrap cannot be read."""


class NothingLearnedError(VlmDftError):
    """A tuned model is not clearly above chance: the demo has shown nothing."""


@dataclass(frozen=True)
class Demo:
    """The three jobs and the comparison as the service shows them, and what blind guessing scores per benchmark."""

    start: dict[str, Any]
    sft: dict[str, Any]
    dft: dict[str, Any]
    comparison: dict[str, Any]
    chance: dict[str, float]


def show(demo: Demo) -> None:
    """Print the table and the sentence. Raises NothingLearnedError."""
    models = {
        "base (random)": _scores(demo.start, "base"),
        "start = base+SFT": _scores(demo.start, "tuned"),
        "start + SFT": _scores(demo.sft, "tuned"),
        "start + DFT": _scores(demo.dft, "tuned"),
    }
    jobs = [None, demo.start, demo.sft, demo.dft]
    nll = [demo.start["result"]["valid_nll_before"], *(job["result"]["valid_nll_after"] for job in jobs if job)]
    table = Table(box=box.MARKDOWN)
    n = sum(score.n for score in models["start + SFT"].values())
    benchmarks = (name.removeprefix("demo-") for name in demo.chance)
    for name in ("model", *benchmarks, f"right of {n}", "NLL", "train + score"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    table.add_row("chance", *(f"{100 * value:.1f}" for value in demo.chance.values()), "", "", "")
    for (label, scores), job, loss in zip(models.items(), jobs, nll, strict=True):
        table.add_row(
            label, *(_percent(scores[name]) for name in demo.chance), _right(scores), f"{loss:.3f}", _time(job)
        )
    Console(width=_WIDTH).print(table)
    pairs = [pair for benchmark in demo.comparison["benchmarks"] for pair in benchmark["pairs"] if pair["arm"] == "dft"]
    names = [benchmark["benchmark"] for benchmark in demo.comparison["benchmarks"]]
    paired = [f"{name}: {pair_line(pair)}" for name, pair in zip(names, pairs, strict=True)]
    for line in (
        *_notes(models),
        "",
        "Item by item (95 % paired bootstrap over groups of items):",
        *paired,
        "",
        verdict(models["start + SFT"], models["start + DFT"]),
    ):
        out.print(line, highlight=False, soft_wrap=True, markup=False)
    _check_learned(models, demo.chance)


def _scores(job: dict[str, Any], role: str) -> dict[str, Score]:
    scores = [Score.model_validate(score) for score in job["scores"]]
    return {score.benchmark: score for score in scores if score.model_role == role}


def items_right(score: Score) -> tuple[int, int]:
    """(right answers, items), of the benchmark's own categories where its score is not simply their share."""
    rates = score.by_category
    if score.kind == "mathverse":
        parts = [rate for name, rate in rates.items() if name.startswith("version: ") and ";" not in name]
    elif score.kind == "wemath":
        parts = [rates[name] for name in ("S1", "S2")]
    else:
        parts = [{"value": score.value, "n": score.denominator}]
    right, n = (round(sum(value)) for value in zip(*((p["value"] * p["n"], p["n"]) for p in parts), strict=True))
    assert n == score.n, f"{score.benchmark}: categories hold {n} of {score.n} items"
    return right, n


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} ± {100 * score.standard_error:.1f}"


def _right(scores: dict[str, Score]) -> str:
    right, n = (sum(counts) for counts in zip(*map(items_right, scores.values()), strict=True))
    return f"{right} = {100 * right / n:.1f}"


def _time(job: dict[str, Any] | None) -> str:
    if job is None:
        return ""
    trained, scored = job["result"]["wall_seconds"], sum(score["wall_seconds"] for score in job["scores"])
    return f"{trained:.0f} s + {scored:.0f} s"


def _notes(models: dict[str, dict[str, Score]]) -> list[str]:
    """What the numbers are, and what they are not."""
    scores = [score for by_name in models.values() for score in by_name.values()]
    metrics = dict.fromkeys(f"{score.benchmark} {score.metric}" for score in scores)
    ways = dict.fromkeys(f"scored by {s.scorer}, judge {s.judge}, prompt {s.prompt}" for s in scores)
    whole = (
        "whole published benchmarks"
        if all(score.whole for score in scores)
        else ("generated problems in the benchmarks' forms, not the published benchmarks")
    )
    return [
        f"Percent ± one standard error; {'; '.join(ways)}; {whole}.",
        f"Metrics: {', '.join(metrics)}. Right counts every item; NLL is held-out and raw, whatever the objective.",
    ]


def verdict(sft: dict[str, Score], dft: dict[str, Score]) -> str:
    """Which of the two is ahead on the mean of the benchmarks, by how much, and whether that is more than noise."""
    differences = [difference(sft[name], dft[name]) for name in sft]
    mean = sum(value for value, _ in differences) / len(differences)
    error = sum(error**2 for _, error in differences) ** 0.5 / len(differences)
    size = f"{abs(mean):.1f} points of the mean score (standard error at most {error:.1f})"
    if abs(mean) < NOISE_ERRORS * error:
        ahead = "ahead" if mean else "apart"
        return f"SFT and DFT are not told apart here: {'DFT' if mean > 0 else 'SFT'} is {ahead} by {size}."
    winner, loser = ("DFT", "SFT") if mean > 0 else ("SFT", "DFT")
    return f"{winner} wins here: it is ahead of {loser} by {size}."


def _check_learned(models: dict[str, dict[str, Score]], chance: dict[str, float]) -> None:
    """Each tuned model's mean score must be clearly above chance and base; one benchmark's few groups prove little."""
    base, *tuned = models.items()
    floor = max(_mean(chance.values()), _mean(score.value for score in base[1].values()))
    for label, scores in tuned:
        mean = _mean(score.value for score in scores.values())
        error = sum(score.standard_error**2 for score in scores.values()) ** 0.5 / len(scores)
        if mean - CLEAR_ERRORS * error <= floor:
            raise NothingLearnedError(
                f"{label} scores {mean:.3f} ± {error:.3f} on average: "
                f"not clearly above {floor:.3f}, the better of chance and base"
            )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
