"""Token counts of validated rows, and the hash that says which tokenizer counted. Torch-free, transformers-free.

A row's count is exact for any pixel limits, because validation wrote its text tokens and picture sizes down. Counting
itself is ``tokenizer`` and ``template``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import ROWS_NAME, CanonicalDataset, Row
from vlm_dft.data.pixels import num_visual_tokens
from vlm_dft.errors import DatasetError, ModelError
from vlm_dft.results import RowProblem


def tokenizer_sha256(model_dir: str | Path) -> str:
    """Hash of what decides token counts: vocabulary, merges, added tokens and chat template. Raises ModelError.

    Of their content, not of the files' bytes: a fine-tuned model's export has its base's hash.
    """
    path = Path(model_dir)
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", *_TEMPLATES)
    stamps = tuple((name, _stamp(path / name)) for name in names)
    return _tokenizer_sha256(path, stamps)


@dataclass(frozen=True)
class _Stamp:
    size: int
    changed_ns: int


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _Stamp(status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _tokenizer_sha256(path: Path, stamps: tuple[tuple[str, _Stamp | None], ...]) -> str:
    present = {name for name, stamp in stamps if stamp}
    config = read_json(path / "tokenizer_config.json") if "tokenizer_config.json" in present else {}
    parts: dict[str, Any] = {"chat_template": chat_template(path) or config.get("chat_template")}
    if "tokenizer.json" in present:
        vocabulary = read_json(path / "tokenizer.json")
        # Padding and truncation are how a caller last used it, not what it is.
        parts["tokenizer"] = {key: value for key, value in vocabulary.items() if key not in ("padding", "truncation")}
    elif {"vocab.json", "merges.txt"} <= present:
        parts["vocabulary"] = read_json(path / "vocab.json")
        parts["merges"] = hashlib.sha256((path / "merges.txt").read_bytes()).hexdigest()
        parts["added_tokens"] = config.get("added_tokens_decoder")
    else:
        raise ModelError(f"{path} has neither tokenizer.json nor vocab.json and merges.txt")
    parts["special"] = {key: _token(config.get(key)) for key in ("bos_token", "eos_token")}  # templates print them
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def chat_template(path: Path) -> str | None:
    """The template beside the tokenizer, which goes before the one in tokenizer_config.json as in transformers."""
    jinja, older = (path / name for name in _TEMPLATES)
    if jinja.is_file():
        return jinja.read_text()
    return read_json(older).get("chat_template") if older.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: a model directory is needed") from None
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from None


def row_tokens(row: Row, pixels: PixelConfig) -> int:
    """Length of a validated row in the sequence, text and visual tokens together. Raises DatasetError."""
    if row.text_tokens is None:
        raise DatasetError(f"{row.id} has no token count: its file was validated without a tokenizer")
    return row.text_tokens + sum(num_visual_tokens(image.width, image.height, pixels) for image in row.images)


def overlong_rows(dataset: CanonicalDataset, pixels: PixelConfig, max_length_tokens: int) -> list[RowProblem]:
    """Rows longer than the limit. Valid for the tokenizer whose hash the manifest holds. Raises DatasetError."""
    found = []
    # Not through pydantic: a job's creation waits for this, and a large dataset has 100,000 rows.
    with (dataset.path / ROWS_NAME).open("rb") as file:
        for line in file:
            row = json.loads(line)
            if row["text_tokens"] is None:
                raise DatasetError(f"{row['id']} has no token count: its file was validated without a tokenizer")
            images = [part for message in row["messages"] for part in message["content"] if part["type"] == "image"]
            tokens = row["text_tokens"] + sum(
                num_visual_tokens(part["width"], part["height"], pixels) for part in images
            )
            if tokens > max_length_tokens:
                found.append(overlong(row["id"], tokens, max_length_tokens))
    return found


def overlong(row_id: str, tokens: int, max_length_tokens: int) -> RowProblem:
    """How a row that does not fit is listed."""
    file, _, line = row_id.rpartition(":")
    reason = f"the row has {tokens} tokens; max_length_tokens is {max_length_tokens}"
    return RowProblem(file=file, line=int(line), field="", reason=reason, code="sample_too_long")
