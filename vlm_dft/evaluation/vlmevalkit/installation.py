"""Where VLMEvalKit is, which commit of it, and whether what it needs is installed beside it. Torch-free.

VLM_DFT_VLMEVAL_PYTHON names the Python of its own virtual environment, VLM_DFT_VLMEVAL_ROOT its checkout. They are
looked at by starting that Python once (under a second): nothing of VLMEvalKit or torch is imported, there or here. Not
covered: whether the versions found work together; a run would say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

PYTHON_VARIABLE: Final = "VLM_DFT_VLMEVAL_PYTHON"
ROOT_VARIABLE: Final = "VLM_DFT_VLMEVAL_ROOT"
RUNNER: Final = Path(__file__).with_name("runner.py")
CHECK_SECONDS: Final = 60.0
SOURCE: Final = "https://github.com/open-compass/VLMEvalKit"
COMMIT: Final = "e8e78f05f3080fe28154f2130321f17951c3be94"
"""What the image installs, and what our rules were compared with. Scores by another commit are not comparable."""

# Module -> what pip calls it. VLMEvalKit imports all of its benchmarks at once, so most of these are for others than
# ours; its own requirements.txt names a hundred more.
REQUIREMENTS: Final[dict[str, str]] = {
    **{name: name for name in ("accelerate", "datasets", "decord", "huggingface_hub", "imageio", "jieba", "joblib")},
    **{name: name for name in ("json_repair", "Levenshtein", "math_verify", "nltk", "num2words", "numpy", "openai")},
    **{name: name for name in ("openpyxl", "pandas", "portalocker", "pylatexenc", "requests", "rouge", "rouge_score")},
    **{name: name for name in ("scipy", "sty", "tabulate", "termcolor", "timeout_decorator", "torch", "torchvision")},
    **{name: name for name in ("tqdm", "transformers", "validators", "xlsxwriter")},
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "dotenv": "python-dotenv",
    "latex2sympy2_extended": "latex2sympy2-extended",
    "sklearn": "scikit-learn",
    # What our model class needs beside it.
    "jinja2": "jinja2",
    "peft": "peft",
    "pydantic": "pydantic",
    "qwen_vl_utils": "qwen-vl-utils",
    "safetensors": "safetensors",
}
_FILES = ("run.py", "vlmeval/__init__.py", "vlmeval/dataset/utils/wemath.py", "vlmeval/dataset/utils/mathv.py")
_SCORERS = ("vlmeval/dataset/image_vqa.py", "vlmeval/dataset/image_mcq.py", "vlmeval/utils/matching_util.py")


@dataclass(frozen=True)
class Installation:
    """A VLMEvalKit that can be started."""

    python: Path
    root: Path
    commit: str
    """8 digits, with -dirty where its files were changed; files-... where it is no git checkout."""
    versions: Mapping[str, str]
    """Of the packages that decide answers and scores, in its own environment."""

    @property
    def scorer(self) -> str:
        return f"vlmeval@{self.commit}"


@dataclass(frozen=True)
class Unavailable:
    """Why VLMEvalKit cannot be used, and what to do."""

    reason: str
    remedy: str
    is_configured: bool
    """Whether somebody meant to use it."""


def find_installation(environment: Mapping[str, str] = os.environ) -> Installation | Unavailable:
    """What the two variables point at, looked at."""
    python, root = environment.get(PYTHON_VARIABLE, ""), environment.get(ROOT_VARIABLE, "")
    if not (python and root):
        unset = [name for name in (PYTHON_VARIABLE, ROOT_VARIABLE) if not environment.get(name)]
        remedy = (
            f"clone {SOURCE} somewhere, check {COMMIT[:8]} out, make a virtual environment for it "
            f"({_pip('VENV/bin/python', REQUIREMENTS)}), "
            f"and set {PYTHON_VARIABLE}=VENV/bin/python and {ROOT_VARIABLE}=CHECKOUT"
        )
        reason = f"{' and '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set"
        return Unavailable(reason, remedy, is_configured=bool(python or root))
    return _look(Path(python).expanduser().absolute(), Path(root).expanduser().absolute())


@lru_cache(maxsize=8)
def _look(python: Path, root: Path) -> Installation | Unavailable:
    absent = [name for name in _FILES if not (root / name).is_file()]
    if absent:
        remedy = f"clone {SOURCE} and set {ROOT_VARIABLE} to it; run.py is not part of its wheel"
        return Unavailable(f"{root / absent[0]} does not exist", remedy, is_configured=True)
    found = _ask(python, root)
    if isinstance(found, str):
        remedy = f"set {PYTHON_VARIABLE} to the python of VLMEvalKit's virtual environment, 3.11 or later"
        return Unavailable(found, remedy, is_configured=True)
    if missing := found["missing"]:
        reason = f"{python} does not have {', '.join(missing)}"
        return Unavailable(reason, _pip(str(python), missing), is_configured=True)
    return Installation(python, root, _commit(root), found["versions"])


def _ask(python: Path, root: Path) -> dict[str, Any] | str:
    command = [str(python), str(RUNNER), "check", str(root), *REQUIREMENTS]
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONSAFEPATH": "1"}
    try:
        answer = subprocess.run(
            command, capture_output=True, timeout=CHECK_SECONDS, check=False, env=environment, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        return f"{python} cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{python} did not answer within {CHECK_SECONDS:g} seconds"
    try:
        return json.loads(answer.stdout)
    except ValueError:
        last = answer.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"{python} failed: {''.join(last) or f'exit code {answer.returncode}'}"


def _pip(python: str, modules: Mapping[str, str] | list[str]) -> str:
    # torch exactly as here: a looser pin would fetch another build, of gigabytes.
    names = sorted({REQUIREMENTS[module] for module in modules}, key=str.lower)
    return f"PIP_CONSTRAINT=constraints.txt {python} -m pip install {' '.join(names)}"


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=8", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHECK_SECONDS)
        described = answer.stdout.strip() if answer.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        described = ""
    if described and (root / ".git").exists():  # not the repository of a directory above
        return described
    digest = hashlib.sha256()
    for name in (*_FILES, *_SCORERS):
        path = root / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"files-{digest.hexdigest()[:8]}"


def main() -> int:
    """Say what was found; for whoever builds an image."""
    found = find_installation()
    if isinstance(found, Unavailable):
        print(f"{found.reason}: {found.remedy}", file=sys.stderr)
        return 1
    print(f"{found.scorer} in {found.root}, {', '.join(f'{name} {each}' for name, each in found.versions.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
