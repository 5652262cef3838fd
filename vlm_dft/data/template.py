"""How a row becomes chat-template text and token ids, and which of them are supervised. Torch-free.

The only place that knows it: token statistics, training and evaluation all come through here, so a count is a promise.
Knows nothing about pixels: each picture stands as one image token, which the encoder repeats as the picture needs.

Two rules hold for any chat template, or an error is raised:

* An assistant turn is supervised from where the generation prompt ends to its end-of-turn token, that token included.
* Text cannot act as structure: a row whose text holds one of the tokenizer's special tokens is refused.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vlm_dft.data.canonical import ImagePart, Message, Row, TextPart
from vlm_dft.data.problems import RowError, shown
from vlm_dft.errors import ModelError

VARIABLES = {"date_string": "26 Jul 2024"}
"""Llama's templates print today's date unless told one: a sample must not change at midnight."""


@dataclass(frozen=True)
class Rendered:
    """One row as token ids, before image tokens are repeated."""

    text: str
    input_ids: list[int]
    supervised: list[bool]
    """Per token: whether it is a label (as the token to be predicted)."""
    image_positions: list[int]
    """Index of each picture's one token, in the order of Row.images."""
    spans: list[tuple[int, int]]
    """Of each token in the text: its first character and the one after its last."""

    @property
    def text_tokens(self) -> int:
        """Tokens without the pictures' own."""
        return len(self.input_ids) - len(self.image_positions)

    @property
    def supervised_tokens(self) -> int:
        return sum(self.supervised)


def template_messages(messages: Sequence[Message], *, vision: bool, row: str | None = None) -> list[dict[str, Any]]:
    """Messages as chat templates take them: content lists for vision models, plain strings for text models.

    Raises RowError for a picture that a text model cannot see.
    """
    if vision:
        return [{"role": message.role, "content": [_part(part) for part in message.content]} for message in messages]
    out = []
    for index, message in enumerate(messages):
        if any(isinstance(part, ImagePart) for part in message.content):
            reason = "the row has a picture, but the model is a text model: choose a vision model or remove the picture"
            raise RowError(f"messages.{index}.content", "image_for_text_model", reason, row=row, turn=index)
        out.append({"role": message.role, "content": text_of(message)})
    return out


def text_of(message: Message) -> str:
    """The turn's text without its pictures."""
    return "".join(part.text for part in message.content if isinstance(part, TextPart))


def _part(part: TextPart | ImagePart) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}


@dataclass(frozen=True)
class ChatTemplate:
    """A fast tokenizer with the chat template of one model."""

    tokenizer: Any
    source: str
    """The template itself (Jinja)."""
    vision: bool
    """Whether it takes content lists with pictures."""
    image_token: str | None = None

    @classmethod
    def of(cls, processor: Any) -> ChatTemplate:
        """Of a transformers processor (vision model) or tokenizer (text model). Raises ModelError."""
        tokenizer = getattr(processor, "tokenizer", processor)
        vision = tokenizer is not processor
        image_token = getattr(processor, "image_token", None) if vision else None
        source = getattr(processor, "chat_template", None) or tokenizer.chat_template
        return cls.checked(tokenizer, source, vision=vision, image_token=image_token)

    @classmethod
    def checked(cls, tokenizer: Any, source: Any, *, vision: bool, image_token: str | None) -> ChatTemplate:
        """Raises ModelError when the tokenizer or the template cannot do what training needs."""
        if not isinstance(source, str):
            raise ModelError("the model's tokenizer has no chat template: use an instruction-tuned model, or add one")
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the model's tokenizer gives no character offsets: a tokenizer.json is needed")
        if vision and (
            not image_token or tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id)
        ):
            raise ModelError(f"the model's tokenizer has no image token {image_token!r}")
        return cls(tokenizer, source, vision, image_token)

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Strings that the tokenizer reads as structure."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return frozenset(added | set(self.tokenizer.all_special_tokens))

    def render(self, row: Row) -> Rendered:
        """Text, ids and label mask of a row. Raises RowError for the row, ModelError for the template."""
        return self._render(row.messages, row.id, add_generation_prompt=False)

    def render_prompt(self, messages: Sequence[Message], row: str | None = None) -> Rendered:
        """The same up to where the model starts to answer; nothing is supervised."""
        return self._render(messages, row, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], row: str | None, *, add_generation_prompt: bool) -> Rendered:
        self._refuse_special_tokens(messages, row)
        chat = template_messages(messages, vision=self.vision, row=row)
        text = self._text(chat, row, add_generation_prompt=add_generation_prompt)
        turns = [] if add_generation_prompt else self._assistant_spans(messages, chat, text, row)
        input_ids, spans = self._tokenize(text, [start for start, _, _ in turns], row)
        supervised = [False] * len(input_ids)
        firsts, lasts = [first for first, _ in spans], [last for _, last in spans]
        for start, end, train in turns:
            if train:  # the tokens from start to end: both lists only grow
                inside = slice(bisect_left(firsts, start), bisect_right(lasts, end))
                supervised[inside] = [True] * max(0, inside.stop - inside.start)
        return Rendered(text, input_ids, supervised, self._image_positions(input_ids, messages), spans)

    def _refuse_special_tokens(self, messages: Sequence[Message], row: str | None) -> None:
        for index, message in enumerate(messages):
            text = text_of(message)
            for token in self.special_tokens:
                if token in text:
                    reason = f"the text holds {token!r}, which the model reads as structure: reword it"
                    raise RowError(f"messages.{index}.content", "special_token_in_text", reason, row=row, turn=index)

    def _text(self, chat: list[dict[str, Any]], row: str | None, *, add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                chat,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **VARIABLES,
            )
        except TemplateError as error:  # the template's own raise_exception: roles it does not take
            raise RowError(
                "messages", "template_refused", f"the chat template refuses the row: {error}", row=row
            ) from None
        except TypeError as error:
            raise ModelError(f"the chat template cannot take this kind of content: {error}") from None

    def _assistant_spans(
        self, messages: Sequence[Message], chat: list[dict[str, Any]], text: str, row: str | None
    ) -> list[tuple[int, int, bool]]:
        """(start, end, train) of each assistant turn in the text: its content and its end-of-turn token."""
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._text(chat[:index], row, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ModelError(
                    f"the chat template renders the turns before turn {index} differently once it is there, so that no "
                    "label mask fits: use the model family's standard template"
                )
            start = len(prompt)
            token, content_end = self._next_special_token(text, start)
            if text[start:content_end].strip() != text_of(message).strip():
                raise ModelError(
                    f"the chat template changes the assistant's text: {shown(text_of(message))} became "
                    f"{shown(text[start:content_end])}"
                )
            spans.append((start, content_end + len(token), message.train))
        return spans

    def _next_special_token(self, text: str, start: int) -> tuple[str, int]:
        found = [(text.find(token, start), -len(token), token) for token in self.special_tokens]
        found = [entry for entry in found if entry[0] >= 0]
        if not found:
            raise ModelError(
                "the chat template ends an assistant turn without a special token: the model could never stop"
            )
        position, _, token = min(found)
        return token, position

    def _tokenize(self, text: str, starts: list[int], row: str | None) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans. An assistant turn starts with a token of its own, as it does in generation."""
        input_ids, spans = self._ids(text, 0)
        if not any(first < start < last for start in starts for first, last in spans):
            return input_ids, spans
        # A tokenizer may join the template's last line break with one that opens the answer ("\n" + "\n" is one token).
        # In generation the prompt is tokenized alone, so here, too, the text is cut where the answer starts.
        input_ids, spans = [], []
        for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
            piece_ids, piece_spans = self._ids(text[start:end], start)
            input_ids += piece_ids
            spans += piece_spans
        whole = self.tokenizer.decode(self._ids(text, 0)[0], clean_up_tokenization_spaces=False)
        if self.tokenizer.decode(input_ids, clean_up_tokenization_spaces=False) != whole:
            reason = "the answer opens with white space that the tokenizer joins with the template's: remove it"
            raise RowError("messages", "leading_white_space", reason, row=row)
        return input_ids, spans

    def _ids(self, text: str, offset: int) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [
            (first + offset, last + offset) for first, last in encoded["offset_mapping"]
        ]

    def _image_positions(self, input_ids: list[int], messages: Sequence[Message]) -> list[int]:
        if self.image_token is None:
            return []
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        positions = [index for index, token in enumerate(input_ids) if token == image_id]
        pictures = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
        if len(positions) != pictures:
            raise ModelError(f"the chat template renders {len(positions)} image tokens for {pictures} pictures")
        return positions


def render(processor: Any, row: Row) -> Rendered:
    """Rendered row of a transformers processor or tokenizer; keep a ChatTemplate where many rows are rendered."""
    return ChatTemplate.of(processor).render(row)
