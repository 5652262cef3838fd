"""A comparison as a person reads it in a terminal: arms, curves, scores, paired differences, sweep. Asks no service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from cli.client import out
from cli.sparkline import sparkline

_CURVE_WIDTH = 20
_MANY_PAIRS = 5
_SETTINGS = {"objective": "objective", "learning_rate": "rate", "batch_size": "batch", "seed": "seed"}
_UNLIKE = {
    "same_data": "rows",
    "same_order": "order of samples (seed or batch size)",
    "same_steps": "number of steps",
    "same_evaluation": "evaluation",
}


def print_comparison(shown: dict[str, Any], curves: list[dict[str, Any]]) -> None:
    """shown: GET /v1/fine_tuning/comparisons/{id}. curves: the data of its /curves, with nll."""
    out.print(f"{shown['name']} ({shown['id']}): {shown['status']}", highlight=False, markup=False)
    out.print(_terms(shown), highlight=False)
    out.print(_arms(shown))
    nll = {each["arm"]: [point["nll"] for point in each["points"] if point.get("nll") is not None] for each in curves}
    out.print("job, and raw training NLL step by step:")
    for arm in shown["arms"]:
        line = f"  {arm['name']}  {arm['job_id']}  {sparkline(nll.get(arm['name'], []), _CURVE_WIDTH)}"
        out.print(line.rstrip(), highlight=False, markup=False)
    for benchmark in shown["benchmarks"]:
        out.print(_scores(benchmark))
        for line in map(pair_line, benchmark["pairs"]):
            out.print(f"  {line}", highlight=False, markup=False)
        if len(benchmark["pairs"]) >= _MANY_PAIRS:
            out.print(f"  of {len(benchmark['pairs'])} pairs that are equal, 5 % would seem told apart by chance")
    if any(len(cell["arms"]) > 1 for cell in shown["sweep"]):
        out.print(_sweep(shown["sweep"]))


def _terms(shown: dict[str, Any]) -> str:
    fields = ", ".join(difference["field"] for difference in shown["differences"])
    unlike = [text for name, text in _UNLIKE.items() if shown["terms"].get(name) is False]
    note = f" Not alike in all of them: {', '.join(unlike)}." if unlike else ""
    return f"The arms differ in {fields or 'nothing'}.{note}"


def _arms(shown: dict[str, Any]) -> Table:
    """Settings in which no arm differs are left out: a terminal is narrow."""
    arms = shown["arms"]
    differing = [name for name in _SETTINGS if len({arm[name] for arm in arms}) > 1]
    settings = [Column(_SETTINGS[name], justify="right") for name in differing]
    table = Table(Column("arm", no_wrap=True), "phase", *settings, Column("steps", justify="right"), box=None)
    table.add_column("held-out NLL")
    for arm in arms:
        held_out = " -> ".join(
            f"{arm[name]:.3f}" for name in ("valid_nll_before", "valid_nll_after") if arm[name] is not None
        )
        shown_settings = [f"{arm[name]:g}" if isinstance(arm[name], float) else str(arm[name]) for name in differing]
        table.add_row(arm["name"], arm["phase"], *shown_settings, _steps(arm), held_out)
    return table


def _steps(arm: dict[str, Any]) -> str:
    progress = arm["progress"] or {}
    if progress.get("total_steps"):
        return f"{progress['step']}/{progress['total_steps']}"
    return "" if arm["steps"] is None else str(arm["steps"])


def _scores(benchmark: dict[str, Any]) -> Table:
    first = next(iter(benchmark["scores"].values()))
    subset = "" if first["whole"] else ", a subset"
    title = f"{benchmark['benchmark']} ({first['metric']}, n {first['n']}{subset}; {first['scorer']}, judge"
    table = Table(
        "arm",
        Column("percent", justify="right"),
        box=None,
        title=Text(f"{title} {first['judge']}, {first['prompt']})"),
        title_justify="left",
    )
    for arm, score in benchmark["scores"].items():
        table.add_row(arm, f"{100 * score['value']:.1f} ± {100 * score['standard_error']:.1f}")
    return table


def pair_line(pair: dict[str, Any]) -> str:
    """One arm against the reference in words."""
    if pair["refused"]:
        return f"{pair['arm']} and {pair['reference']} must not be compared: {pair['refused']}"
    points = " to ".join(f"{100 * pair[name]:+.1f}" for name in ("low", "high"))
    mcnemar = "" if pair["mcnemar_p"] is None else f", McNemar p {pair['mcnemar_p']:.2g}"
    told = "" if pair["told_apart"] else ": not told apart"
    flips = f"{pair['fixed']} items fixed, {pair['broken']} broken"
    return (
        f"{pair['arm']} against {pair['reference']}: {100 * pair['difference']:+.1f} points ({points}), {flips}; "
        f"permutation p {pair['permutation_p']:.2g}{mcnemar}{told}"
    )


def _sweep(cells: list[dict[str, Any]]) -> Table:
    """Means over seeds, with their standard deviation, of what was measured at all; scores in percent."""
    numbers = [Column(name, justify="right") for name in ("rate", "batch", "seeds", "mean ± sd")]
    table = Table("over seeds", "objective", *numbers, box=None)
    for cell in sorted(cells, key=lambda cell: cell["value"] != "valid_nll_after"):
        if cell["mean"] is not None:
            scale, digits, unit = (1, 3, "") if cell["value"] == "valid_nll_after" else (100, 1, " %")
            found = [cell["mean"], cell["standard_deviation"]]
            shown = " ± ".join(f"{scale * number:.{digits}f}" for number in found if number is not None)
            settings = (f"{cell['learning_rate']:g}", str(cell["batch_size"]), f"{cell['n']} of {len(cell['arms'])}")
            options = [f"{name} {value:g}" for name, value in _numbers(cell["options"])]
            table.add_row(cell["value"], " ".join([cell["objective"], *options]), *settings, shown + unit)
    return table


def _numbers(options: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Those that are set to something other than nothing."""
    return ((name, value) for name, value in options.items() if isinstance(value, int | float) and value)
