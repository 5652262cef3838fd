"""The process that opens what users sent: its memory, and what it may load. Torch-free.

Covered: memory, so that a bomb that slips through a check ends as an error of its row. Not covered: time, which is the
worker's matter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Let the process grow by no more than this many bytes of address space; a larger allocation is a MemoryError.

    Relative to what is mapped now, so that libraries already loaded do not count; only the soft limit is lowered, and
    it is put back. Does nothing outside Linux, where RLIMIT_AS is not reliable.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + more_bytes
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *allowed]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def keep_torch_out() -> None:
    """Let transformers load without torch in `python -m vlm_dft`, where a validation is all that the process does.

    transformers imports torch wherever it is installed, which costs seconds and gigabytes of address space. Elsewhere
    this does nothing: whoever calls validate as a library may want torch later.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name == "vlm_dft.__main__" and not {"torch", "transformers"} & sys.modules.keys():
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # how Python marks a module as absent
