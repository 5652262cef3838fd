"""A trainer that needs no network has none, in either way of taking it; one that needs it keeps it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_dft import isolation
from vlm_dft.config import EvalConfig, JudgeConfig, RunConfig, TrainConfig, ValidationConfig
from worker.trainer_process import isolated, needs_network

PROBE = """
import os, socket, sys
from vlm_dft import isolation
if sys.argv[1:] == ["blocked"]:
    os.environ[isolation.NO_NETWORK] = "python"
isolation.block_sockets()
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
found = [os.environ[isolation.NO_NETWORK]]
for reach in (
    lambda: socket.create_connection(("192.0.2.1", 80), 2),
    lambda: socket.getaddrinfo("example.com", 80),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        reach()
    except OSError as error:
        found.append(type(error).__name__)
print(*found)
"""


def probe(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def can_unshare() -> bool:
    kind = "-n" if os.getuid() == 0 else "-Urn"
    return subprocess.run(["unshare", kind, "true"], capture_output=True).returncode == 0


def test_in_a_namespace_there_is_only_the_loopback() -> None:
    held, *errors = probe(isolated([sys.executable, "-c", PROBE]))
    assert len(errors) == 3
    assert held == ("namespace" if can_unshare() else "python")


def test_without_a_namespace_python_refuses() -> None:
    assert probe([sys.executable, "-c", PROBE, "blocked"]) == ["python", *["PermissionError"] * 3]


def test_the_process_stays_the_same_one() -> None:
    """The supervisor signals and watches the process that it started."""
    process = subprocess.Popen(
        isolated([sys.executable, "-c", "import os; print(os.getpid())"]), stdout=subprocess.PIPE, text=True
    )
    assert int(process.communicate(timeout=60)[0]) == process.pid


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RunConfig(run_id="a", train=TrainConfig(model="/m", dataset=Path("/d"))), False),
        (RunConfig(run_id="a", train=TrainConfig(model="Qwen/x", revision="1", dataset=Path("/d"))), True),
        (RunConfig(run_id="a", validation=ValidationConfig(source=Path("/s"), filename="s")), False),
        (
            RunConfig(run_id="a", validation=ValidationConfig(source=Path("/s"), filename="s", allow_image_urls=True)),
            True,
        ),
        (
            RunConfig(
                run_id="a",
                evaluation=EvalConfig.model_validate(
                    {
                        "model": "/m",
                        "benchmarks": [{"name": "mathverse", "kind": "mathverse", "path": "/b"}],
                        "judge": JudgeConfig(base_url="https://judge.example/v1", model="j"),
                    }
                ),
            ),
            True,
        ),
    ],
)
def test_only_what_fetches_keeps_the_network(config: RunConfig, expected: bool) -> None:
    assert needs_network(config) is expected


def test_the_loopback_is_here_and_nothing_else() -> None:
    assert [isolation._is_here(host) for host in ("localhost", "127.8.0.1", "::1", "0.0.0.0")] == [True] * 4
    assert not any(isolation._is_here(host) for host in ("example.com", "10.0.0.1", "169.254.169.254", "::2"))
