"""A process that answers one question about rows and a tokenizer: JSON in, JSON out. Torch-free.

Used by ``preview`` and ``counting``. Knows neither question.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vlm_dft.data.template import ChatTemplate
from vlm_dft.errors import ConfigError, VlmDftError
from vlm_dft.results import ErrorRecord

Question = TypeVar("Question", bound=BaseModel)


def open_template(model: str, revision: str | None) -> ChatTemplate:
    """The chat template and tokenizer of a model. Raises ModelError, for a hub model that was never fetched too."""
    from vlm_dft.data.tokenizer import load_template
    from vlm_dft.model_files import locate

    return load_template(str(locate(model, revision)))


def answer_on_stdout(question: type[Question], answer: Callable[[Question], BaseModel]) -> int:
    """Read the question from stdin, print the answer; returns the exit code. To be called by a process's main alone."""
    # transformers imports torch wherever it is installed: seconds, for a process that tokenizes.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # how Python marks a module as absent
    try:
        found = answer(_asked(question))
    except VlmDftError as error:
        record = ErrorRecord(
            code=error.code, message=error.message, param=error.param, hint=error.hint, category=error.category
        )
        print(record.model_dump_json())
        return 1
    print(found.model_dump_json())
    return 0


def _asked(question: type[Question]) -> Question:
    try:
        return question.model_validate_json(sys.stdin.buffer.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"]))
        raise ConfigError(f"stdin: {param or 'document'}: {first['msg']}", param=param) from None
