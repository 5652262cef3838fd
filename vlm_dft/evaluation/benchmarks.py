"""The kinds of benchmark by name: how each is read, graded and summed up. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

from vlm_dft.config import BenchmarkConfig, BenchmarkKind
from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation import custom, mathverse, mathvision, text_math, wemath
from vlm_dft.evaluation.grading import SCORER, Grade, Summary
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess

WITH_PICTURES: frozenset[BenchmarkKind] = frozenset({"mathverse", "mathvision", "wemath"})
"""Kinds that only a vision model can answer; a custom benchmark may be either."""


class Rules(Protocol):
    """What a benchmark's module offers."""

    NAMES: tuple[str, ...]
    """What its file is usually called, VLMEvalKit's name first."""

    @staticmethod
    def load(path: Path, prompt: Literal["direct", "cot"]) -> Benchmark: ...

    @staticmethod
    def grade(item: Item, response: str, latex: LatexProcess) -> Grade: ...

    @staticmethod
    def summarize(benchmark: Benchmark, grades: Mapping[str, Grade]) -> Summary: ...


RULES: dict[BenchmarkKind, Rules] = {
    "mathverse": mathverse,
    "mathvision": mathvision,
    "wemath": wemath,
    "text_math": text_math,
    "custom": custom,
}


def scorer_of(kind: BenchmarkKind) -> str:
    """Name and version of the rules that grade this kind."""
    return f"math-verify/{version('math-verify')}" if kind == "text_math" else SCORER


def load_benchmark(config: BenchmarkConfig, prompt: Literal["direct", "cot"]) -> Benchmark:
    """All items of the configured file, every picture's header read. Raises BenchmarkError naming the place."""
    if config.kind == "custom":
        benchmark = custom.load(config.path, prompt, config.scoring)
    else:
        benchmark = RULES[config.kind].load(config.path, prompt)
    seen: set[str] = set()
    for item in benchmark.items:
        if item.id in seen:
            raise BenchmarkError(
                f"{benchmark.path}: the item id {item.id!r} comes twice: answers could not be told apart"
            )
        seen.add(item.id)
        if item.picture is not None:
            item.picture.size()
    return benchmark
