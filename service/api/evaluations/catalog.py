"""Which benchmarks this server has, as clients name them (``vlm_dft.evaluation.provision``).

Whether a benchmark's files are whole is the evaluation's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from service.api.evaluations.requests import BenchmarkChoice
from service.api.schemas import ResponseModel
from service.errors import InvalidRequestError
from vlm_dft.config import BenchmarkConfig, BenchmarkKind
from vlm_dft.evaluation.provision import Found, find_benchmarks, where_it_goes


class Benchmark(ResponseModel):
    """A benchmark that evaluations can name."""

    id: str
    object: str = "benchmark"
    kind: BenchmarkKind
    items: int | None
    """None: not known before it is read."""
    published: bool | None
    """Whether it is VLMEvalKit's file, by its md5; None: not checked, or VLMEvalKit publishes none of this name."""


def show_benchmark(name: str, found: Found) -> Benchmark:
    manifest = found.manifest
    return Benchmark(
        id=name,
        kind=found.kind,
        items=manifest.items if manifest else None,
        published=manifest.published if manifest else None,
    )


def resolve_benchmarks(
    directory: Path, choices: Sequence[BenchmarkChoice], limit: int | None, param: str
) -> tuple[BenchmarkConfig, ...]:
    """The chosen benchmarks with their paths. Raises InvalidRequestError naming those that are there."""
    available = find_benchmarks(directory)
    return tuple(
        resolve_benchmark(available, directory, choice, choice.limit or limit, f"{param}.{index}.name")
        for index, choice in enumerate(choices)
    )


def resolve_benchmark(
    available: Mapping[str, Found], directory: Path, choice: BenchmarkChoice, limit: int | None, param: str
) -> BenchmarkConfig:
    """One of them; names are taken in any case."""
    by_lower_case = {name.lower(): name for name in available}
    name = choice.name if choice.name in available else by_lower_case.get(choice.name.lower())
    if name is None:
        known = f"available are: {', '.join(available)}" if available else "none is available"
        remedy = where_it_goes(choice.name, directory)
        message = f"{param}: there is no benchmark {choice.name!r}; {known}; {remedy}"
        raise InvalidRequestError(message, param=param, code="benchmark_not_found")
    return available[name].config(name, limit)
