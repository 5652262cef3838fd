"""The image that evaluates: it installs what the code looks for, at the commit that our rules were compared with.

Where VLM_DFT_VLMEVAL_ROOT is set, its steps are rehearsed with that checkout in the place of the network's.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from compose import read_compose
from test_compose_rehearsal import SECRETS

from vlm_dft.evaluation.vlmevalkit import installation
from vlm_dft.evaluation.vlmevalkit.installation import COMMIT, REQUIREMENTS, SOURCE

ROOT = Path(__file__).parent.parent
REQUIREMENTS_FILE = Path(installation.__file__).with_name("requirements.txt")


def stage(name: str) -> str:
    """The Dockerfile's lines of one stage, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found = re.search(rf"^FROM (\S+) AS {name}\n(.*?)(?=^FROM |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[2]


def test_the_image_has_the_commit_that_the_rules_were_compared_with() -> None:
    assert f"ARG VLMEVAL_COMMIT={COMMIT}\n" in stage("eval")
    assert SOURCE in stage("eval")
    assert str(REQUIREMENTS_FILE.relative_to(ROOT)) in stage("eval")


def test_the_gpu_workers_environment_is_the_images() -> None:
    worker = read_compose(SECRETS)["services"]["gpu-worker"]
    assert worker["build"]["target"] == "eval"
    given = dict(re.findall(r"(VLM_DFT_VLMEVAL_\w+)=(\S+)", stage("eval")))
    assert given == {name: worker["environment"][name] for name in given}
    assert set(given) == {installation.PYTHON_VARIABLE, installation.ROOT_VARIABLE}


def test_everything_that_vlmevalkit_needs_is_pinned_once() -> None:
    def pinned(path: Path) -> set[str]:
        names = re.findall(r"^([A-Za-z0-9_.-]+)==", path.read_text(), re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

    shared, own = pinned(ROOT / "constraints.txt"), pinned(REQUIREMENTS_FILE)
    assert {name.lower().replace("_", "-") for name in REQUIREMENTS.values()} <= shared | own
    assert shared & own == set()


def test_the_last_step_of_the_image_fails_where_vlmevalkit_does_not_work(tmp_path: Path) -> None:
    command = stage("eval").rsplit("RUN python ", 1)[1].split()
    broken = {installation.PYTHON_VARIABLE: sys.executable, installation.ROOT_VARIABLE: str(tmp_path)}
    done = subprocess.run([sys.executable, *command], env=broken, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{tmp_path / 'run.py'} does not exist" in done.stderr


@pytest.mark.timeout(600)
def test_the_images_steps_make_a_vlmevalkit_that_works(tmp_path: Path, vlmeval_environment: dict[str, str]) -> None:
    """Replaced: paths, the repository by the checkout here, and pip's download by what the environment here has."""
    checkout = vlmeval_environment[installation.ROOT_VARIABLE]
    fetch, venv, check = (step.strip() for step in stage("eval").split("\nRUN ")[2:])
    here = {"/opt/vlmeval": str(tmp_path), SOURCE: checkout, "git config --system": "git config --file /dev/null"}
    steps = [fetch, venv.split("&&")[0]]
    for step in steps:
        for container, replacement in here.items():
            step = step.replace(container, replacement)
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "VLMEVAL_COMMIT": COMMIT}
        subprocess.run(["sh", "-ec", step], env=environment, check=True, cwd=ROOT)
    packages = next((tmp_path / "venv" / "lib").iterdir()) / "site-packages"
    others = Path(vlmeval_environment[installation.PYTHON_VARIABLE]).parent.parent / "lib" / packages.parent.name
    (packages / "image.pth").write_text(f"{others / 'site-packages'}\n")
    environment = {
        installation.PYTHON_VARIABLE: str(tmp_path / "venv" / "bin" / "python"),
        installation.ROOT_VARIABLE: str(tmp_path / "source"),
        "PATH": "/usr/bin:/bin",
    }
    words = check.splitlines()[0].split()[1:]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"vlmeval@{COMMIT[:8]} in {tmp_path / 'source'}, ")
