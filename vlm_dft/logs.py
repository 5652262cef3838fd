"""The lines of log.txt: what a run's processes say, each line with the ids of job, attempt and request. Torch-free."""

from __future__ import annotations

import logging
import sys

from vlm_dft.config import RunConfig

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure(level: int) -> None:
    """Log to stdout, which whoever starts a run redirects to its log.txt."""
    logging.basicConfig(level=level, format=_FORMAT, stream=sys.stdout)


def name_lines(config: RunConfig) -> None:
    """From now on each line says which attempt at which job it belongs to; a run by hand has no such ids."""
    supervision = config.supervision
    if supervision is None:
        return
    ids = {"job": config.run_id, "attempt": supervision.attempt, "request": supervision.request_id}
    words = " ".join(f"{name}={value}" for name, value in ids.items() if value is not None)
    formatter = logging.Formatter(_FORMAT.replace("%(name)s", f"%(name)s [{words.replace('%', '%%')}]"))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
