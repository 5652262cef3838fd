"""A report card as one HTML file. Everything in it that is not ours is text, and escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from service.api.evaluations.items import find_picture
from service.api.reports.responses import ReportCard

THUMBNAIL_PIXELS = 320
"""Of the longer side."""


@lru_cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "-" if value is None else f"{100 * value:.1f} %"
    environment.filters["points"] = lambda value: "-" if value is None else f"{100 * value:+.1f}"
    environment.filters["listed"] = _listed
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))


def _listed(value: Any) -> str:
    """Names and values of a mapping in one line; anything else as it is."""
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)


def page(card: ReportCard, run_paths: Sequence[Path]) -> str:
    """run_paths: of the job's attempts, oldest first, where the items' pictures are."""
    pictures = {
        (each.benchmark, item.item_id): _thumbnail(run_paths, each.benchmark, item.item_id)
        for each in card.benchmarks
        for item in each.samples
        if item.image_url is not None
    }
    return _template().render(card=card, pictures=pictures, settings=json.dumps(card.settings, indent=2))


def _thumbnail(run_paths: Sequence[Path], benchmark: str, item_id: str) -> str | None:
    """A data URI; None where the picture is gone."""
    found = find_picture(run_paths, benchmark, item_id)
    if found is None:
        return None
    # It was decoded within limits when the item was asked: this is the same file.
    with Image.open(found[0]) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
