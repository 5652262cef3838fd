"""Who may import whom, checked twice: statically over every import, and by importing for real without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
PACKAGES = ("vlm_dft", "service", "worker", "cli")
TORCH_FREE = (
    "service.api.app",
    "service.jobs.store",
    "service.jobs.queue",
    "worker.app",
    "worker.janitor",
    "worker.supervise",
    "vlm_dft.config",
    "vlm_dft.run_dir",
    "vlm_dft.results",
    "vlm_dft.errors",
    "vlm_dft.data.canonical",
    "vlm_dft.data.tokens",
    "vlm_dft.data.validation",
    "vlm_dft.evaluation.report",
)
BLOCK = "import sys\nfor name in ('torch', 'torchvision', 'vlmeval'):\n    sys.modules[name] = None\n"


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT_IMPORTS, "--no-cache"],
        cwd=directory,
        env={"PYTHONPATH": str(directory), "PATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy_of_packages(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold(copy_of_packages: Path) -> None:
    answer = lint(copy_of_packages)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("service/api/__init__.py", "import torch"),
        ("worker/__init__.py", "def later():\n    import transformers"),
        ("service/jobs/__init__.py", "import vlm_dft.trainer"),
        ("service/api/__init__.py", "import worker.app"),
        ("vlm_dft/__init__.py", "import sqlalchemy"),
    ],
)
def test_a_broken_import_rule_is_found(copy_of_packages: Path, file: str, line: str) -> None:
    with (copy_of_packages / file).open("a") as module:
        module.write(f"\n{line}\n")
    answer = lint(copy_of_packages)
    assert answer.returncode != 0
    assert "BROKEN" in answer.stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_imports_where_torch_cannot_be_imported(module: str) -> None:
    answer = subprocess.run([sys.executable, "-c", f"{BLOCK}import {module}"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_blocking_torch_does_break_a_module_that_needs_it() -> None:
    answer = subprocess.run([sys.executable, "-c", f"{BLOCK}import vlm_dft.trainer"], capture_output=True, text=True)
    assert answer.returncode != 0
    assert "torch" in answer.stderr


def test_api_import_time_report_shows_no_torch() -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import service.api.app"], capture_output=True, text=True, check=True
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in answer.stderr.splitlines()}
    assert "fastapi" in imported
    assert not {name for name in imported if name.split(".")[0] in {"torch", "transformers", "torchvision", "vlmeval"}}


def test_no_file_is_longer_than_400_lines() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for package in (*PACKAGES, "benchmarks", "tests")
        for path in (REPOSITORY / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long
