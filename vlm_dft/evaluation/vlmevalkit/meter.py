"""Progress of VLMEvalKit's process, read off its answer logs. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from vlm_dft.evaluation.vlmevalkit.answer_log import num_answers
from vlm_dft.results import Progress
from vlm_dft.run_dir import RunDir


class Meter:
    """Tells the run's progress whenever an answer was added. logs: benchmark, its answer log, how many it will hold."""

    def __init__(self, run: RunDir, logs: Sequence[tuple[str, Path, int]]) -> None:
        self._run, self._logs = run, logs
        self._counts = self._first = [num_answers(path) for _, path, _ in logs]
        self._began = time.monotonic()

    def tell(self) -> None:
        """Write progress.json if there is news."""
        counts = [num_answers(path) for _, path, _ in self._logs]
        if counts == self._counts:
            return
        self._counts = counts
        ongoing = (position for position, (_, _, total) in enumerate(self._logs) if counts[position] < total)
        position = next(ongoing, len(counts) - 1)
        name, _, total = self._logs[position]
        progress = Progress(
            phase="evaluating",
            benchmark=name,
            items_done=min(counts[position], total),
            items_total=total,
            seconds_remaining=self._seconds_remaining(position),
        )
        self._run.write_progress(progress)

    def _seconds_remaining(self, position: int) -> float | None:
        """Of this benchmark, at the pace of all answers since the start, loading included."""
        answered = sum(self._counts) - sum(self._first)
        if answered == 0:
            return None
        left = max(0, self._logs[position][2] - self._counts[position])
        return (time.monotonic() - self._began) / answered * left
