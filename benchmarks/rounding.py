"""Numbers as they are printed and kept. Knows no benchmark."""

from __future__ import annotations

from typing import Any


def rounded(value: Any) -> Any:
    """Every float in it to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
