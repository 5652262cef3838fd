"""A preflight's report as a person reads it in a terminal: the verdict, its reasons, its evidence. Asks no service."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from cli.client import out
from cli.sparkline import bars


def print_report(report: dict[str, Any]) -> None:
    """Verdict and reasons first, the evidence below."""
    verdict = report["verdict"]
    too_long = f", {report['num_rows_too_long']} are too long for it" if report["num_rows_too_long"] else ""
    rest = f"  ({verdict['rule']}; {report['num_rows']} of {report['num_rows_total']} rows looked at{too_long})"
    out.print(Text.assemble((verdict["label"], "bold green"), rest))
    for reason in verdict["reasons"]:
        out.print(Text(f"  {reason}"))
    for change in verdict["would_change"]:
        out.print(Text(f"  would change it: {change}"))
    table = Table("part", "tokens", "mean p", "p<0.01", "p<0.1", "entropy", "DFT discards", "0 .. p .. 1", box=None)
    for part in report["parts"]:
        if part["num_tokens"]:
            shares = [part[name] for name in ("mean_p", "share_p_below_001", "share_p_below_01", "entropy")]
            cells = [f"{share:.3f}" for share in shares]
            discards = "" if part["dft_discards"] is None else f"{part['dft_discards']:.0%}"
            table.add_row(part["part"], str(part["num_tokens"]), *cells, discards, bars(part["counts"]))
    out.print(table)
    for limit in verdict["limits"]:
        out.print(Text(limit, "dim"))
