"""The API reference in docs/ is what the service serves."""

from __future__ import annotations

from service.api.reference import PATH, reference


def test_docs_say_what_is_served() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run python -m service.api.reference"
