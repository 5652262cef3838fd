"""Which format a row is in, and its parser. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_dft.config import DatasetFormat
from vlm_dft.data import openai_chat, sharegpt, wethink
from vlm_dft.data.draft import Draft

PARSERS: dict[DatasetFormat, Callable[[dict[str, Any]], Draft]] = {
    "wethink": wethink.parse,
    "openai": openai_chat.parse,
    "sharegpt": sharegpt.parse,
}


def detect(record: dict[str, Any]) -> DatasetFormat | None:
    """The format of a row, from the fields it has; None when it is none of ours."""
    if record.keys() >= wethink.KEYS:
        return "wethink"
    if "conversations" in record:
        return "sharegpt"
    if "messages" not in record:
        return None
    # ShareGPT also calls its turns messages; its pictures are beside them, or its turns are from/value.
    messages = record["messages"]
    turns = messages if isinstance(messages, list) else []
    from_value = any(isinstance(turn, dict) and "from" in turn for turn in turns)
    return "sharegpt" if from_value or "images" in record or "image" in record else "openai"
