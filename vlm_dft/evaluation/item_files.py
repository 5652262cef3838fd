"""The items that a run asked, kept in its directory: whoever shows a prediction needs question and picture. Torch-free.

    evaluation/items/<benchmark>/
    ├── items.jsonl            one ItemRecord per line, in the benchmark's order, written last
    └── pictures/<sha256>      encoded as the benchmark has them, each once

The benchmark's own file may be replaced or gone by the time somebody looks. Pictures are hard links to one copy that
all runs share, where the disk can do that: a copy without a second link is no run's. Knows nothing about answers.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vlm_dft.config import EvalConfig
from vlm_dft.evaluation.items import Benchmark, Item, Picture
from vlm_dft.results import Record
from vlm_dft.run_dir import RunDir, disk_errors, write_atomically

ITEMS_NAME = "items.jsonl"
PICTURES_NAME = "pictures"


class PictureRecord(Record):
    """What a reader must know to show it."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    media_type: Annotated[str, Field(pattern=r"^image/[a-z0-9.+-]+$")]
    width: int
    height: int


class ItemRecord(Record):
    """One item as it was asked."""

    id: str
    group: str = ""
    """Items that are scored or sampled together: a problem's versions, a We-Math step group."""
    question: str
    """Without instructions where the benchmark's file has it apart."""
    options: dict[str, str]
    """Letter -> text; empty for a free-form question."""
    categories: dict[str, str]
    answer: str
    picture: PictureRecord | None


def pictures_dir(config: EvalConfig) -> Path | None:
    """Of the copies that runs share; None where they share nothing."""
    return config.score_cache / PICTURES_NAME if config.score_cache else None


def keep_items(run: RunDir, name: str, benchmark: Benchmark, shared: Path | None) -> None:
    """Write what is not there yet. shared: directory of the copies that runs share.

    Raises BenchmarkError for a picture that is not one, DiskFullError.
    """
    directory = run.items_path(name)
    with disk_errors(directory):
        (directory / PICTURES_NAME).mkdir(parents=True, exist_ok=True)
    lines = [_record(item, directory / PICTURES_NAME, shared).model_dump_json() + "\n" for item in benchmark.items]
    write_atomically(directory / ITEMS_NAME, "".join(lines).encode())


def _record(item: Item, directory: Path, shared: Path | None) -> ItemRecord:
    picture = None
    if item.picture is not None:
        data = item.picture.encoded()
        picture = _picture_record(item.picture, data)
        _keep(data, directory / picture.sha256, shared / picture.sha256 if shared else None)
    return ItemRecord(
        id=item.id,
        group=item.group,
        question=item.asked,
        options=dict(item.options),
        categories=dict(item.categories),
        answer=item.answer,
        picture=picture,
    )


def _picture_record(picture: Picture, data: bytes) -> PictureRecord:
    width, height = picture.size()
    sha256 = hashlib.sha256(data).hexdigest()
    return PictureRecord(sha256=sha256, media_type=picture.media_type(), width=width, height=height)


def _keep(data: bytes, path: Path, shared: Path | None) -> None:
    """The picture at path, by a link to its shared copy where that can be."""
    if path.exists():
        return
    if shared is not None:
        with disk_errors(shared):
            shared.parent.mkdir(parents=True, exist_ok=True)
        if not shared.exists():
            write_atomically(shared, data)
        try:
            os.link(shared, path)
        except OSError:  # another disk, one without links, or the copy was just evicted
            pass
        else:
            return
    write_atomically(path, data)
