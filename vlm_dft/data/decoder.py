"""Look at pictures in processes of their own, so that no picture costs more than its row. Torch-free.

``python -m vlm_dft.data.decoder`` is such a process: it reads pictures from stdin and answers what ``images.inspect``
finds. Covered: memory (RLIMIT_AS), processor time of each picture (RLIMIT_CPU), a decoder that crashes or hangs; the
process has no secrets in its environment and writes no files. Not covered: a decoder that is taken over can still read
what its user can read.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import vlm_dft
from vlm_dft.config import PixelConfig, ValidationLimits
from vlm_dft.data.images import ImageInfo, inspect
from vlm_dft.data.problems import RowError
from vlm_dft.data.process import memory_limit

MEMORY_BYTES: Final = 1 << 30
"""What a picture of the largest size needs, several times over."""
CPU_SECONDS: Final = 20
WALL_SECONDS: Final = 120.0
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ", "COVERAGE_PROCESS_START")


@dataclass(frozen=True)
class DecoderLimits:
    """What one process may use."""

    memory_bytes: int = MEMORY_BYTES
    cpu_seconds: int = CPU_SECONDS
    """Of one picture."""
    wall_seconds: float = WALL_SECONDS


class Decoders:
    """As many processes as are asked at once; each is started when it is needed. For use by threads."""

    def __init__(self, limits: ValidationLimits, pixels: PixelConfig, decoder: DecoderLimits | None = None) -> None:
        self._decoder = decoder or DecoderLimits()
        setup = {"limits": limits.model_dump(), "pixels": pixels.model_dump(), "decoder": asdict(self._decoder)}
        self._setup = json.dumps(setup).encode() + b"\n"
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def inspect(self, data: bytes, field: str) -> ImageInfo:
        """``images.inspect`` elsewhere. Raises RowError."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _Process(self._setup)
        answer = process.ask(data, self._decoder.wall_seconds)
        if answer is None:
            raise _ended(process.end(), field, self._decoder)
        self._idle.put(process)
        if "reason" in answer:
            raise RowError(field, answer["code"], answer["reason"])
        return ImageInfo(**answer)

    def close(self) -> None:
        """End the idle processes."""
        while not self._idle.empty():
            self._idle.get_nowait().end()


@contextmanager
def decoders(limits: ValidationLimits, pixels: PixelConfig, decoder: DecoderLimits | None = None) -> Iterator[Decoders]:
    """Decoders that are gone afterwards."""
    pool = Decoders(limits, pixels, decoder)
    try:
        yield pool
    finally:
        pool.close()


class _Process:
    """One process, and one question at a time."""

    def __init__(self, setup: bytes) -> None:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment["PYTHONPATH"] = str(Path(vlm_dft.__file__).parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vlm_dft.data.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._setup = setup

    def ask(self, data: bytes, wall_seconds: float) -> dict[str, Any] | None:
        """What the process found; None when it ended, or did not answer in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(self._setup + len(data).to_bytes(8, "big") + data)
            stdin.flush()
        except BrokenPipeError:
            return None
        self._setup = b""
        deadline = time.monotonic() + wall_seconds
        while not select.select([stdout], [], [], max(0.0, min(0.2, deadline - time.monotonic())))[0]:
            if time.monotonic() >= deadline:
                return None
        line = stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> int:
        """Kill the process; returns how it ended if that was before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            code = self._process.wait(0.5)  # a process that has just crashed
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process.stdout.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        return code


def _ended(code: int, field: str, limits: DecoderLimits) -> RowError:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        reason = f"decoding the image takes more than {limits.cpu_seconds} s: save it again as an ordinary picture"
        return RowError(field, "image_takes_too_long", reason)
    reason = f"the image broke its decoder (exit code {code}): save it again as an ordinary picture"
    return RowError(field, "image_undecodable", reason)


def _serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer pictures until the source ends."""
    setup = json.loads(source.readline())
    limits = ValidationLimits.model_validate(setup["limits"])
    pixels = PixelConfig.model_validate(setup["pixels"])
    cpu_seconds = setup["decoder"]["cpu_seconds"]
    with memory_limit(setup["decoder"]["memory_bytes"]):
        while header := source.read(8):
            _limit_cpu(cpu_seconds)
            try:
                answer = asdict(inspect(source.read(int.from_bytes(header, "big")), "", limits, pixels))
            except RowError as error:
                answer = {"code": error.reason_code, "reason": error.reason}
            target.write(json.dumps(answer).encode() + b"\n")
            target.flush()


def _limit_cpu(seconds: int) -> None:
    """From now on, so many seconds of processor time; beyond them SIGXCPU ends the process."""
    if sys.platform == "win32":
        return
    import resource

    used = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + seconds, hard))


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
