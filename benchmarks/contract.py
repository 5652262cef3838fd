"""``python -m benchmarks contract --cases N --seed S``: schemathesis over the whole OpenAPI, with and without a key.

Runs tests/test_contract.py from the checkout, which starts the API as a process. One JSON line: cases, failures, and
answers by status. There is no ratio and no timing in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEST = Path(__file__).parent.parent / "tests" / "test_contract.py"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks contract", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="at least so many, with and without a key together")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.jsonl"
        environment = os.environ | {
            "VLM_DFT_CONTRACT_CASES": str(options.cases),
            "VLM_DFT_CONTRACT_SEED": str(options.seed),
            "VLM_DFT_CONTRACT_REPORT": str(report),
        }
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TEST)],
            env=environment,
            stdout=sys.stderr,
        ).returncode
        runs = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    cases = sum(run["test_cases"]["generated"] for run in runs)
    line: dict[str, Any] = {
        "benchmark": "contract",
        "cases": cases,
        "failures": sum(run["test_cases"]["unique_failures"] for run in runs),
        "operations": max((run["operations"]["tested"] for run in runs), default=0),
        "answers_of_5xx": sum(run["answers_of_5xx"] for run in runs),
        "by_run": {run["run"]: run["test_cases"] for run in runs},
        "seed": options.seed,
        "schemathesis": runs[0]["schemathesis_version"] if runs else None,
    }
    print(json.dumps(line))
    if cases < options.cases:
        print(f"only {cases} cases of {options.cases} were made", file=sys.stderr)
        return 1
    return code
