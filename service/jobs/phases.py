"""The life of a job: phases, which may follow which, and how OpenAI's clients see them. Pure.

A phase is finer than OpenAI's status. Each transition in the store is one conditional UPDATE that checks
``may_follow`` on the stored phase, so an illegal transition moves nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from vlm_dft.results import ErrorRecord


class Kind(StrEnum):
    """What a job does; each kind runs as ``python -m vlm_dft RUN_DIR``."""

    FINE_TUNING = "fine_tuning"
    EVALUATION = "evaluation"
    FILE_VALIDATION = "file_validation"
    PREFLIGHT = "preflight"


class Queue(StrEnum):
    """Which workers a job is for."""

    GPU = "gpu"
    CPU = "cpu"


QUEUE_OF: Final = {kind: Queue.CPU if kind is Kind.FILE_VALIDATION else Queue.GPU for kind in Kind}


class Phase(StrEnum):
    """Where a job is."""

    CREATED = "created"
    """Waits for its owner to start it (auto_start: false)."""
    QUEUED = "queued"
    """Waits for a worker."""
    RECOVERING = "recovering"
    """Its worker was lost; waits for another one, ahead of its class."""
    STARTING = "starting"
    """Claimed; the process is being started."""
    VALIDATING = "validating"
    """Rows are being read (file validation)."""
    LOADING_MODEL = "loading_model"
    RUNNING = "running"
    CHECKPOINTING = "checkpointing"
    EXPORTING = "exporting"
    EVALUATING = "evaluating"
    PAUSING = "pausing"
    """Pause was asked for; the process is writing its checkpoint."""
    PAUSED = "paused"
    """Holds no device; waits for its owner to resume it from its newest checkpoint."""
    CANCELLING = "cancelling"
    """Cancel was asked for; the worker is ending the process."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


HELD: Final = frozenset({Phase.CREATED, Phase.PAUSED})
"""Phases that only the job's owner ends."""
WAITING: Final = frozenset({Phase.QUEUED, Phase.RECOVERING})
TERMINAL: Final = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})
ACTIVE: Final = frozenset(Phase) - HELD - WAITING - TERMINAL
"""Phases in which a worker holds a lease."""
STOPPING: Final = frozenset({Phase.PAUSING, Phase.CANCELLING})
"""Active, but the user has asked the worker to stop; no progress report changes them."""
WORKING: Final = ACTIVE - STOPPING

_STATUS: Final = {
    Phase.CREATED: "queued",
    Phase.QUEUED: "queued",
    Phase.RECOVERING: "queued",
    Phase.PAUSED: "queued",
    Phase.SUCCEEDED: "succeeded",
    Phase.FAILED: "failed",
    Phase.CANCELLED: "cancelled",
}
_AFTER: Final = {
    Phase.CREATED: frozenset({Phase.QUEUED, Phase.CANCELLED}),
    Phase.PAUSED: frozenset({Phase.QUEUED, Phase.CANCELLED, Phase.FAILED}),
    Phase.PAUSING: TERMINAL | {Phase.PAUSED, Phase.RUNNING, Phase.CANCELLING},
    Phase.CANCELLING: TERMINAL,
    **dict.fromkeys(WAITING, frozenset({Phase.STARTING, Phase.PAUSED, Phase.CANCELLED, Phase.FAILED})),
    **dict.fromkeys(WORKING, frozenset(Phase) - HELD),
    **dict.fromkeys(TERMINAL, frozenset[Phase]()),
}


def openai_status(phase: Phase) -> str:
    """OpenAI's status of a phase: every phase in which a worker holds the job is ``running``.

    A job that its owner holds back is ``queued``: the stock client's type has no other word for it.
    """
    return _STATUS.get(phase, "running")


def may_follow(before: Phase, after: Phase) -> bool:
    """Whether a job in phase ``before`` may move to ``after``."""
    return after in _AFTER[before]


def phases_before(after: Phase) -> frozenset[Phase]:
    """The phases from which ``after`` may be reached: the IN (...) of the conditional UPDATE."""
    return frozenset(phase for phase in Phase if may_follow(phase, after))


class Stop(StrEnum):
    """Why a worker is to stop a job that it runs, the most pressing reason first."""

    CANCEL = "cancel"
    """The user wants it ended."""
    TIMEOUT = "timeout"
    """Its deadline has passed: write a checkpoint, then it fails."""
    PAUSE = "pause"
    """The user wants the device back: write a checkpoint."""


NEVER_RETRIED: Final = frozenset({"invalid_training_file", "gpu_oom", "nan_loss", "invalid_config", "timeout"})
"""Failures that the same job would meet again."""


def may_retry(error: ErrorRecord) -> bool:
    """Whether another attempt may succeed: infrastructure yes, the user's input and settings never."""
    return error.category == "server" and error.code not in NEVER_RETRIED
