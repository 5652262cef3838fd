"""What a model in training says to a few rows of its own data: greedy answers with the weights as they are.

The same rows at the start, on the way and at the end: the first ones of the held-out file, or of the training rows
where there is none, that have a turn to be trained. A row's prompt is every turn before the last trained one, its
pictures included. It leaves no trace, as the accuracy probe; ranks share the rows.
Not covered: models cut over ranks (fsdp).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

from vlm_dft.accuracy_probe import untouched
from vlm_dft.batches import Steps
from vlm_dft.config import GenerationSettings, TrainConfig
from vlm_dft.data.canonical import Message, Row
from vlm_dft.data.encoding import Sample
from vlm_dft.data.template import text_of
from vlm_dft.errors import OutOfMemoryError
from vlm_dft.evaluation.generation import Generated, Generator
from vlm_dft.model import LoadedModel
from vlm_dft.ranks import Ranks
from vlm_dft.results import SampleAnswer

log = logging.getLogger(__name__)

AT_ONCE: Final = 4
"""Rows of a rank that are written together: less memory beside the optimizer than a step of training takes."""


@dataclass(frozen=True)
class _Question:
    """A row, cut before its last trained turn."""

    row_id: str
    prompt: tuple[Message, ...]
    reference: str
    sample: Sample


class Samples:
    """Rows of one dataset that are answered again and again."""

    def __init__(self, steps: Steps, loaded: LoadedModel, config: TrainConfig) -> None:
        """steps: those of the held-out rows, or of the training where there are none.

        Raises DatasetError for a picture that is not what was validated: before the first step, not in the middle.
        """
        self._split: Literal["train", "validation"] = "validation" if config.validation_dataset else "train"
        self._loaded = loaded
        settings = GenerationSettings(max_new_tokens=config.sample_max_new_tokens, batch_size=AT_ONCE)
        self._generator = Generator(loaded, settings, config.pixels)
        self._questions = tuple(islice(self._questions_of(steps), config.sample_rows))
        named = ", ".join(question.row_id for question in self._questions) or "none has a turn to answer"
        log.info("rows of the %s file that are answered on the way: %s", self._split, named)

    def _questions_of(self, steps: Steps) -> Iterator[_Question]:
        corpus = steps.corpus
        for index in steps.plan.used():
            row = corpus.rows[index]
            if (place := last_trained_turn(row)) is not None:
                prompt = row.messages[:place]
                sample = corpus.encoder.encode_turns(prompt, corpus.dataset, row.id)
                yield _Question(row.id, prompt, text_of(row.messages[place]), sample)

    def answered(self, ranks: Ranks, step: int) -> list[SampleAnswer]:
        """Answers to all rows, in their order; the same result on every rank. Raises OutOfMemoryError."""
        shares = ranks.gather(self._generated(self._questions[ranks.rank :: ranks.count]))
        return [
            SampleAnswer(
                step=step,
                split=self._split,
                row_id=question.row_id,
                prompt=question.prompt,
                reference=question.reference,
                answer=said.text,
                num_tokens=said.num_tokens,
                finish_reason=said.finish_reason,
                error=said.error,
                time=time.time(),
            )
            for number, question in enumerate(self._questions)
            for said in [shares[number % ranks.count][number // ranks.count]]
        ]

    def _generated(self, questions: tuple[_Question, ...]) -> list[Generated]:
        try:
            with untouched(self._loaded):
                return self._generator.answers_to([question.sample for question in questions])
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"no memory left to answer {len(questions)} rows of the data: lower sample_max_new_tokens or "
                "pixels.max_pixels, or set sample_rows to 0",
                param="train.sample_rows",
            ) from None


def last_trained_turn(row: Row) -> int | None:
    """Its place among the messages; None where there is none."""
    places = (place for place, turn in enumerate(row.messages) if turn.role == "assistant" and turn.train)
    return max(places, default=None)
