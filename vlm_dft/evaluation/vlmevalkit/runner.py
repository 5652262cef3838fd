"""VLMEvalKit's process: started by its own Python, this file makes it usable here and then hands over to its run.py.

    python runner.py check ROOT MODULE...      JSON: which modules are absent, which versions are there
    python runner.py run ROOT [run.py's arguments]

Nothing but the standard library is imported before it is known what to do; VLMEvalKit is imported here and nowhere
else, by name, since no process of ours may. The package ``vlm_dft`` is taken from where this file lies, without the
packages beside it: those are of another environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

_VERSIONS = ("torch", "torchvision", "transformers", "peft", "pillow", "qwen-vl-utils", "pandas", "numpy")
_SCORING_VERSIONS = ("latex2sympy2-extended", "sympy")
MODEL_CLASS = "VlmDftModel"
KEY_VARIABLE = "VLM_DFT_JUDGE_API_KEY"
JUDGE_VARIABLE = "VLM_DFT_JUDGE_RULES"
"""Names judge.json; both are taken out of the environment before VLMEvalKit can look."""


def check(modules: list[str]) -> dict[str, object]:
    """Looks for modules without importing any."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this Python is not the one that the project is installed in)
        raise SystemExit(f"Python {sys.version.split()[0]} is too old")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    versions = {}
    for name in (*_VERSIONS, *_SCORING_VERSIONS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {"missing": missing, "versions": versions}


def load_our_package() -> None:
    """Make ``import vlm_dft`` find the package around this file, and nothing else beside it."""
    directory = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        directory.name, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[directory.name] = package
    spec.loader.exec_module(package)


def run(root: Path, arguments: list[str]) -> None:
    """VLMEvalKit's run.py, with our model class and our shims."""
    load_our_package()
    from vlm_dft.watchdog import die_with_parent

    die_with_parent()
    from vlm_dft.evaluation.vlmevalkit import guards, shims
    from vlm_dft.evaluation.vlmevalkit.judge_requests import JudgeRules
    from vlm_dft.evaluation.vlmevalkit.model import AnsweringModel

    sys.path.insert(0, str(root))
    shims.install()
    importlib.import_module("vlmeval")
    setattr(importlib.import_module("vlmeval.vlm"), MODEL_CLASS, AnsweringModel)
    key, judge = (os.environ.pop(name, None) for name in (KEY_VARIABLE, JUDGE_VARIABLE))
    guards.install(JudgeRules.model_validate_json(Path(judge).read_bytes()) if judge else None, key)
    sys.argv = [str(root / "run.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    action, root, *rest = sys.argv[1:]
    if action == "check":
        print(json.dumps(check(rest)))
    else:
        run(Path(root), rest)


if __name__ == "__main__":
    main()
