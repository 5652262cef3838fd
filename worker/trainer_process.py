"""One trainer process: its command line, its scrubbed environment, its process group, its end.

Knows nothing about jobs or leases. The trainer leads a session of its own, so that one signal reaches its whole tree,
and so that a Ctrl-C in a terminal reaches its supervisor only.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from service.settings import Settings
from vlm_dft.config import RunConfig

# What a trainer may inherit. Everything else stays out: database and broker URLs, API keys, cloud credentials.
_INHERITED = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "TZ", "TMPDIR", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"}
    | {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR"}
    | {"TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE", "SSL_CERT_FILE", "SSL_CERT_DIR"}
    | {"VLM_DFT_VLMEVAL_PYTHON", "VLM_DFT_VLMEVAL_ROOT"}
)
_INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_")
# Downloads need these; a proxy URL may hold a password, so they are given only when downloads are allowed.
_FOR_DOWNLOADS = frozenset(
    {"HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
)
_FOR_JUDGES = frozenset({"VLM_DFT_JUDGE_API_KEY"}) | {
    name for name in _FOR_DOWNLOADS if name.lower().endswith("_proxy")
}
# torchrun sets no parent-death signal of its own, and killing it would leave its ranks to the lease alone.
_DIE_WITH_PARENT = (
    "import ctypes,os,runpy,signal,sys;"
    "ctypes.CDLL(None).prctl(1,signal.SIGKILL);"
    "os.getppid()==int(sys.argv.pop(1)) or sys.exit('the supervisor is gone');"
    "runpy.run_module('torch.distributed.run',run_name='__main__')"
)


def trainer_command(settings: Settings, run_dir: Path, *, ranks: int) -> list[str]:
    """`python -m vlm_dft RUN_DIR`, under torchrun when there are several ranks."""
    python = str(settings.trainer_python or sys.executable)
    if ranks == 1:
        return [python, "-m", "vlm_dft", str(run_dir)]
    launcher = [python, "-c", _DIE_WITH_PARENT, str(os.getpid())]
    torchrun = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=0"]
    return [*launcher, *torchrun, "-m", "vlm_dft", str(run_dir)]


def needs_network(config: RunConfig) -> bool:
    """Whether a run fetches anything: a hub model, a judge's words, images by URL."""
    document = config.model_dump()
    parts = [part for part in document.values() if isinstance(part, dict)]
    return any(part.get("revision") or part.get("judge") or part.get("allow_image_urls") for part in parts)


def isolated(command: list[str]) -> list[str]:
    """The command in a process that cannot reach the network (``vlm_dft.isolation``)."""
    return [sys.executable, "-m", "vlm_dft.isolation", *command]


def trainer_environment(
    settings: Settings, *, ranks: int, uses_gpu: bool, uses_judge: bool = False, threads: int | None = None
) -> dict[str, str]:
    """The allow-listed part of our environment, and what a trainer needs beside it."""
    allowed = _INHERITED | _FOR_DOWNLOADS if settings.hub_models else _INHERITED
    if uses_judge:
        allowed = allowed | _FOR_JUDGES
    environment = {
        name: value for name, value in os.environ.items() if name in allowed or name.startswith(_INHERITED_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torch's own default is every core in every rank, torchrun's is one.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves a traceback in log.txt
        "PYTHONSAFEPATH": "1",  # nothing is imported from the working directory
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if ranks > 1:
        # How long torchrun lets its ranks write their checkpoint after SIGTERM; its own default is 30 s.
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(settings.drain_seconds))
    if not settings.hub_models:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if not uses_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


class TrainerProcess:
    """A started trainer. Its group is gone when ``finish`` returns."""

    def __init__(self, command: list[str], environment: dict[str, str], run_dir: Path, log_path: Path) -> None:
        """Raises OSError when it cannot be started."""
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run_dir,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether the leader has ended. It is not reaped: until ``finish`` its id cannot become somebody else's."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def wait(self, seconds: float) -> bool:
        """Wait up to that long for the leader to end; returns whether it has."""
        deadline = time.monotonic() + seconds
        pause = 0.005
        while not self.has_ended():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            time.sleep(min(pause, remaining))
            pause = min(pause * 2, 0.1)
        return True

    def ask_to_stop(self) -> None:
        """SIGTERM to the leader alone.

        torchrun passes it on to its ranks. Sent to the group, it would also end the data loader's workers, and the
        trainer could not finish the step whose checkpoint we are waiting for.
        """
        os.kill(self.pid, signal.SIGTERM)  # Popen.send_signal would reap the leader

    def finish(self) -> int:
        """SIGKILL the whole group, reap the leader and return its exit code; negative: the signal that ended it."""
        # No such group: reaped by an earlier call. Permission: macOS says so of a group that is all zombies.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()


def exit_words(code: int) -> str:
    """What an exit code means."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    likely = {
        "SIGKILL": ": likely out of memory, or killed by hand",
        "SIGBUS": ": likely a full /dev/shm or disk",
        "SIGSEGV": ": a crash in native code",
    }
    return f"ended by {name}{likely.get(name, '')}"
