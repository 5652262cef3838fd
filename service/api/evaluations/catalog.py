"""Which benchmarks this server has: one TSV, JSON, JSONL or directory each, under settings.resolved_benchmarks.

What a benchmark is says its manifest (``vlm_dft.evaluation.provision``), or else its name: it contains mathverse,
mathvision, wemath or the name of a text benchmark, however it is written (MathVerse_MINI, we-math, gsm8k-test). Whether
its files are whole is the evaluation's business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from service.api.evaluations.requests import BenchmarkChoice
from service.api.schemas import ResponseModel
from service.errors import InvalidRequestError
from vlm_dft.config import BenchmarkConfig, BenchmarkKind

_KINDS: Final[dict[str, BenchmarkKind]] = {
    "mathverse": "mathverse",
    "mathvision": "mathvision",
    "wemath": "wemath",
    **dict.fromkeys(("math500", "gsm8k", "minerva", "olympiadbench", "aime", "amc"), "text_math"),
}
_SUFFIXES = frozenset({".tsv", ".json", ".jsonl"})
_NAME = re.compile(BenchmarkConfig.model_fields["name"].metadata[-1].pattern)


class Benchmark(ResponseModel):
    """A benchmark that evaluations can name."""

    id: str
    object: str = "benchmark"
    kind: BenchmarkKind


def find_benchmarks(directory: Path) -> dict[str, tuple[BenchmarkKind, Path]]:
    """Name -> kind and path, by name; entries whose name says no kind are none of ours."""
    found: dict[str, tuple[BenchmarkKind, Path]] = {}
    if not directory.is_dir():
        return found
    for path in sorted(directory.iterdir()):
        name = path.name if path.is_dir() else path.stem
        kind = kind_of(name)
        if kind and _NAME.fullmatch(name) and (path.is_dir() or path.suffix.lower() in _SUFFIXES):
            found[name] = (kind, path.resolve())
    return found


def kind_of(name: str) -> BenchmarkKind | None:
    """The kind whose name, or whose benchmark's name, the name contains."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((kind for part, kind in _KINDS.items() if part in plain), None)


def resolve_benchmarks(
    directory: Path, choices: Sequence[BenchmarkChoice], limit: int | None, param: str
) -> tuple[BenchmarkConfig, ...]:
    """The chosen benchmarks with their paths. Raises InvalidRequestError naming those that are there."""
    available = find_benchmarks(directory)
    by_lower_case = {name.lower(): name for name in available}
    resolved = []
    for index, choice in enumerate(choices):
        name = choice.name if choice.name in available else by_lower_case.get(choice.name.lower())
        if name is None:
            known = f"available are: {', '.join(available)}" if available else "none is available"
            place = f"{param}.{index}.name"
            message = f"{place}: there is no benchmark {choice.name!r}; {known} (its files go into {directory})"
            raise InvalidRequestError(message, param=place, code="benchmark_not_found")
        kind, path = available[name]
        resolved.append(BenchmarkConfig(name=name, kind=kind, path=path, limit=choice.limit or limit))
    return tuple(resolved)
