"""What must not be read in logs and errors: keys, tokens and passwords, wherever in a text they stand.

By their shape and by the name that they go under. A secret without either, such as a password in a sentence, is not
recognised: do not log what a user typed.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any, Final

HIDDEN: Final = "***"
_NAMES: Final = frozenset(
    {"authorization", "api_key", "key", "secret", "password", "token", "cookie", "set-cookie", "database_url"}
)
_SHAPES: Final = re.compile(
    r"vdft_[0-9a-z]{8,}(?:_[0-9a-f]{8})?"  # ours; the beginning that lists show is shorter
    r"|hf_[A-Za-z0-9]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}"
    r"|whsec_[A-Za-z0-9+/=_-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"  # JSON web tokens
    r"|(?<=[Bb]earer )[^\s\"',;]{6,}"
)
_IN_URL: Final = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")


def redacted(text: str) -> str:
    """The text without what looks like a secret."""
    return _SHAPES.sub(HIDDEN, _IN_URL.sub(f"{HIDDEN}:{HIDDEN}", text))


def redact_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog: after the exception was made text, before the line is written."""
    for name, value in event.items():
        if name.lower() in _NAMES:
            event[name] = HIDDEN
        elif isinstance(value, str):
            event[name] = redacted(value)
    return event
