"""What `vlm-dft up` starts, with which environment, and how a child that keeps dying is started again."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from throwaway import wait_until

from cli import programs
from cli.children import Child, Program, stop_all
from service.jobs.phases import Queue
from service.settings import Settings


def test_every_process_reads_the_settings_that_up_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = Settings(
        data_dir=tmp_path,
        port=1234,
        api_key="sk-1",  # pyright: ignore - pydantic wraps it
        dataset_roots=(Path("/a b"), Path("/c")),
        hub_models=True,
        max_crashes=7,
        lease_seconds=12.5,
    )
    environment = programs.environment_of(given)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read = Settings()
    assert read == given
    assert read.api_key is not None
    assert read.api_key.get_secret_value() == "sk-1"


def test_workers_are_one_per_queue_without_a_gpu_and_drain_on_sigterm(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    [worker] = programs.workers(settings, Queue.CPU, None)
    assert worker.environment["REMAP_SIGTERM"] == "SIGQUIT"
    assert worker.command[worker.command.index("-Q") + 1] == "cpu"
    assert [program.name for program in programs.workers(settings, Queue.CPU, 2)] == ["cpu-worker-0", "cpu-worker-1"]
    assert programs.workers(settings, Queue.GPU, 0) == []


def test_broker_socket_is_private_and_short_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    near = programs.embedded_broker(Settings(data_dir=tmp_path))
    assert near is not None
    assert near.socket_path == tmp_path / "broker" / "broker.sock"
    far = programs.embedded_broker(Settings(data_dir=tmp_path / ("long" * 25)))
    assert far is not None
    assert len(os.fsencode(far.socket_path)) <= programs.LONGEST_SOCKET_PATH
    assert all(stat.S_IMODE(b.socket_path.parent.stat().st_mode) == 0o700 for b in (near, far))
    far.remove_socket()
    assert not far.socket_path.parent.exists()
    binary.unlink()
    assert programs.embedded_broker(Settings(data_dir=tmp_path)) is None


def test_child_that_keeps_dying_is_started_again_after_growing_pauses(tmp_path: Path) -> None:
    said: list[str] = []
    program = Program("short", [sys.executable, "-c", "print('x'); exit(7)"], dict(os.environ), tmp_path / "log")
    child = Child(program, said.append)

    def tend() -> bool:
        child.tend()
        return len(said) == 3

    wait_until(tend, 10, "it has died three times")
    assert [line.split(":")[1].split(";")[0] for line in said] == [
        f" starting it again in {pause:g} s" for pause in (0.5, 1.0, 2.0)
    ]
    assert all("exit code 7" in line for line in said)
    assert stop_all([child], 1.0, hurry=lambda: False) == []
    assert program.log_path.read_text() == "x\n" * 3


def test_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    program = Program("deaf", [sys.executable, "-c", code], dict(os.environ), tmp_path / "log")
    child = Child(program, print)
    child.tend()
    wait_until(lambda: program.log_path.read_text(), 20, "it ignores signals now")
    assert stop_all([child], 0.2, hurry=lambda: False) == ["deaf"]
    assert child.has_ended()
