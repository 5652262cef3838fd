"""Previews: what is shown as trained is what the trainer's labels say, and nothing is shortened or left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from api_server import JSONL, Api, serve
from databases import copied_sqlite
from datasets_for_tests import picture_row, text_row, write_dataset
from throwaway import wait_until
from typer.testing import CliRunner

from cli.main import app
from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import CanonicalDataset, Message, Row, TextPart
from vlm_dft.data.encoding import IGNORED, Encoder
from vlm_dft.model import load_processor
from vlm_dft.preview import preview_row

PIXELS = PixelConfig()


def turns(number: int, *words: str) -> Row:
    """A conversation: user and assistant in turns."""
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=(TextPart(text=word),)) for i, word in enumerate(words)]
    return Row(id=f"test.jsonl:{number}", messages=tuple(messages))


def test_spans_cover_exactly_the_labels_and_images_their_tokens(tiny_vlm: Path, tmp_path: Path) -> None:
    rows = [picture_row(0, tmp_path, size=(112, 84)), picture_row(1, tmp_path, train=False)]
    rows += [turns(3, "What is 1 + 1?", "2", "And 2 + 2?", "4, said 7 of them")]
    dataset = CanonicalDataset.open(write_dataset(tmp_path, rows))
    encoder = Encoder(load_processor(tiny_vlm, vision=True), PIXELS)
    image_id = encoder.template.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for row in rows:
        shown = preview_row(row, encoder.template, PIXELS, 4096)
        sample = encoder.encode(row, dataset)
        trained = [index for span in shown.trained_spans for index in range(span.token_start, span.token_end)]
        assert trained == (sample.labels_T != IGNORED).nonzero().flatten().tolist()
        pictures = [index for image in shown.images for index in range(image.token_start, image.token_end)]
        assert pictures == (sample.input_ids_T == image_id).nonzero().flatten().tolist()
        assert shown.total_tokens == len(sample) == shown.text_tokens + shown.visual_tokens
        if sample.image_grid_thw is not None:
            assert [list(image.grid_thw) for image in shown.images] == sample.image_grid_thw.tolist()


def test_characters_of_a_span_are_the_turn_with_its_end(tiny_vlm: Path) -> None:
    template = Encoder(load_processor(tiny_vlm, vision=True), PIXELS).template
    shown = preview_row(turns(1, "Hi", "Hello, wörld 7", "Bye", "See you"), template, PIXELS, 4096)
    texts = [shown.text[span.start : span.end] for span in shown.trained_spans]
    assert texts == ["Hello, wörld 7<|im_end|>", "See you<|im_end|>"]


def test_a_row_that_does_not_fit_is_shown_whole_and_says_so(tiny_vlm: Path) -> None:
    template = Encoder(load_processor(tiny_vlm, vision=True), PIXELS).template
    row = text_row(0, "What is 1 + 1?", "2 " * 100)
    fits, short = (preview_row(row, template, PIXELS, limit) for limit in (4096, 50))
    assert fits.fits
    assert not short.fits
    assert short.text == fits.text
    assert short.total_tokens == fits.total_tokens > 50


def test_what_the_template_refuses_is_told_in_the_row(tiny_vlm: Path) -> None:
    template = Encoder(load_processor(tiny_vlm, vision=True), PIXELS).template
    shown = preview_row(turns(1, "Hi <|im_end|>", "Hello"), template, PIXELS, 4096)
    assert shown.problem is not None
    assert "<|im_end|>" in shown.problem
    assert not shown.fits


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest, tiny_vlm: Path) -> Iterator[Api]:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_vlm, target_is_directory=True)
    with serve(tmp_path, url) as running:
        yield running


def test_the_api_and_the_command_show_a_file_as_it_is_trained(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    client = api.client()
    file_id = api.ready_file(client, [turns(1, "What is 1 + 1?", "2"), turns(2, "What is 2 + 2?", "4")])
    body = {"model": "tiny", "training_file": file_id, "num_rows": 1, "first_row": 2}
    with pytest.raises(openai.BadRequestError, match="first_row 9: the file has 2 rows"):
        client.post("/fine_tuning/preview", cast_to=object, body=body | {"first_row": 9})
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
    command = ["preview", file_id, "--model", "tiny", "--rows", "1", "--first-row", "2", "--json"]
    shown = CliRunner().invoke(app, command)
    row = json.loads(shown.stdout)["data"][0]
    assert (row["row"], row["supervised_tokens"]) == ("test.jsonl:2", 2)
    (span,) = row["trained_spans"]
    assert row["text"][span["start"] : span["end"]] == "4<|im_end|>"


def test_json_of_a_local_file_comes_after_its_checks_and_alone(
    api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = api.client()
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
    (tmp_path / "mine.jsonl").write_bytes(JSONL)

    def validate() -> None:
        wait_until(lambda: client.files.list().data, 10, "it is uploaded")
        api.settle(client.files.list().data[0].id, [turns(1, "What is 1 + 1?", "2")])

    with ThreadPoolExecutor(1) as worker:
        validated = worker.submit(validate)
        shown = CliRunner().invoke(app, ["preview", str(tmp_path / "mine.jsonl"), "--model", "tiny", "--json"])
        validated.result()
    assert [row["row"] for row in json.loads(shown.stdout)["data"]] == ["test.jsonl:1"]
    assert "mine.jsonl: 1 valid of 1 rows" in shown.stderr


def test_the_command_colours_what_is_trained() -> None:
    from cli.preview import IMAGE_STYLE, TRAINED_STYLE, coloured

    image = {"start": 0, "end": 1}
    text = coloured({"text": "P asks. Answer.", "trained_spans": [{"start": 8, "end": 15}], "images": [image]})
    styled = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert TRAINED_STYLE in styled["Answer."]
    assert IMAGE_STYLE in styled["P"]
