"""`vlm-dft items`: what a model answered, item by item, beside the model before; as the dashboard's page of items."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from cli.client import AsJson, connect, get, out, print_json, readable_errors

_FLIPS = ("fixed", "broken", "both_right", "both_wrong")
_SHOWN_CHARACTERS = 400


def items(
    job_id: Annotated[str, typer.Argument(help="eval-..., or a ftjob-... that evaluates.")],
    benchmark: Annotated[str | None, typer.Option(help="Default: the first one.")] = None,
    flip: Annotated[str | None, typer.Option(help=f"Only these: {', '.join(_FLIPS)}.")] = None,
    correct: Annotated[bool | None, typer.Option("--right/--wrong", help="Only right, or only wrong answers.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Stands in question, reference or answer.")] = None,
    against: Annotated[str | None, typer.Option(help="Another job, whose model stands in the base's place.")] = None,
    after: Annotated[str | None, typer.Option(help="Go on after this one, item-20.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 10,
    as_json: AsJson = False,
) -> None:
    """Print answers, what was extracted of them, and what the training has fixed or broken."""
    asked = {"benchmark": benchmark, "flip": flip, "q": text, "against": against, "after": after}
    asked |= {} if correct is None else {"correct": str(correct).lower()}
    given = {name: value for name, value in asked.items() if value is not None}
    with readable_errors():
        page = get(connect(), f"/evaluations/{job_id}/items", limit=limit, **given)
    if as_json:
        print_json(page)
        return
    counts = page["counts"]
    flips = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in _FLIPS if counts[name])
    out.print(f"{counts['correct']} of {counts['total']} right{f'; {flips}' if flips else ''}", highlight=False)
    for item in page["data"]:
        _print(item)
    if page["has_more"]:
        out.print(f"\nmore: --after {page['last_id']}", highlight=False)


def _print(item: dict[str, Any]) -> None:
    """One item: question, options, reference, and each model's answer."""
    kind = (item["flip"] or ("right" if item["correct"] else "wrong")).replace("_", " ")
    out.print(Text.assemble("\n", (item["item_id"], "bold"), f"  {kind}  ({item['id']}, sample {item['sample']})"))
    out.print(Text(f"  {item['question'] or item['prediction']['prompt']}"))
    for letter, option in item["options"].items():
        out.print(Text(f"    {letter}: {option}"))
    out.print(Text(f"  reference: {item['prediction']['answer']}"))
    for label, side in (("before", item["before"]), ("now", item["prediction"])):
        if side:
            style = "green" if side["correct"] else "red"
            extracted = "no answer found" if side["extracted"] is None else side["extracted"]
            out.print(Text.assemble(f"  {label}: ", (extracted, style), f"  of {_shown(side['prediction'])}"))


def _shown(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    return f"{text[:_SHOWN_CHARACTERS]!r}... ({len(text)} characters; --json has all)"
