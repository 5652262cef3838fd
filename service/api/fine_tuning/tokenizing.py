"""Ask a short process that may import transformers, which the API may not: how rows are tokenized (``vlm_dft.preview``,
``vlm_dft.counting``).

Answered while the client waits, and not as a job: a preview is looked at while a form is filled in, costs a second or
two of one core, and would otherwise stand behind validations that take minutes. Hence the bounds: few at a time, each
with a time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Final, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from service.errors import InvalidRequestError, ServiceError, UnavailableError
from service.settings import Settings
from vlm_dft.results import ErrorRecord

AT_ONCE: Final = 2
"""Processes of this API at a time."""
WAIT_SECONDS: Final = 20.0
"""How long a request waits for its turn."""

_INHERITED: Final = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
_turns = threading.BoundedSemaphore(AT_ONCE)

log = structlog.get_logger("service.api")
Answer = TypeVar("Answer", bound=BaseModel)


def ask(settings: Settings, module: str, question: BaseModel, answer: type[Answer], *, seconds: float) -> Answer:
    """What ``python -m module`` answers. Raises InvalidRequestError for what is wrong with model or rows,
    UnavailableError when it is busy, slow or was killed."""
    if not _turns.acquire(timeout=WAIT_SECONDS):
        raise UnavailableError("too many rows are being tokenized at the moment: try again", retry_after_seconds=5)
    try:
        done = subprocess.run(
            [str(settings.trainer_python or sys.executable), "-m", module],
            input=question.model_dump_json().encode(),
            capture_output=True,
            env=_environment(),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"tokenizing took longer than {seconds:g} s: try again, or ask for less"
        raise UnavailableError(message, retry_after_seconds=5) from None
    finally:
        _turns.release()
    if done.returncode == 0:
        return answer.model_validate_json(done.stdout)
    raise _refused(module, done)


def _environment() -> dict[str, str]:
    """No database URL and no key reaches it; and nothing is fetched: a model that is not here is an error."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return kept | {
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _refused(module: str, done: subprocess.CompletedProcess[bytes]) -> ServiceError:
    try:
        error = ErrorRecord.model_validate_json(done.stdout)
    except ValidationError:
        log.error("tokenizing failed", module=module, exit_code=done.returncode, stderr=done.stderr.decode()[-2000:])
        return UnavailableError(f"tokenizing ended with exit code {done.returncode}: see the service's log")
    if error.category == "user":
        return InvalidRequestError(error.message, param=error.param, code=error.code)
    log.error("tokenizing failed", module=module, code=error.code, message=error.message)
    return UnavailableError(error.message)
