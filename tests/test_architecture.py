"""Who may import whom, checked twice: statically over every import, and by importing for real without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from throwaway import run_python

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


def test_what_must_run_without_torch_never_imports_it(tmp_path: Path) -> None:
    code = f"import sys, {', '.join(TORCH_FREE)}\nservice.api.app.create_app().openapi()\nprint(*sys.modules)"
    answer = run_python("-c", code, env={"VLM_DFT_DATA_DIR": str(tmp_path)})
    assert answer.returncode == 0, answer.stderr
    imported = {name.partition(".")[0] for name in answer.stdout.split()}
    assert {"fastapi", "celery", "sqlalchemy"} <= imported
    assert not imported & {"torch", "torchvision", "transformers", "peft", "accelerate", "vlmeval"}


def test_no_file_is_longer_than_400_lines() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for package in (*PACKAGES, "benchmarks", "tests")
        for path in (REPOSITORY / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long
