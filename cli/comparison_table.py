"""A comparison as a person reads it in a terminal: arms, scores, paired differences, curves. Asks no service."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table
from rich.text import Text

from cli.client import out
from cli.sparkline import sparkline


def print_comparison(shown: dict[str, Any], curves: list[dict[str, Any]]) -> None:
    """shown: GET /v1/fine_tuning/comparisons/{id}. curves: the data of its /curves, with nll."""
    out.print(f"{shown['name']} ({shown['id']}): {shown['status']}", highlight=False, markup=False)
    out.print(_terms(shown), highlight=False)
    out.print(_arms(shown, {curve["arm"]: curve["points"] for curve in curves}))
    for benchmark in shown["benchmarks"]:
        out.print(_scores(benchmark))
        for line in map(pair_line, benchmark["pairs"]):
            out.print(f"  {line}", highlight=False, markup=False)


def _terms(shown: dict[str, Any]) -> str:
    fields = ", ".join(difference["field"] for difference in shown["differences"])
    unequal = [name for name, same in shown["terms"].items() if same is False]
    note = f"; not on equal terms: {', '.join(unequal)}" if unequal else ""
    return f"The arms differ in {fields or 'nothing'}{note}."


def _arms(shown: dict[str, Any], points: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(Column("arm", no_wrap=True), "job", "phase", "objective", "rate", "steps", box=None)
    for name in ("held-out NLL", "training NLL, step by step"):
        table.add_column(name)
    for arm in shown["arms"]:
        progress = arm["progress"] or {}
        steps = f"{progress['step']}/{progress['total_steps']}" if progress.get("total_steps") else ""
        held_out = " -> ".join(
            f"{arm[name]:.3f}" for name in ("valid_nll_before", "valid_nll_after") if arm[name] is not None
        )
        spark = sparkline([point["nll"] for point in points.get(arm["name"], []) if point.get("nll") is not None])
        rate = f"{arm['learning_rate']:g}"
        table.add_row(arm["name"], arm["job_id"], arm["phase"], arm["objective"], rate, steps, held_out, spark)
    return table


def _scores(benchmark: dict[str, Any]) -> Table:
    first = next(iter(benchmark["scores"].values()))
    subset = "" if first["whole"] else ", a subset"
    title = f"{benchmark['benchmark']} ({first['metric']}, n {first['n']}{subset}; {first['scorer']}, judge"
    table = Table(
        *benchmark["scores"],
        box=None,
        title=Text(f"{title} {first['judge']}, {first['prompt']})"),
        title_justify="left",
    )
    table.add_row(*(f"{100 * s['value']:.1f} ± {100 * s['standard_error']:.1f}" for s in benchmark["scores"].values()))
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
