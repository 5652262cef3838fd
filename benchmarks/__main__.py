"""``python -m benchmarks NAME``: one benchmark, one JSON line with "ratio"; ``all``: each of them.

Each runs in a process of its own, on one thread. ``--save`` also writes the line to benchmarks/results/NAME.json: do so
on a machine that does nothing else. Knows the names; what they compare is told by their modules.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.rounding import rounded

NAMES = ("api", "head", "head-memory", "step", "packing", "invariance", "input", "resume", "generate")
BESIDE_PEERS = ("head", "head-memory", "step", "invariance", "input")
COMMANDS = ("chaos", "contract")
"""With arguments of their own and without a ratio; not part of ``all``."""
RESULTS = Path(__file__).parent / "results"
_VERSIONS = ("torch", "transformers", "trl", "numpy")


def main(arguments: list[str] | None = None) -> int:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--save", action="store_true", help="write the line to benchmarks/results/NAME.json, too")
    given = parser.parse_args(arguments)
    options = ["--save"] if given.save else []
    if given.name == "all":
        codes = [_run_alone(name, options) for name in NAMES]
        return int(any(codes))
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # Read when torch is loaded, by every library it brings.
        return _run_alone(given.name, options)
    if given.name in BESIDE_PEERS and not importlib.util.find_spec("trl"):
        print(
            f"{given.name} measures TRL beside us, which is not installed: pip install -e '.[peers]'", file=sys.stderr
        )
        return 1
    began = time.monotonic()
    measured = importlib.import_module(f"benchmarks.{given.name.replace('-', '_')}").measure()
    line = {"benchmark": given.name, **rounded(measured), "took_seconds": round(time.monotonic() - began), **_where()}
    if given.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{given.name}.json").write_text(json.dumps(line, indent=2) + "\n")
    print(json.dumps(line), flush=True)
    return 0


def _run_alone(name: str, options: list[str]) -> int:
    command = [sys.executable, "-m", "benchmarks", name, *options]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def _where() -> dict[str, Any]:
    """What the numbers depend on, without naming the machine."""
    import torch

    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    raise SystemExit(main())
