"""``python -m benchmarks.calibration``: train every objective on every task, and keep what came out beside this file.

Takes about five minutes a seed on one thread. figures.json has, for every task and seed, what the preflight counted
before, and how many questions each arm answered right after. README.md says what follows from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration.tasks import TASKS
from benchmarks.rounding import rounded

FIGURES = Path(__file__).with_name("figures.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=FIGURES, help="replaced rows are those of these seeds and tasks")
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # Read when torch is loaded, by every library it brings.
        command = [sys.executable, "-m", "benchmarks.calibration", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as directory:
            for name in arguments.tasks:
                _keep(measure(name, seed, Path(directory)), arguments.out)
    return 0


def measure(name: str, seed: int, directory: Path, objectives: Sequence[str] | None = None) -> dict[str, Any]:
    """One task of one seed: the evidence before, the right answers after, of the base and of every arm."""
    from benchmarks.calibration import arms

    arms.quiet()
    task = TASKS[name](seed)
    base = arms.make_base(task.base, directory, seed)
    home = directory / name
    home.mkdir()
    dataset = arms.write_dataset(home / "demonstrations", task.demonstrations)
    report = arms.look(base, dataset, home / "preflight")
    right = {"base": arms.accuracy(base, task)}
    for label in objectives or arms.OBJECTIVES:
        model = arms.fine_tune(
            base, dataset, arms.OBJECTIVES[label], home / label.replace(" ", "-"), epochs=task.epochs, seed=seed
        )
        right[label] = arms.accuracy(model, task)
        print(name, seed, label, right[label], flush=True)
    return {
        "task": name,
        "seed": seed,
        "epochs": task.epochs,
        "asked": len(task.questions),
        "right": right,
        "evidence": {part.part: part.model_dump(exclude={"part"}) for part in report.parts if part.num_tokens},
        "rows": report.rows.model_dump(),
    }


def _keep(measured: dict[str, Any], path: Path) -> None:
    """Write the rows so far: a run that is interrupted keeps what it has."""
    rows = json.loads(path.read_text()) if path.exists() else []
    key = (measured["task"], measured["seed"])
    rows = [row for row in rows if (row["task"], row["seed"]) != key] + [rounded(measured)]
    order = list(TASKS)
    rows.sort(key=lambda row: (order.index(row["task"]), row["seed"]))
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    raise SystemExit(main())
