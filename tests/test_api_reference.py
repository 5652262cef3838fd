"""The API reference in docs/ is what the service serves."""

from __future__ import annotations

import re

from service.api.reference import PATH, reference


def test_docs_say_what_is_served() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run python -m service.api.reference"


def test_every_field_of_a_request_is_explained() -> None:
    _, bodies = reference().split("## Request bodies")
    rows = [line.split(" | ") for line in bodies.splitlines() if line.startswith("| `")]
    # A type that is linked, and a name of one value, explain themselves.
    bare = [
        name for name, kind, told in rows if kind[0] != "[" and kind not in ("`full`", "`lora`") and not _words(told)
    ]
    assert len(rows) > 150
    assert bare == []


def _words(told: str) -> str:
    """What is said beside limits and default."""
    return re.sub(r"(At least|At most|Above|Below) [^.]*(\.\d[^.]*)*\.|Default: `[^`]*`\.|\|", "", told).strip()
