"""`vlm-dft eval`: score a model on benchmarks, by one backend or by both side by side, through the openai client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args

import openai
import typer
from rich.markup import escape
from rich.table import Table

from cli.client import EXIT_FAILED, AsJson, connect, get, messages, out, post, print_error, print_json, readable_errors
from cli.requests import benchmark_list
from cli.watch import at_its_end
from vlm_dft.config import Backend
from vlm_dft.results import Score

BOTH = "both"
BACKENDS = ("vlmevalkit", "native")
"""Of ``both``. VLMEvalKit's first: what it cannot score is refused before anything is queued."""
SHOWN_DIFFERENCES = 20
_SHOWN_CHARACTERS = 40
_POLL_SECONDS = 1.0
_PAGE = 100


class Verdict(NamedTuple):
    """One backend's prediction, as it is compared with the other's."""

    text: str
    extracted: str | None
    correct: bool
    reference: str

    def __str__(self) -> str:
        answer = "(none)" if self.extracted is None else self.extracted
        return f"{'right' if self.correct else 'wrong'}: {_short(answer)}"


def evaluate(
    model: Annotated[str, typer.Argument(help="Model name, as `vlm-dft models` lists it.")],
    benchmarks: Annotated[str, typer.Option(help="Comma-separated names.")] = "mathverse,mathvision,wemath",
    limit: Annotated[int | None, typer.Option(help="Only the first items; the score is marked as a subset.")] = None,
    backend: Annotated[str, typer.Option(help="auto, native, vlmevalkit, or both side by side.")] = "auto",
    judge: Annotated[bool, typer.Option("--judge", help="Let the server's judge decide what rules cannot.")] = False,
    prompt: Annotated[str, typer.Option(help="direct or cot.")] = "direct",
    samples: Annotated[int | None, typer.Option(help="k answers per item: average@k and pass@k.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers generated at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the samples.")] = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow to the end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Score a model on benchmarks. With --json the evaluation, or for both backends an object of the two by backend."""
    if backend not in (*get_args(Backend), BOTH):
        raise typer.BadParameter(f"--backend takes {', '.join(get_args(Backend))} or {BOTH}, not {backend!r}")
    given = {
        "samples_per_item": samples,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    body = {"model": model, "benchmarks": benchmark_list(benchmarks, limit), "prompt": prompt, "judge": judge}
    body |= {name: value for name, value in given.items() if value is not None}
    with readable_errors():
        client = connect()
        made = {}
        for name in BACKENDS if backend == BOTH else (backend,):
            made[name] = post(client, "/evaluations", {**body, "backend": name})
            messages(as_json).print(f"evaluation {made[name]['id']}", highlight=False)
        if watch:
            made = {name: at_its_end(client, job["id"], _POLL_SECONDS, quiet=as_json) for name, job in made.items()}
        if as_json:
            print_json(made if backend == BOTH else made[backend])
        elif len(made) == 2 and all(job["scores"] for job in made.values()):
            print_side_by_side(client, made)
    if watch and any(job["status"] != "succeeded" for job in made.values()):
        raise typer.Exit(EXIT_FAILED)


def print_side_by_side(client: openai.OpenAI, evaluations: dict[str, dict[str, Any]]) -> None:
    """Both backends' scores, and each item on which they differ. evaluations: backend -> the ended evaluation."""
    from vlm_dft.evaluation.report import score_table

    columns = {name: [Score.model_validate(score) for score in job["scores"]] for name, job in evaluations.items()}
    out.print("\n" + score_table(columns, categories=True), highlight=False, markup=False)
    for name in next(iter(evaluations.values()))["benchmarks"]:
        verdicts = {backend: dict(verdicts_of(client, job["id"], name)) for backend, job in evaluations.items()}
        print_differences(name, verdicts)


def print_differences(benchmark: str, verdicts: dict[str, dict[str, Verdict]]) -> None:
    """verdicts: backend -> item and sample -> its prediction."""
    (first_name, first), (second_name, second) = verdicts.items()
    if first.keys() != second.keys():
        print_error(f"{benchmark}: the two answered different items")
        return
    pairs = {key: (first[key], second[key]) for key in first}
    same_text = sum(one.text == other.text for one, other in pairs.values())
    differing = {key: pair for key, pair in pairs.items() if pair[0].correct != pair[1].correct}
    out.print(
        f"{benchmark}: {len(pairs)} predictions, {same_text} of the same text, "
        f"{len(pairs) - len(differing)} of the same verdict",
        highlight=False,
        markup=False,
    )
    if not differing:
        return
    table = Table("item", "reference", first_name, second_name, box=None)
    for key, (one, other) in list(differing.items())[:SHOWN_DIFFERENCES]:
        table.add_row(*(escape(text) for text in (key, _short(one.reference), str(one), str(other))))
    out.print(table)
    if len(differing) > SHOWN_DIFFERENCES:
        out.print(f"and {len(differing) - SHOWN_DIFFERENCES} more", highlight=False)


def verdicts_of(client: openai.OpenAI, evaluation_id: str, benchmark: str) -> Iterator[tuple[str, Verdict]]:
    """Every prediction of one benchmark, page by page, by item and sample."""
    after: dict[str, str] = {}
    while True:
        page = get(client, f"/evaluations/{evaluation_id}/items", benchmark=benchmark, limit=_PAGE, **after)
        for row in page["data"]:
            found = row["prediction"]
            key = row["item_id"] if row["sample"] == 0 else f"{row['item_id']}, sample {row['sample']}"
            yield key, Verdict(found["prediction"], found["extracted"], row["correct"], found["answer"])
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
