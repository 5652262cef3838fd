"""The watchdog, with real processes that really die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from throwaway import wait_until

from vlm_dft.run_dir import RunDir
from vlm_dft.watchdog import EXIT_ABANDONED

FOLLOWER = """
import sys, time
from pathlib import Path
from vlm_dft.watchdog import follow_lease
follow_lease(Path(sys.argv[1]), float(sys.argv[2]))
print("ready", flush=True)
time.sleep(60)
"""

CHILD = """
import os, sys, time
from vlm_dft.watchdog import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
time.sleep(60)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_process_whose_lease_stops_changing_ends_itself(tmp_path: Path):
    run = RunDir(tmp_path)
    run.write_lease(1)
    with start(FOLLOWER, str(run.lease_path), "0.5") as follower:
        assert follower.stdout is not None and follower.stdout.readline() == "ready\n"  # noqa: PT018
        began = time.monotonic()
        _, errors = follower.communicate(timeout=20)
        assert follower.returncode == EXIT_ABANDONED
        assert time.monotonic() - began > 0.4
        assert f"{run.lease_path} was not renewed for 0.5 seconds" in errors


def test_a_process_whose_lease_keeps_changing_lives(tmp_path: Path):
    run = RunDir(tmp_path)
    run.write_lease(0)
    with start(FOLLOWER, str(run.lease_path), "1.0") as follower:
        assert follower.stdout is not None and follower.stdout.readline() == "ready\n"  # noqa: PT018
        for counter in range(1, 26):
            run.write_lease(counter)
            time.sleep(0.1)
        assert follower.poll() is None
        follower.kill()


def test_a_missing_lease_counts_as_not_renewed(tmp_path: Path):
    with start(FOLLOWER, str(tmp_path / "absent"), "0.3") as follower:
        follower.communicate(timeout=20)
        assert follower.returncode == EXIT_ABANDONED


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_a_process_dies_with_its_parent():
    with start(PARENT, CHILD) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait(10)
        try:
            wait_until(lambda: not alive(child), 10, "the child died with its parent")
        finally:
            if alive(child):
                os.kill(child, signal.SIGKILL)
