"""The API as a process of its own, whose memory can be measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from api_server import write_model
from databases import copied_sqlite
from throwaway import free_port, wait_until

from service.settings import Settings


@dataclass(frozen=True)
class ApiProcess:
    """A running server."""

    url: str
    pid: int
    settings: Settings
    log: Path

    @property
    def peak_mib(self) -> float:
        """Most resident memory so far."""
        return self._status("VmHWM") / 1024

    def forget_peak(self) -> float:
        """Begin to measure the peak anew; returns the resident memory of now, in MiB."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self._status("VmRSS") / 1024

    def _status(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1])


@contextmanager
def api_process(directory: Path, template: Path, **environment: str) -> Iterator[ApiProcess]:
    """The API with the models "tiny" and "tiny-text", on a copy of a migrated SQLite file."""
    data = directory / "data"
    data.mkdir(parents=True)
    url = copied_sqlite(template, data / "vlm-dft.db")
    write_model(directory / "models" / "tiny")
    write_model(directory / "models" / "tiny-text", "qwen2")
    port = free_port()
    own = {
        "VLM_DFT_DATA_DIR": str(data),
        "VLM_DFT_DATABASE_URL": url,
        "VLM_DFT_MODELS_DIR": str(directory / "models"),
        "VLM_DFT_MIN_FREE_BYTES": "0",
        **environment,
    }
    log = directory / "api.log"
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.api.app:create_app", "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--no-access-log"], env={**os.environ, **own}, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: _answers(process, port, log), 60, "the API answers")
        settings = Settings(data_dir=data, database_url=url, models_dir=directory / "models", min_free_bytes=0)
        yield ApiProcess(f"http://127.0.0.1:{port}", process.pid, settings, log)
    finally:
        process.kill()
        process.wait()


def _answers(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False
