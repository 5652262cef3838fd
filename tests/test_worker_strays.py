"""Trainers of earlier attempts on our GPU: waited for, left alone or ended, by what their leases say."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from throwaway import wait_until

from vlm_dft.run_dir import RunDir
from worker.inventory import gpus, processes_on, visible_gpus
from worker.strays import clear_strays, run_dir_of


@contextmanager
def trainer(run_dir: Path, seconds: float = 60) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a trainer's command line."""
    run_dir.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})", run_dir])
    try:
        wait_until(lambda: run_dir_of(process.pid, run_dir.parent), 20, "its command line shows")
        yield process
    finally:
        process.kill()
        process.wait()


def test_process_is_ours_when_its_command_line_names_a_run(tmp_path: Path) -> None:
    with trainer(tmp_path / "runs" / "job" / "attempt-1") as process:
        assert run_dir_of(process.pid, tmp_path / "runs") == RunDir(tmp_path / "runs" / "job" / "attempt-1")
        assert run_dir_of(process.pid, tmp_path / "others") is None
    assert run_dir_of(process.pid, tmp_path / "runs") is None


def test_stray_that_nobody_supervises_is_killed_after_its_lease(tmp_path: Path) -> None:
    with trainer(tmp_path / "job" / "attempt-1") as process:
        began = time.monotonic()
        assert clear_strays(lambda: {process.pid}, tmp_path, patience_seconds=0.6) == [process.pid]
        assert process.wait(1) < 0
        assert time.monotonic() - began > 0.6


def test_stray_that_ends_by_itself_is_waited_for(tmp_path: Path) -> None:
    with trainer(tmp_path / "job" / "attempt-1", seconds=0.7) as process:
        living = lambda: {process.pid} if process.poll() is None else set()  # noqa: E731
        assert clear_strays(living, tmp_path, patience_seconds=30) == []
        assert process.poll() == 0


def test_trainer_whose_lease_is_renewed_is_left_alone(tmp_path: Path) -> None:
    with trainer(tmp_path / "job" / "attempt-1") as process:
        run = RunDir(tmp_path / "job" / "attempt-1")
        run.write_lease(1)
        threading.Timer(0.2, run.write_lease, [2]).start()
        assert clear_strays(lambda: {process.pid}, tmp_path, patience_seconds=30) == []
        assert process.poll() is None


def test_foreign_process_is_none_of_our_business(tmp_path: Path) -> None:
    with trainer(tmp_path / "elsewhere") as process:
        assert clear_strays(lambda: {process.pid}, tmp_path / "runs", patience_seconds=30) == []
        assert process.poll() is None


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_machine_without_a_gpu_has_an_empty_inventory() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == []
    assert processes_on([]) == set()


@pytest.mark.gpu
@pytest.mark.skipif(not gpus(), reason="no GPU")
def test_inventory_names_the_gpus_and_visible_ones_by_number_or_uuid() -> None:
    found = gpus()
    assert found
    assert all(gpu.memory_total_gib >= gpu.memory_used_gib >= 0 for gpu in found)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": found[-1].uuid}) == [found[-1]] or len(found) > 1
    assert [gpu.uuid for gpu in visible_gpus({"CUDA_VISIBLE_DEVICES": "0"})] == [found[0].uuid]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
