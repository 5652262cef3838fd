"""A whole service as a user starts it: `vlm-dft up` in a process of its own, with the real trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
from throwaway import wait_until

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
COMMAND = Path(sys.executable).with_name("vlm-dft")
# Leases long enough for a loaded machine, short enough for a test.
QUICK = {
    "OMP_NUM_THREADS": "1",  # two threads that wait for each other crawl on a busy machine
    "VLM_DFT_LEASE_SECONDS": "10",
    "VLM_DFT_HEARTBEAT_SECONDS": "1",
    "VLM_DFT_JANITOR_SECONDS": "0.5",
    "VLM_DFT_REPUBLISH_SECONDS": "2",
    "VLM_DFT_POLL_SECONDS": "0.2",
    "VLM_DFT_DRAIN_SECONDS": "20",
}


class RunningService:
    """`vlm-dft up` on a free port; a context manager that stops it and leaves no process behind."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.data = directory / "data"
        self.output = directory / "up.txt"
        # No redis unless a test gives one: the embedded broker is then the filesystem's.
        empty = directory / "empty-path"
        empty.mkdir(exist_ok=True)
        base = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        self.environment = base | QUICK | {"PATH": str(empty), "VLM_DFT_DATA_DIR": str(self.data)} | environment

    def __enter__(self) -> RunningService:
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [COMMAND, "up", "--port", "0"], stdout=output, stderr=output, env=self.environment
            )
        self.url = wait_until(self._url, 90, "vlm-dft up is ready")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    def _url(self) -> str | None:
        text = self.output.read_text()
        assert self.process.poll() is None, text
        ready = [line for line in text.splitlines() if "is ready at" in line]
        return ready[-1].split()[4] + "/v1" if ready else None

    def client(self, *, strict: bool = False, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="any", _strict_response_validation=strict, **options)

    def run(self, *arguments: str, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """The vlm-dft command, pointed at this service."""
        environment = self.environment | {"VLM_DFT_URL": self.url, "COLUMNS": "200"}
        return subprocess.run(
            [COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_seconds
        )

    def run_here(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, which has imported everything already: a second less for each command."""
        from typer.testing import CliRunner

        from cli.main import app

        done = CliRunner().invoke(app, arguments, env={"VLM_DFT_URL": self.url}, catch_exceptions=False)
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    def child(self, *words: str) -> int:
        """Process id of the direct child whose command line has all the words."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [
            int(pid) for pid in children if set(words) <= set(Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
        ]
        assert len(found) == 1, (words, found)
        return found[0]


def ended(client: openai.OpenAI, job_id: str) -> Any:
    """The job once it has ended, else None."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in TERMINAL else None


def extension(client: openai.OpenAI, path: str, **params: Any) -> Any:
    """GET one of our own endpoints through the stock client."""
    return client.get(path, cast_to=object, options={"params": params})
