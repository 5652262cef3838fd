"""From one record to one canonical row: parse, open its pictures, and only then keep them. Torch-free.

``prepare`` may run in threads, because decoding pictures is most of the work; the rest runs in order. Nothing is
written for a row that is not valid.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dft.config import DatasetFormat, ValidationConfig
from vlm_dft.data.canonical import IMAGES_NAME, ImagePart, Message, Row, TextPart
from vlm_dft.data.decoder import Decoders
from vlm_dft.data.draft import Draft, Picture, Turn, check, check_text
from vlm_dft.data.formats import PARSERS
from vlm_dft.data.images import ImageInfo, decode_data_uri, inspect, read_image
from vlm_dft.data.problems import RowError, shown
from vlm_dft.data.source import Source
from vlm_dft.data.template import ChatTemplate
from vlm_dft.run_dir import disk_errors


@dataclass(frozen=True)
class OpenedPicture:
    """A picture that was decoded, and where its bytes are."""

    info: ImageInfo
    content: bytes | Path

    def part(self, source: Source) -> ImagePart:
        info = self.info
        if source.copies or isinstance(self.content, bytes):
            name = f"{IMAGES_NAME}/{info.sha256}.{info.extension}"
        else:
            name = source.relative(self.content)
        return ImagePart(image=name, sha256=info.sha256, width=info.width, height=info.height)


@dataclass(frozen=True)
class Prepared:
    """A row that is valid but for its tokens, and its pictures."""

    row: Row
    draft: Draft
    pictures: tuple[OpenedPicture, ...]


@dataclass(frozen=True)
class RowReader:
    """Turns records into rows, for one source."""

    config: ValidationConfig
    source: Source
    format: DatasetFormat
    decoders: Decoders | None = None
    """None: pictures are decoded in this process."""

    def prepare(self, record: dict[str, Any], number: int) -> Prepared:
        """Raises RowError."""
        draft = PARSERS[self.format](record).with_system(self.config.system_prompt)
        check(draft, self.config.limits)
        opened = {picture: self._open(picture) for picture in draft.pictures}
        messages = tuple(self._message(turn, opened) for turn in draft.turns)
        for name, text in (("answer", draft.answer), ("category", draft.category)):
            check_text(text or "", name)
        row = Row(id=f"{self.source.name}:{number}", messages=messages, answer=draft.answer, category=draft.category)
        return Prepared(row, draft, tuple(opened.values()))

    def _message(self, turn: Turn, opened: dict[Picture, OpenedPicture]) -> Message:
        parts = [
            TextPart(text=part) if isinstance(part, str) else opened[part].part(self.source) for part in turn.content
        ]
        return Message(role=turn.role, content=tuple(parts), train=turn.train)

    def _open(self, picture: Picture) -> OpenedPicture:
        limits = self.config.limits
        embedded = self._embedded(picture)
        content = self.source.picture_path(picture) if embedded is None else embedded
        data = content if isinstance(content, bytes) else read_image(content, picture.field, limits)
        if self.decoders is not None:
            return OpenedPicture(self.decoders.inspect(data, picture.field), content)
        return OpenedPicture(inspect(data, picture.field, limits, self.config.pixels), content)

    def _embedded(self, picture: Picture) -> bytes | None:
        """Bytes of a data: URI or an https URL; None for a path."""
        reference, limits = picture.reference, self.config.limits
        is_url = reference.lower().startswith(("http://", "https://"))
        if not is_url and not reference.startswith("data:"):
            return None
        if is_url and not self.config.allow_image_urls:
            reason = f"{shown(reference)} is a URL; this server fetches none: send the image itself"
            raise RowError(picture.field, "image_url_refused", reason)
        if not self.source.copies:
            reason = "pictures of a registered directory must be files in it: nothing is written there"
            raise RowError(picture.field, "embedded_image_in_directory", reason)
        if is_url:
            from vlm_dft.data.fetch import Fetcher  # httpcore, which a machine that only trains may lack

            fetcher = Fetcher(limits.max_image_bytes, domains=self.config.image_url_domains)
            return fetcher.fetch(reference, picture.field)
        return decode_data_uri(reference, picture.field, limits)


def count_tokens(prepared: Prepared, template: ChatTemplate) -> Row:
    """The row with its token counts. Raises RowError for the row, ModelError for the template."""
    try:
        rendered = template.render(prepared.row)
    except RowError as error:
        field = prepared.draft.turns[error.turn].field if error.turn is not None else error.field
        raise RowError(field, error.reason_code, error.reason) from None
    update = {"text_tokens": rendered.text_tokens, "supervised_tokens": rendered.supervised_tokens}
    return prepared.row.model_copy(update=update)


def keep_pictures(prepared: Prepared, target: Path) -> None:
    """Write the row's pictures into a dataset directory, each content once. Raises DiskFullError."""
    for picture in prepared.pictures:
        path = target / IMAGES_NAME / f"{picture.info.sha256}.{picture.info.extension}"
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        with disk_errors(path):
            if isinstance(picture.content, Path):
                _link_or_copy(picture.content, path)
            else:
                path.write_bytes(picture.content)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # unpacked by us, on the same disk
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV):  # file systems without hard links
            raise
        shutil.copyfile(source, target)


def content_digest(row: Row) -> bytes:
    """Hash of what a row teaches: turns, pictures by content, answer and category; not its place or token counts."""
    turns = [
        [
            message.role,
            message.train,
            [part.sha256 if isinstance(part, ImagePart) else [part.text] for part in message.content],
        ]
        for message in row.messages
    ]
    content = json.dumps([turns, row.answer, row.category], ensure_ascii=False)
    return hashlib.sha256(content.encode()).digest()
