"""``python -m benchmarks chaos --minutes N --seed S``: storms of faults over the whole service, on both stacks.

Runs tests/test_chaos.py from the checkout, which starts the service as processes, kills what it can at random, and
checks every promise afterwards; and the control, which takes the trainer's leases away and must show overlaps. With
--trainer steps the jobs take steps without weights, and two faults come in a second; real is the real trainer, which
loads for seconds. One JSON line: faults, jobs, attempts, lost, overlapping executions; no ratio and no timing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
CONTROL = "test_worker_chaos.py::test_without_leases_in_the_trainer_executions_would_overlap"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults, over both stacks together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stack", choices=("embedded", "team", "both"), default="both")
    parser.add_argument("--trainer", choices=("steps", "real"), default="steps", help="what the jobs run")
    options = parser.parse_args(arguments)
    stacks = ["embedded", "team"] if options.stack == "both" else [options.stack]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.jsonl"
        environment = os.environ | {
            "VLM_DFT_CHAOS_SECONDS": str(60 * options.minutes / len(stacks)),
            "VLM_DFT_CHAOS_SEED": str(options.seed),
            "VLM_DFT_CHAOS_TRAINER": options.trainer,
            "VLM_DFT_CHAOS_REPORT": str(report),
        }
        storms = [f"test_chaos.py::test_a_storm_loses_no_job_and_overlaps_none[{stack}]" for stack in stacks]
        codes = [_pytest(environment, storm) for storm in storms]
        control = _pytest(environment, CONTROL)
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    asked = {"benchmark": "chaos", "trainer": options.trainer, "seed": options.seed}
    print(json.dumps({**asked, **_total(lines), "control_shows_overlaps": control == 0, "stacks": lines}))
    return int(any(codes) or control != 0 or len(lines) != len(stacks))


def _pytest(environment: dict[str, str], test: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / test)]
    return subprocess.run(command, env=environment, cwd=TESTS.parent, stdout=sys.stderr, check=False).returncode


def _total(lines: list[dict[str, Any]]) -> dict[str, Any]:
    faults: Counter[str] = Counter()
    for line in lines:
        faults.update(line["faults"])
    return {
        "num_faults": faults.total(),
        "faults": dict(faults),
        **{name: sum(line[name] for line in lines) for name in ("jobs", "attempts", "overlapping_steps")},
        **{name: sum(len(line[name]) for line in lines) for name in ("lost", "broken")},
    }
