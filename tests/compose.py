"""docker-compose.yml as local processes: the very commands and environments of its services, without a Docker engine.

What is replaced, and nothing else: host names of the two servers, container paths of the volumes, the published port.
Not covered: images, container users, the GPU reservation, restart policies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).parent.parent / "docker-compose.yml"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


class MissingVariableError(KeyError):
    """A ${NAME:?message} whose variable is not set."""


def interpolate(text: str, variables: dict[str, str]) -> str:
    """Compose's ${NAME}, ${NAME:-default} and ${NAME:?message}."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match["name"], match["kind"], match["rest"]
        if variables.get(name):
            return variables[name]
        if kind == "?":
            raise MissingVariableError(name)
        return rest or ""

    return _VARIABLE.sub(value, text)


def read_compose(variables: dict[str, str]) -> dict[str, Any]:
    """The compose file with its variables filled in."""
    return yaml.safe_load(interpolate(COMPOSE.read_text(), variables))


def start_order(services: dict[str, Any]) -> list[str]:
    """Services so that each comes after what it depends on."""
    order: list[str] = []

    def visit(name: str) -> None:
        for needed in services[name].get("depends_on", {}):
            visit(needed)
        if name not in order:
            order.append(name)

    for name in services:
        visit(name)
    return order


@dataclass
class Rehearsal:
    """The compose services that run our code, as processes of this machine."""

    services: dict[str, Any]
    replacements: dict[str, str]
    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def local(self, text: str) -> str:
        for container, here in self.replacements.items():
            text = text.replace(container, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """The service's own environment on top of what a process needs to run at all."""
        base = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
        base["PATH"] = f"{Path(sys.executable).parent}:{base['PATH']}"
        base["OMP_NUM_THREADS"] = "1"
        chosen = self.services[name]["environment"]
        # An empty default is null once it is put into the text that YAML reads; compose puts it in afterwards.
        return base | {key: self.local("" if value is None else str(value)) for key, value in chosen.items()}

    def command(self, name: str) -> list[str]:
        return [self.local(str(word)) for word in self.services[name]["command"]]

    def run(self, name: str) -> subprocess.CompletedProcess[bytes]:
        """A service that ends by itself, such as migrate."""
        return subprocess.run(
            self.command(name), env=self.environment(name), cwd=self.directory, capture_output=True, timeout=120
        )

    def start(self, name: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name), env=self.environment(name), cwd=self.directory, stdout=log, stderr=subprocess.STDOUT
            )

    def healthy(self, name: str) -> bool:
        """The service's own health check, CMD form."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD", name
        command = [self.local(str(word)) for word in words]
        return subprocess.run(command, env=self.environment(name), capture_output=True).returncode == 0

    def stop(self) -> dict[str, int]:
        """SIGTERM everything, last started first; exit codes by name. Waits no longer than the grace period allows."""
        for process in reversed(self.processes.values()):
            process.terminate()
        codes = {}
        for name, process in self.processes.items():
            grace_seconds = int(self.services[name]["stop_grace_period"].removesuffix("s"))
            try:
                codes[name] = process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        return codes
