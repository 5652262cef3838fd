"""What is new in a run directory since the last look: metrics lines, progress, checkpoints.

Reads only what was appended, so a run of days costs no more per look than its first minute. Knows no database: whoever
stores the news calls ``keep`` afterwards, and until then each look repeats it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlm_dft.results import Progress
from vlm_dft.run_dir import Checkpoint, RunDir

_MAX_BYTES_PER_LOOK = 4 * 2**20


@dataclass(frozen=True)
class News:
    """What one look found."""

    metrics: list[dict[str, Any]]
    """New lines of metrics.jsonl."""
    progress: Progress | None
    """The newest progress, whether or not it was seen before."""
    checkpoints: list[Checkpoint]
    """Complete checkpoints that were not there before."""
    steps: frozenset[int]
    """Steps of all complete checkpoints now."""
    offset: int
    """Bytes of metrics.jsonl that were read."""
    steps_changed: bool
    """Whether a checkpoint came or went."""
    is_new: bool
    """Whether anything came or went."""


class Follower:
    """Follows one run directory."""

    def __init__(self, run: RunDir, counts: Callable[[Checkpoint], bool] = lambda _: True) -> None:
        """counts: whether a complete checkpoint is to be told of yet."""
        self.run = run
        self._counts = counts
        self._offset = 0
        self._progress: Progress | None = None
        self._steps: frozenset[int] = frozenset()

    def look(self) -> News:
        """Read what was added since the last news that was kept."""
        metrics, offset = self._read_metrics()
        progress = self.run.read_progress()
        checkpoints = [checkpoint for checkpoint in self.run.complete_checkpoints() if self._counts(checkpoint)]
        steps = frozenset(checkpoint.step for checkpoint in checkpoints)
        return News(
            metrics=metrics,
            progress=progress,
            checkpoints=[checkpoint for checkpoint in checkpoints if checkpoint.step not in self._steps],
            steps=steps,
            offset=offset,
            steps_changed=steps != self._steps,
            is_new=bool(metrics) or progress != self._progress or steps != self._steps,
        )

    def keep(self, news: News) -> None:
        """The news is stored: do not tell it again."""
        self._offset, self._progress, self._steps = news.offset, news.progress, news.steps

    def _read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        try:
            with self.run.metrics_path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_MAX_BYTES_PER_LOOK)
        except FileNotFoundError:
            return [], self._offset
        whole = data[: data.rfind(b"\n") + 1]  # the rest of a line comes with the next look
        return [json.loads(line) for line in whole.splitlines() if line], self._offset + len(whole)
