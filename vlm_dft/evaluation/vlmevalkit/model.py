"""The model class that VLMEvalKit asks, in VLMEvalKit's process: our generation behind its three calls.

What it answers is what the native backend answers: same loading (any device, sdpa, adapters), same pixels through
qwen_vl_utils, same decoding. VLMEvalKit asks one question after the other; at the first one that has no answer yet,
all such questions of the data set are answered, in batches, the longest first, and each batch is on disk before the
next. VLMEvalKit is not imported: the class only has the shape that VLMEvalKit expects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm_dft.config import Frozen, GenerationSettings, PixelConfig
from vlm_dft.errors import EvaluationError, VlmDftError
from vlm_dft.evaluation.answering import Ask, prompt_length
from vlm_dft.evaluation.items import Item, Picture
from vlm_dft.evaluation.vlmevalkit.answer_log import Answer, AnswerLog
from vlm_dft.run_dir import write_json

if TYPE_CHECKING:
    from vlm_dft.evaluation.generation import Generator

FACTS_NAME = "facts.json"
FAILURE_NAME = "failure.json"


class Asking(Frozen):
    """asking.json: what the model class needs to know."""

    model: str
    revision: str | None
    settings: GenerationSettings
    pixels: PixelConfig
    answers: Path
    """Directory of the answer logs, one per data set; facts.json and failure.json are written there, too."""


class Dataset(Protocol):
    """What we use of VLMEvalKit's ImageBaseDataset."""

    dataset_name: str
    data: Any
    """DataFrame with our columns index, item, image_path."""

    def build_prompt(self, line: Any) -> list[dict[str, str]]: ...


@dataclass
class _Questions:
    """One data set: what it asks, and what has been answered."""

    by_picture: dict[str, tuple[int, Item]]
    """Path of the picture, of which each row has its own -> (index, item)."""
    log: AnswerLog


class AnsweringModel:
    """See the module's docstring. asking: path of asking.json. The model is loaded at the first unanswered question."""

    is_api = False

    def __init__(self, asking: str) -> None:
        self._asking = Asking.model_validate_json(Path(asking).read_bytes())
        self._questions: dict[str, _Questions] = {}
        self._generator: Generator | None = None

    def use_custom_prompt(self, dataset: str) -> bool:
        """The prompt is always the data set's."""
        return False

    def set_dump_image(self, dump_image: Any) -> None:
        """VLMEvalKit's hook before a data set: a bound method of it."""
        dataset: Dataset = dump_image.__self__
        rows = (dataset.data.iloc[position] for position in range(len(dataset.data)))
        questions = [(int(row["index"]), _item(str(row["item"]), dataset.build_prompt(row))) for row in rows]
        self._questions[dataset.dataset_name] = _Questions(
            {str(item.picture.path): (index, item) for index, item in questions if item.picture},
            AnswerLog.open(self._asking.answers / f"{dataset.dataset_name}.jsonl"),
        )

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to one question. What fails is left in failure.json with its own error class."""
        questions = self._questions[dataset or ""]
        index, _ = questions.by_picture[_value(message, "image")]
        if index not in questions.log.done:
            try:
                self._answer_all(questions)
            except VlmDftError as error:
                write_json(
                    self._asking.answers / FAILURE_NAME,
                    {"class": type(error).__name__, "message": error.message, "param": error.param},
                )
                raise
        return questions.log.done[index].text

    def _answer_all(self, questions: _Questions) -> None:
        generator = self._generator = self._generator or self._loaded()
        missing = [entry for entry in questions.by_picture.values() if entry[0] not in questions.log.done]
        length = prompt_length(self._asking.pixels)
        missing.sort(key=lambda entry: length(Ask(entry[1], 0)), reverse=True)
        size = self._asking.settings.batch_size
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            questions.log.append(_answers(generator, batch))

    def _loaded(self) -> Generator:
        from vlm_dft.data.encoding import IMAGE_BACKEND
        from vlm_dft.evaluation.generation import Generator
        from vlm_dft.model import load

        loaded = load(self._asking.model, revision=self._asking.revision)
        if not loaded.is_vision:
            raise EvaluationError(f"{self._asking.model} is a text model and cannot see pictures: use a vision model")
        facts = {
            "precision": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "image_backend": IMAGE_BACKEND,
        }
        write_json(self._asking.answers / FACTS_NAME, facts)
        return Generator(loaded, self._asking.settings, self._asking.pixels)


def read_facts(directory: Path) -> dict[str, str]:
    """What the model class says about the loaded model; empty before it was loaded."""
    path = directory / FACTS_NAME
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _answers(generator: Generator, batch: Sequence[tuple[int, Item]]) -> list[Answer]:
    generated = generator.answers([item for _, item in batch])
    return [
        Answer(
            index=index,
            prompt=item.prompt,
            text=answer.text,
            finish_reason=answer.finish_reason,
            num_tokens=answer.num_tokens,
            error=answer.error,
        )
        for (index, item), answer in zip(batch, generated, strict=True)
    ]


def _item(id: str, message: list[dict[str, str]]) -> Item:
    """The row as our generation knows questions; it samples by the item's id, whichever backend asks."""
    path = Path(_value(message, "image"))
    return Item(id, group=id, prompt=_value(message, "text"), picture=Picture(f"item {id}", path=path), answer="")


def _value(message: list[dict[str, str]], kind: str) -> str:
    values = [part["value"] for part in message if part["type"] == kind]
    if len(values) != 1:
        raise EvaluationError(f"VLMEvalKit asked with {len(values)} {kind} parts where one was expected")
    return values[0]
