"""What the model answered, one line per question, on disk as soon as it is known. Torch-free.

Written in VLMEvalKit's process by our model class, read by the process that supervises it: how many lines there are is
the progress, and after a crash nothing is asked twice. Knows nothing about grades.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vlm_dft.errors import EvaluationError
from vlm_dft.results import Record
from vlm_dft.run_dir import disk_errors, write_atomically


class Answer(Record):
    """One answered question."""

    index: int
    """Its row: the item's place in the whole benchmark file."""
    prompt: str
    """The text that VLMEvalKit asked beside the picture."""
    text: str
    finish_reason: Literal["stop", "length", "error"]
    num_tokens: int
    error: str | None = None


@dataclass
class AnswerLog:
    """The answers of one model to one benchmark."""

    path: Path
    done: dict[int, Answer]

    @classmethod
    def open(cls, path: Path) -> AnswerLog:
        """What is there; a torn last line (a process killed while writing) is cut off."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls(path, {})
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        answers = (_answer(path, number, line) for number, line in enumerate(whole.splitlines(), start=1))
        return cls(path, {answer.index: answer for answer in answers})

    def append(self, answers: Sequence[Answer]) -> None:
        """Write and fsync. Raises DiskFullError."""
        lines = "".join(answer.model_dump_json() + "\n" for answer in answers)
        with disk_errors(self.path), self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done |= {answer.index: answer for answer in answers}


def num_answers(path: Path) -> int:
    """Complete lines, without reading what they say."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def carry_over(path: Path, earlier: Iterable[Path]) -> None:
    """When there is no log here yet, start from the first earlier one that holds answers. Raises DiskFullError."""
    if path.exists():
        return
    for log in earlier:
        if num_answers(log):
            data = log.read_bytes()
            write_atomically(path, data[: data.rfind(b"\n") + 1])
            return


def _answer(path: Path, number: int, line: bytes) -> Answer:
    try:
        return Answer.model_validate_json(line)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise EvaluationError(f"{path}: line {number} is not an answer ({reason}): remove the file") from None
