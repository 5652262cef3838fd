"""The files of a run, and the only code that names them. Torch-free.

    RUN_DIR/
    ├── config.json            RunConfig, written by whoever starts the run
    ├── lease                  a number the supervisor keeps changing; a rank that sees no change kills itself
    ├── progress.json          Progress, replaced atomically
    ├── metrics.jsonl          StepMetrics and ValidationMetrics, one JSON object per line, flushed per line
    ├── histograms.jsonl       Histogram, two lines per dataset and measurement
    ├── accuracy.jsonl         AccuracyPoint, one line per measurement of the accuracy probe
    ├── samples.jsonl          SampleAnswer, one line per row and measurement
    ├── environment.json       packages, threads, devices and the base model's hash, once a training has ended well
    ├── reference/             what the base model makes of the targets, where the objective asks for it
    ├── log.txt                stdout and stderr of the process
    ├── checkpoints/step-000040/   renamed into place when complete; `complete.json` is in it
    ├── export/                model and processor that from_pretrained loads; export/adapter for LoRA
    ├── dataset/               canonical dataset, when the run is a validation
    ├── evaluation/<role>/<benchmark>/  predictions.jsonl, score.json
    ├── evaluation/items/<benchmark>/   items.jsonl and pictures, as they were asked
    └── result.json            RunResult, written last: its existence means that the process ended by itself

Every file but the logs appears by rename, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from vlm_dft.config import RunConfig
from vlm_dft.errors import ConfigError, DiskFullError
from vlm_dft.results import (
    AccuracyPoint,
    Histogram,
    Progress,
    RunResult,
    SampleAnswer,
    StepMetrics,
    ValidationMetrics,
)

CHECKPOINT_MARKER = "complete.json"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" into DiskFullError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no space left while writing {path}: free space on its disk and try again") from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write by temporary file, fsync and rename; on failure the old file stands and the temporary one is gone."""
    # Not the process's number: threads, and the same number on another host, may write the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: BaseModel | dict[str, Any] | list[Any]) -> None:
    """Write JSON atomically."""
    text = value.model_dump_json(indent=2) if isinstance(value, BaseModel) else json.dumps(value, indent=2)
    write_atomically(path, text.encode() + b"\n")


@contextmanager
def directory_in_place(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that is renamed to target when the block succeeds, removed when it fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(target):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            sync_tree(temporary)
            if target.exists():  # an older attempt's leftover of the same name
                shutil.rmtree(target)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _append(path: Path, record: BaseModel) -> None:
    with disk_errors(path), path.open("a") as file:
        file.write(record.model_dump_json() + "\n")


def _read_lines(path: Path, from_step: int = 0, to_step: int | None = None) -> list[dict[str, Any]]:
    """Records of these steps, both included. Steps never fall within a file, so that only the stretch is parsed: a page
    that follows a long training asks for its last steps again and again."""
    try:
        lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    except FileNotFoundError:
        return []
    first = bisect_left(lines, from_step, key=_step_of) if from_step else 0
    end = len(lines) if to_step is None else bisect_right(lines, to_step, key=_step_of)
    return [from_json(line) for line in lines[first:end]]


def _step_of(line: bytes) -> int:
    return from_json(line)["step"]


def sync_tree(directory: Path) -> None:
    """fsync every file below directory, so that a rename that follows survives a power loss."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory, step, and the numbers written with it."""

    path: Path
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunDir:
    """One run directory; see the module's tree."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def lease_path(self) -> Path:
        return self.path / "lease"

    @property
    def progress_path(self) -> Path:
        return self.path / "progress.json"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def accuracy_path(self) -> Path:
        return self.path / "accuracy.jsonl"

    @property
    def histograms_path(self) -> Path:
        return self.path / "histograms.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export_path(self) -> Path:
        return self.path / "export"

    @property
    def dataset_path(self) -> Path:
        return self.path / "dataset"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    def evaluation_path(self, role: str, benchmark: str) -> Path:
        """Directory of one benchmark's predictions and score; role is base or tuned."""
        return self.path / "evaluation" / role / benchmark.replace(":", "-")

    def items_path(self, benchmark: str) -> Path:
        """Directory of one benchmark's items and their pictures."""
        return self.evaluation_path("items", benchmark)

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_path / f"step-{step:06d}"

    def create(self, config: RunConfig) -> None:
        """Make the directory and write config.json."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config_path, config)

    def read_config(self) -> RunConfig:
        """Raises ConfigError naming the file, field and value when config.json is absent or wrong."""
        try:
            return RunConfig.model_validate_json(self.config_path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"{self.config_path} does not exist: write a RunConfig there") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{self.config_path}: {param or 'document'}: {first['msg']}", param=param) from None

    def write_lease(self, counter: int) -> None:
        """Renew the lease for the ranks; a number, because clocks of supervisor and rank may differ."""
        # Not fsynced: a lost renewal only makes the ranks die early, which is the safe side.
        temporary = self.lease_path.with_name(".lease.tmp")
        temporary.write_text(f"{counter}\n")
        temporary.replace(self.lease_path)

    def write_progress(self, progress: Progress) -> None:
        write_json(self.progress_path, progress)

    def read_progress(self) -> Progress | None:
        """None before the process wrote any."""
        try:
            return Progress.model_validate_json(self.progress_path.read_bytes())
        except FileNotFoundError:
            return None

    def write_result(self, result: RunResult) -> None:
        write_json(self.result_path, result)

    def read_result(self) -> RunResult | None:
        """None when the process has not ended by itself."""
        try:
            return RunResult.model_validate_json(self.result_path.read_bytes())
        except FileNotFoundError:
            return None

    def append_metrics(self, metrics: StepMetrics | ValidationMetrics) -> None:
        _append(self.metrics_path, metrics)

    def append_histogram(self, histogram: Histogram) -> None:
        _append(self.histograms_path, histogram)

    def append_accuracy(self, point: AccuracyPoint) -> None:
        _append(self.accuracy_path, point)

    def append_sample(self, answer: SampleAnswer) -> None:
        _append(self.samples_path, answer)

    def read_accuracy(self, from_step: int = 0, to_step: int | None = None) -> list[dict[str, Any]]:
        """Measurements of the accuracy probe, as read_metrics reads."""
        return _read_lines(self.accuracy_path, from_step, to_step)

    def read_metrics(self, from_step: int = 0, to_step: int | None = None) -> list[dict[str, Any]]:
        """Lines with from_step <= step <= to_step, in file order; a torn last line (a process killed) is left out."""
        return _read_lines(self.metrics_path, from_step, to_step)

    def read_histograms(self, from_step: int = 0, to_step: int | None = None) -> list[Histogram]:
        """The same of the histograms."""
        return [Histogram.model_validate(line) for line in _read_lines(self.histograms_path, from_step, to_step)]

    def read_samples(self, step: int) -> list[SampleAnswer]:
        """Answers at this step, in the order of the rows."""
        return [SampleAnswer.model_validate(line) for line in _read_lines(self.samples_path, step, step)]

    def sample_steps(self) -> list[int]:
        """Steps at which rows were answered, in order."""
        return sorted({line["step"] for line in _read_lines(self.samples_path)})

    def forget_after(self, step: int) -> None:
        """Take out metrics, histograms, accuracies and samples of later steps, which a resumed run makes again."""
        for path in (self.metrics_path, self.histograms_path, self.accuracy_path, self.samples_path):
            if path.exists():
                lines = [json.dumps(line) + "\n" for line in _read_lines(path, to_step=step)]
                write_atomically(path, "".join(lines).encode())

    def complete_checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        found = []
        for marker in self.checkpoints_path.glob(f"step-*/{CHECKPOINT_MARKER}"):
            try:
                record = json.loads(marker.read_bytes())
            except FileNotFoundError:  # pruned since it was listed
                continue
            found.append(Checkpoint(path=marker.parent, step=record["step"], metrics=record.get("metrics", {})))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def log_tail(self, max_bytes: int = 16384) -> str:
        """The end of log.txt, whole lines; empty when there is none."""
        try:
            with self.log_path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - max_bytes))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return text if size <= max_bytes else text[text.find("\n") + 1 :]
