"""What must be true of libraries before VLMEvalKit is imported. In VLMEvalKit's process only; nothing of it is edited.

pandas    read_csv guesses types: an answer "NA", "007" or "" would become NaN or 7, and end the scoring or change
          it. The columns that hold text are text. DataFrame._append is gone since 3.0; VLMEvalKit calls it.
numpy     np.float_ and np.complex_ are gone since numpy 2.0; VLMEvalKit's JSON encoder names them.
dotenv    A .env file beside VLMEvalKit would replace the environment that we made for it.
CUDA      run.py reads CUDA_VISIBLE_DEVICES as integers; a UUID or a MIG device ends it.
torchvision   See ``vlm_dft.torchvision_shim``, which must come before it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_TEXT = ("question", "query_cot", "answer", "choices", "key", "ID", "item", "image_path", "metadata", "category")
_WRITTEN = ("prediction", "extract", "log_extract", "log_score", "res", "log", "question_for_eval", "problem_version")
_OR_ABSENT = (*"ABCDEFGH", "hint", "requirement")
"""Here an empty cell means that there is none."""


def install() -> None:
    """All of them."""
    read_text_as_text()
    restore_append()
    restore_numpy_names()
    ignore_env_files()
    number_devices()
    sys.meta_path.insert(0, BeforeTorchvision())


class BeforeTorchvision(MetaPathFinder):
    """Imports our shim when somebody imports torchvision; finds nothing itself."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import vlm_dft.torchvision_shim  # noqa: F401


def read_text_as_text() -> None:
    """In tab-separated files, which are benchmarks and predictions; score tables are left alone."""
    import pandas as pd  # pyright: ignore[reportMissingImports] - of VLMEvalKit's own environment

    plain: Callable[..., Any] = pd.read_csv
    options = {
        "dtype": dict.fromkeys((*_TEXT, *_WRITTEN, *_OR_ABSENT), str),
        "keep_default_na": False,
        "na_values": {name: [""] for name in _OR_ABSENT},
    }

    def read_csv(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **({**options, **kwargs} if kwargs.get("sep") == "\t" else kwargs))

    pd.read_csv = read_csv


def restore_append() -> None:
    import pandas as pd  # pyright: ignore[reportMissingImports] - of VLMEvalKit's own environment

    def append(self: pd.DataFrame, other: dict[str, Any], ignore_index: bool = False) -> pd.DataFrame:
        return pd.concat([self, pd.DataFrame([other])], ignore_index=ignore_index)

    if not hasattr(pd.DataFrame, "_append"):
        setattr(pd.DataFrame, "_append", append)  # noqa: B010  (a name that the stubs do not know)


def restore_numpy_names() -> None:
    import numpy as np

    for old, new in (("float_", np.float64), ("complex_", np.complex128)):
        if old not in vars(np):
            setattr(np, old, new)


def ignore_env_files() -> None:
    import dotenv

    dotenv.dotenv_values = lambda *args, **kwargs: {}


def number_devices() -> None:
    """Let torch see the devices by their names, then call them 0, 1, ... for whoever reads the variable later."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if all(name.strip().isdigit() for name in names):
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(number) for number in range(len(names)))
