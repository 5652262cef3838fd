"""The three benchmarks by name: how each is read, graded and summed up. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from vlm_dft.config import BenchmarkConfig, BenchmarkKind
from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation import mathverse, mathvision, wemath
from vlm_dft.evaluation.grading import Grade, Summary
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess


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


RULES: dict[BenchmarkKind, Rules] = {"mathverse": mathverse, "mathvision": mathvision, "wemath": wemath}


def load_benchmark(config: BenchmarkConfig, prompt: Literal["direct", "cot"]) -> Benchmark:
    """All items of the configured file, every picture's header read. Raises BenchmarkError naming the place."""
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
