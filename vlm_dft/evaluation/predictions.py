"""Predictions on disk, kept as they are generated. Torch-free.

    evaluation/<role>/<benchmark>/
    ├── identity.json          what generated them: model hash, items, settings
    ├── predictions.jsonl      one Prediction per line, appended and fsynced batch by batch
    └── score.json             Score

``kill -9`` loses at most the batch in flight, and a rerun generates only what is missing. Predictions of another model
or other settings are set aside under another name, never mixed and never deleted; those that were only graded in
another way are graded again. Knows nothing about models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlm_dft.errors import EvaluationError
from vlm_dft.evaluation.answers import Rule
from vlm_dft.evaluation.grading import Grade
from vlm_dft.evaluation.judge import JudgeReply
from vlm_dft.results import Record
from vlm_dft.run_dir import disk_errors, write_atomically, write_json

PREDICTIONS_NAME = "predictions.jsonl"
IDENTITY_NAME = "identity.json"
SCORE_NAME = "score.json"


GRADING = ("scorer", "judge")
"""Parts of an identity that decide grades, not answers."""


class Prediction(Record):
    """One line of predictions.jsonl: one item asked, answered and graded."""

    id: str
    """The item's."""
    sample: int = 0
    """Which of the answers to the item, where it is answered several times."""
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
    judged: tuple[JudgeReply, ...] = ()
    """What a judge said; empty where rules decided."""

    @property
    def key(self) -> str:
        """Unique in the file."""
        return sample_id(self.id, self.sample)

    @property
    def grade(self) -> Grade:
        return Grade(self.extracted, self.rule, self.correct)

    def graded(self, grade: Grade, judged: tuple[JudgeReply, ...] = ()) -> Prediction:
        """The same answer, with this grade."""
        update = {"extracted": grade.extracted, "rule": grade.rule, "correct": grade.correct, "judged": judged}
        return self.model_copy(update=update)

    @property
    def failed(self) -> bool:
        """No usable generation: an error, or an empty text."""
        return self.finish_reason == "error" or not self.prediction.strip()


def sample_id(item_id: str, sample: int) -> str:
    """Name of one answer among several to an item; the first has the item's own."""
    return f"{item_id}#{sample}" if sample else item_id


@dataclass
class PredictionLog:
    """The predictions of one model on one benchmark."""

    directory: Path
    done: dict[str, Prediction]
    """By ``Prediction.key``, in the order they were written."""

    @classmethod
    def open(
        cls,
        directory: Path,
        identity: dict[str, Any],
        earlier: Iterable[Path] = (),
        regrade: Callable[[Prediction], Prediction] = lambda prediction: prediction,
    ) -> PredictionLog:
        """Continue what directory holds if the same identity wrote it, else the first of earlier, else start anew.

        regrade: grades an answer as identity says; called where the answers fit and their grades do not.
        """
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        log = cls(directory, {})
        here = _read_identity(directory)
        if here == identity:
            log.done = _read(directory / PREDICTIONS_NAME)
            _cut_torn_line(directory / PREDICTIONS_NAME)
            return log
        found = next((path for path in (directory, *earlier) if _same_answers(_read_identity(path), identity)), None)
        predictions = list(_read(found / PREDICTIONS_NAME).values()) if found else []
        if found and _read_identity(found) != identity:
            predictions = [regrade(prediction) for prediction in predictions]
        _set_aside(directory)
        write_json(directory / IDENTITY_NAME, identity)
        log.replace(predictions)
        return log

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Write and fsync. Raises DiskFullError."""
        path = self.directory / PREDICTIONS_NAME
        lines = "".join(prediction.model_dump_json() + "\n" for prediction in predictions)
        with disk_errors(path), path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done |= {prediction.key: prediction for prediction in predictions}

    def replace(self, predictions: Sequence[Prediction]) -> None:
        """Write the file anew, atomically. Raises DiskFullError."""
        lines = "".join(prediction.model_dump_json() + "\n" for prediction in predictions)
        write_atomically(self.directory / PREDICTIONS_NAME, lines.encode())
        self.done = {prediction.key: prediction for prediction in predictions}


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


def _same_answers(found: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whether both generate the same answers, however they are graded."""
    if found is None:
        return False
    return {**found, **dict.fromkeys(GRADING)} == {**wanted, **dict.fromkeys(GRADING)}


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
        predictions[prediction.key] = prediction
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
