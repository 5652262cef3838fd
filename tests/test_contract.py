"""What the OpenAPI allows is answered as it says, and what it forbids is refused: schemathesis, all checks.

VLM_DFT_CONTRACT_CASES says how many cases at least, with and without a key; `python -m benchmarks contract --cases N`
runs it so and reports. Without it, some hundred cases with a key.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_process import ApiProcess, api_process

CASES = int(os.environ.get("VLM_DFT_CONTRACT_CASES", "0"))
SEED = os.environ.get("VLM_DFT_CONTRACT_SEED", "1")
REPORT = os.environ.get("VLM_DFT_CONTRACT_REPORT")
CONFIG = Path(__file__).with_name("schemathesis.toml")
KEY = "the-contract-key"
COMMAND = Path(sys.executable).with_name("schemathesis")

pytestmark = [pytest.mark.timeout(1800 if CASES else 300)]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ApiProcess]:
    directory = tmp_path_factory.mktemp("contract")
    environment = {"VLM_DFT_API_KEY": KEY, "VLM_DFT_REQUESTS_PER_MINUTE": "1000000000"}
    with api_process(directory, request.getfixturevalue("_sqlite_template"), **environment) as running:
        yield running


def run(api: ApiProcess, tmp_path: Path, *options: str) -> dict[str, Any]:
    """schemathesis over every operation; its report, with what it printed."""
    report = tmp_path / "report.json"
    effort = ["--phases", "fuzzing", "-n", "1"]
    if CASES:
        # The coverage phase alone makes some thousand cases; the other phases are repeated while there is time.
        phases = "examples,coverage,fuzzing,stateful"
        effort = ["--phases", phases, "-n", "10", "--max-time", str(min(600, max(60, CASES // 20)))]
    options = ("--no-shrink", "--continue-on-failure", "--request-timeout", "20", "--warnings", "off", *options)
    command = (COMMAND, "--config-file", CONFIG, "run", f"{api.url}/openapi.json", "--checks", "all", "--seed", SEED)
    done = subprocess.run(
        [*command, *effort, *options, "--report", "json", "--report-json-path", report],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    found = json.loads(report.read_text())
    return {**found, "output": done.stdout[-20_000:], "returncode": done.returncode}


@pytest.mark.parametrize("auth", ["with a key", "without a key"] if CASES else ["with a key"])
def test_the_api_keeps_its_contract(api: ApiProcess, tmp_path: Path, auth: str) -> None:
    options = ["-H", f"Authorization: Bearer {KEY}"] if auth == "with a key" else []
    found = run(api, tmp_path, *options)
    answers = len(re.findall(r'"status": 5\d\d', api.log.read_text()))
    if REPORT:
        with Path(REPORT).open("a") as file:
            file.write(json.dumps({**found, "run": auth, "answers_of_5xx": answers}) + "\n")
    assert found["returncode"] == 0, found["output"]
    assert answers == 0
    assert "Traceback" not in api.log.read_text()
