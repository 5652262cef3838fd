"""Whether every row of a file fits the job's length limit: exact, with its pixel limits, before it is queued."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from service import storage
from service.api.errors import DetailedRequestError
from service.jobs.models import ResolvedModel
from service.jobs.tables import File
from vlm_dft.config import PixelConfig, TrainConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.tokens import overlong_rows

_MAX_ROWS = 100


def check_lengths(file: File, train: TrainConfig, model: ResolvedModel, param: str) -> str | None:
    """None when every row is known to fit or may be left out; else a note on why the trainer will count instead.

    Raises DetailedRequestError (sample_too_long) listing the rows that do not fit.
    """
    if train.on_overlong == "drop":
        return None
    assert file.dataset_path is not None, f"{file.id}: a processed training file has a dataset"
    storage.look(Path(file.dataset_path))
    dataset = CanonicalDataset.open(Path(file.dataset_path))
    name, limit = train.sample_limit
    counted_with = dataset.manifest.tokenizer_sha256
    if counted_with is None or counted_with != model.tokenizer_sha256:
        return (
            f"{param} {file.id} was not counted with {model.name}'s tokenizer: the trainer counts before its first "
            f"step and fails there if a row is longer than {limit} tokens"
        )
    if _longest_row(file, train) <= limit or _fits(
        dataset.path, train.pixels.min_pixels, train.pixels.max_pixels, limit
    ):
        return None
    rows = overlong_rows(dataset, train.pixels, limit)
    first = ", ".join(f"{row.file}:{row.line}" for row in rows[:5])
    raise DetailedRequestError(
        f"{param}: {len(rows)} of {len(dataset)} rows of {file.id} are longer than {name} {limit} "
        f"({first}{', ...' if len(rows) > 5 else ''}; {rows[0].reason}): raise it, lower "
        'pixels.max_pixels, or set on_overlong to "drop" to leave these rows out',
        param=param,
        code="sample_too_long",
        details={"rows": [row.model_dump() for row in rows[:_MAX_ROWS]], "num_rows": len(rows)},
    )


@lru_cache(maxsize=1024)
def _fits(directory: Path, min_pixels: int, max_pixels: int, limit: int) -> bool:
    """Of a dataset, which does not change once it is there: the arms of a comparison ask for the same one by one."""
    pixels = PixelConfig(min_pixels=min_pixels, max_pixels=max_pixels)
    return not overlong_rows(CanonicalDataset.open(directory), pixels, limit)


def _longest_row(file: File, train: TrainConfig) -> float:
    """What validation found, if it counted with the job's pixel limits; else infinity: count again."""
    tokens = (file.validation_report or {}).get("tokens")
    if tokens and (tokens["min_pixels"], tokens["max_pixels"]) == (train.pixels.min_pixels, train.pixels.max_pixels):
        return tokens["total"]["max"]
    return float("inf")
