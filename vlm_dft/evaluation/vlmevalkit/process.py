"""One start of VLMEvalKit's process: environment, process group, time limits, end.

Its exit code decides nothing (VLMEvalKit exits with 0 after most failures); what it wrote does. A process that writes
nothing for too long, or runs for too long, is ended with its whole group. Torch-free. Knows nothing about benchmarks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from vlm_dft.evaluation.vlmevalkit.installation import RUNNER, Installation
from vlm_dft.run_dir import disk_errors

LOG_NAME: Final = "log.txt"
POLL_SECONDS: Final = 0.25
TERM_SECONDS: Final = 10.0
"""Between SIGTERM and SIGKILL."""

# What VLMEvalKit may inherit. Everything else stays out: keys, URLs, RANK and WORLD_SIZE, MMEVAL_ROOT.
_INHERITED = frozenset(
    {"PATH", "TMPDIR", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    | {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
)
_INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_")


@dataclass(frozen=True)
class Deadline:
    """When to give up."""

    stall_seconds: float
    """Without any file changing."""
    total_end: float
    """On the monotonic clock."""


@dataclass(frozen=True)
class End:
    """How one start ended."""

    why: Literal["ended", "stalled", "too long"]
    exit_code: int
    """Negative: the signal that ended it."""

    def __str__(self) -> str:
        if self.why != "ended":
            return {"stalled": "it wrote nothing for too long and was ended", "too long": "its time was up"}[self.why]
        if self.exit_code < 0:
            return f"it was ended by {signal.Signals(-self.exit_code).name}"
        return f"it exited with code {self.exit_code}"


def environment(work: Path, data_root: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The allow-listed part of ours, and what VLMEvalKit is told beside it."""
    inherited = {
        name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    from huggingface_hub import constants

    home = work / "home"  # VLMEvalKit would write into the user's
    home.mkdir(exist_ok=True)
    return inherited | {
        "HOME": str(home),
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "LMUData": str(data_root),
        "TZ": "UTC",  # run directories are named by the time, and the newest is looked for
        "PRED_FORMAT": "tsv",
        "EVAL_FORMAT": "csv",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout may be read-only, and is not ours
        **extra,
    }


def run_once(
    installation: Installation,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    work: Path,
    deadline: Deadline,
    tick: Callable[[], None],
) -> End:
    """Start, watch until it ends or must, and leave nothing of its group behind. tick: called while it runs."""
    log_path = work / LOG_NAME
    command = [str(installation.python), str(RUNNER), "run", str(installation.root), *arguments]
    with disk_errors(log_path), log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=work,
            env=dict(environment),
            process_group=0,
        )
    try:
        why = _watch(process, work, deadline, tick)
        if why != "ended":
            _terminate(process)
    finally:
        _kill_group(process)
    return End(why, process.wait())


def _watch(
    process: subprocess.Popen[bytes], work: Path, deadline: Deadline, tick: Callable[[], None]
) -> Literal["ended", "stalled", "too long"]:
    seen, changed = _signs_of_life(work), time.monotonic()
    while not _wait(process, POLL_SECONDS):
        tick()
        now, signs = time.monotonic(), _signs_of_life(work)
        if signs != seen:
            seen, changed = signs, now
        if now > deadline.total_end:
            return "too long"
        if now - changed > deadline.stall_seconds:
            return "stalled"
    tick()
    return "ended"


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the leader ended within that time. It is not reaped, so that its id stays its own."""
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > end:
            return False
        time.sleep(min(seconds, 0.02))
    return True


def _signs_of_life(work: Path) -> frozenset[tuple[str, int, int]]:
    """Name, size and time of every file that it writes while it is alive."""
    paths = [work / LOG_NAME, *(work / "answers").rglob("*"), *(work / "outputs").rglob("*")]
    return frozenset(_stats(paths))


def _stats(paths: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    for path in paths:
        with suppress(OSError):  # a temporary file, renamed since it was listed
            status = path.lstat()
            yield str(path), status.st_size, status.st_mtime_ns


def _terminate(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _wait(process, TERM_SECONDS)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The group outlives its leader while VLMEvalKit's own child processes live."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
