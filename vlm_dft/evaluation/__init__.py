"""Scores on MathVerse, MathVision, We-Math, text mathematics and custom benchmarks. Torch-free until it evaluates.

items, sources            what an item is; benchmark files as records
mathverse, mathvision, wemath (+ _dimensions, _areas), text_math, custom, benchmarks
                          one kind of benchmark each: how it is read, graded and summed up
answers, options, equality, arithmetic, latex (+ _child)
                          where the answer stands, and whether it is right; no eval, no judge
grading                   from grades to a number with its standard error
runner, generation        the model's side
answering, predictions    every answer on disk, resumable
item_files                what was asked, beside the answers
backends, vlmevalkit      the same by VLMEvalKit, in its own process
comparison, report        which scores may be compared, and their table
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_dft.evaluation.comparison import comparable

if TYPE_CHECKING:
    from vlm_dft.config import EvalConfig
    from vlm_dft.results import Score
    from vlm_dft.run_dir import RunDir

__all__ = ["comparable", "evaluate"]


def evaluate(
    config: EvalConfig, run: RunDir, *, tuned: str, base: str | None, base_revision: str | None = None
) -> tuple[Score, ...]:
    """See ``vlm_dft.evaluation.backends.evaluate``."""
    from vlm_dft.evaluation import backends

    return backends.evaluate(config, run, tuned=tuned, base=base, base_revision=base_revision)
