"""What the API reads from run directories: metrics, histograms and samples over all attempts, the trainer's log.

A run directory is written by one trainer while we read: every line that ends is whole, and nothing here locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.errors import NotFoundError
from service.jobs.tables import Attempt
from service.redaction import redacted
from vlm_dft.results import Histogram, SampleAnswer
from vlm_dft.run_dir import RunDir


def merged_metrics(attempts: Sequence[Attempt], from_step: int, to_step: int | None) -> list[dict[str, Any]]:
    """One record per step, in order of steps, each with the numbers of the newest attempt that reached it.

    A step that was redone after a crash appears once. Training, held-out and probe numbers of a step share its record.
    """
    training: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, Any]] = {}
    probed: dict[int, dict[str, Any]] = {}
    for attempt in sorted(attempts, key=lambda attempt: attempt.attempt):
        for line in RunDir(Path(attempt.run_path)).read_metrics(from_step, to_step):
            kind = held_out if "valid_nll" in line else training
            kind[line["step"]] = {**line, "attempt": attempt.attempt}
        for line in RunDir(Path(attempt.run_path)).read_accuracy(from_step, to_step):
            probed[line["step"]] = {**line, "attempt": attempt.attempt}
    kinds = (probed, held_out, training)
    steps = sorted({step for kind in kinds for step in kind})
    return [{key: value for kind in kinds for key, value in kind.get(step, {}).items()} for step in steps]


def merged_histograms(attempts: Sequence[Attempt], from_step: int, to_step: int | None) -> list[dict[str, Any]]:
    """Each histogram once, as the newest attempt measured it: by step, split (train first) and part, all at last.

    The part all is the sum of reasoning and answer; a process that was killed between the two has left none.
    """
    measured: dict[tuple[int, str], dict[str, tuple[Histogram, int]]] = {}
    for attempt in sorted(attempts, key=lambda attempt: attempt.attempt):
        for found in RunDir(Path(attempt.run_path)).read_histograms(from_step, to_step):
            measured.setdefault((found.step, found.split), {})[found.part] = (found, attempt.attempt)
    shown = []
    for key in sorted(measured):  # "train" is before "validation"
        parts = measured[key]
        shown += [_histogram(part, *parts[part]) for part in ("reasoning", "answer") if part in parts]
        if len(parts) == 2:
            shown.append(_sum_of(*shown[-2:]))
    return shown


def _histogram(part: str, found: Histogram, attempt: int) -> dict[str, Any]:
    num_bins = len(found.counts)
    return {
        "step": found.step,
        "split": "held_out" if found.split == "validation" else found.split,
        "part": part,
        "bin_edges": [number / num_bins for number in range(num_bins + 1)],
        "counts": list(found.counts),
        "num_tokens": found.num_tokens,
        "num_rows": found.num_rows,
        "attempt": attempt,
    }


def _sum_of(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    counts = [a + b for a, b in zip(one["counts"], other["counts"], strict=True)]
    return {**one, "part": "all", "counts": counts, "num_tokens": one["num_tokens"] + other["num_tokens"]}


def sample_steps(attempts: Sequence[Attempt]) -> list[int]:
    """Steps at which any attempt answered rows, in order."""
    return sorted({step for attempt in attempts for step in RunDir(Path(attempt.run_path)).sample_steps()})


def merged_samples(attempts: Sequence[Attempt], step: int) -> list[tuple[SampleAnswer, int]]:
    """Each row's answer at this step once, as the newest attempt gave it, and which one that is."""
    found: dict[str, tuple[SampleAnswer, int]] = {}
    for attempt in sorted(attempts, key=lambda attempt: attempt.attempt):
        for answer in RunDir(Path(attempt.run_path)).read_samples(step):
            found[answer.row_id] = answer, attempt.attempt
    return list(found.values())


def log_tail(attempts: Sequence[Attempt], number: int | None, tail_bytes: int) -> tuple[int | None, str]:
    """Number and log of one attempt, the newest by default; (None, "") when nothing has run yet."""
    if number is None:
        chosen = max(attempts, key=lambda attempt: attempt.attempt, default=None)
        if chosen is None:
            return None, ""
    else:
        chosen = next((attempt for attempt in attempts if attempt.attempt == number), None)
        if chosen is None:
            raise NotFoundError(f"there is no attempt {number}", param="attempt", code="attempt_not_found")
    return chosen.attempt, redacted(RunDir(Path(chosen.run_path)).log_tail(tail_bytes))
