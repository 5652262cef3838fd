"""Import this before torchvision or transformers, so that PyPI's torchvision works beside a CPU build of torch.

    import vlm_dft.torchvision_shim  # noqa: F401

    # isort: split
    import torch
    from transformers import ...

PyPI's torchvision wheel links CUDA libraries that a CPU build of torch does not bring. Its compiled operators then fail
to load, it goes on without them, and its import fails where it registers meta kernels for `nms` and `qnms`, which by
then nobody has defined; every vision class of transformers fails with it. Defining the two schemas is enough for what
we use (tensor transforms). `torchvision.ops.nms` and `torchvision.io.read_image` stay unusable there, with clear
errors.

Where the compiled operators load, this module does nothing. It knows nothing about images.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _operators_load(library: Path) -> bool:
    try:
        torch.ops.load_library(library)  # a second load, torchvision's own, is harmless
    except OSError:
        return False
    return True


def _install() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")  # finds, does not import
    if spec is None or spec.origin is None:
        return None
    libraries = list(Path(spec.origin).parent.glob("_C*.so"))
    if not libraries or any(_operators_load(library) for library in libraries):
        return None
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        fragment.define(schema)
    return fragment


# Schemas live as long as the fragment that defined them.
FRAGMENT = _install()
