"""Predictions on disk, kept as they are generated. Torch-free.

    evaluation/<role>/<benchmark>/
    ├── identity.json          what generated them: model hash, items, settings
    ├── predictions.jsonl      one Prediction per line, appended and fsynced batch by batch
    └── score.json             Score

``kill -9`` loses at most the batch in flight, and a rerun generates only what is missing. Predictions of another model
or other settings are set aside under another name, never mixed and never deleted. Knows nothing about models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlm_dft.errors import EvaluationError
from vlm_dft.evaluation.answers import Rule
from vlm_dft.results import Record
from vlm_dft.run_dir import disk_errors, write_json

PREDICTIONS_NAME = "predictions.jsonl"
IDENTITY_NAME = "identity.json"
SCORE_NAME = "score.json"


class Prediction(Record):
    """One line of predictions.jsonl: one item asked, answered and graded."""

    id: str
    """The item's."""
    prompt: str
    """What was asked beside the picture."""
    prediction: str
    """What the model wrote, special tokens left out."""
    extracted: str | None
    """The answer that was compared; None when no rule found one."""
    rule: Rule
    """Which rule found it (``vlm_dft.evaluation.answers``)."""
    answer: str
    """The reference."""
    correct: bool
    finish_reason: Literal["stop", "length", "error"]
    """stop: the model ended its turn. length: max_new_tokens came first. error: nothing could be generated."""
    num_generated_tokens: int
    """The end-of-turn token included."""
    error: str | None = None
    """Why nothing was generated."""

    @property
    def failed(self) -> bool:
        """No usable generation: an error, or an empty text."""
        return self.finish_reason == "error" or not self.prediction.strip()


@dataclass
class PredictionLog:
    """The predictions of one model on one benchmark."""

    directory: Path
    done: dict[str, Prediction]
    """By item id, in the order they were written."""

    @classmethod
    def open(cls, directory: Path, identity: dict[str, Any], earlier: Iterable[Path] = ()) -> PredictionLog:
        """Continue what directory holds if the same identity wrote it, else the first of earlier, else start anew."""
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        log = cls(directory, {})
        if _read_identity(directory) == identity:
            log.done = _read(directory / PREDICTIONS_NAME)
            _cut_torn_line(directory / PREDICTIONS_NAME)
            return log
        _set_aside(directory)
        write_json(directory / IDENTITY_NAME, identity)
        for found in earlier:
            if _read_identity(found) == identity:
                log.append(list(_read(found / PREDICTIONS_NAME).values()))
                break
        return log

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Write and fsync. Raises DiskFullError."""
        path = self.directory / PREDICTIONS_NAME
        lines = "".join(prediction.model_dump_json() + "\n" for prediction in predictions)
        with disk_errors(path), path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done |= {prediction.id: prediction for prediction in predictions}


def read_predictions(directory: Path) -> list[Prediction]:
    """All complete predictions of one model on one benchmark, for whoever pages through them."""
    return list(_read(directory / PREDICTIONS_NAME).values())


def _read_identity(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / IDENTITY_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EvaluationError(f"{directory / IDENTITY_NAME} is not JSON ({error}): remove the directory") from None


def _read(path: Path) -> dict[str, Prediction]:
    """Complete lines; a torn last line (a process killed while writing) is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    predictions = {}
    for number, line in enumerate(lines, start=1):
        try:
            prediction = Prediction.model_validate_json(line)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise EvaluationError(f"{path}: line {number} is not a prediction ({reason}): remove the file") from None
        predictions[prediction.id] = prediction
    return predictions


def _cut_torn_line(path: Path) -> None:
    if path.is_file() and (end := path.read_bytes().rfind(b"\n") + 1) != path.stat().st_size:
        os.truncate(path, end)


def _set_aside(directory: Path) -> None:
    path = directory / PREDICTIONS_NAME
    if path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        path.rename(directory / f"predictions.{digest}.jsonl")
    (directory / SCORE_NAME).unlink(missing_ok=True)
