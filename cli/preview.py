"""`vlm-dft preview`: rows as the trainer will see them, what is trained in colour."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from cli.client import AsJson, connect, messages, out, post, print_json, readable_errors
from cli.requests import Looked, TrainingFile, put_pairs
from cli.submit import upload

TRAINED_STYLE = "bold green"
IMAGE_STYLE = "magenta"
PROMPT_STYLE = "dim"


def preview(
    training_file: TrainingFile,
    model: Annotated[str, typer.Option(help="Model whose chat template and tokenizer are used.")],
    rows: Annotated[int, typer.Option(min=1, max=20, help="How many rows.")] = 3,
    first_row: Annotated[int, typer.Option(min=1, help="1: the file's first one.")] = 1,
    setting: Looked = None,
    as_json: AsJson = False,
) -> None:
    """Print rows as they are trained: trained text green, pictures magenta, the rest dim."""
    with readable_errors():
        client = connect()
        file_id = upload(client, training_file, {"model": model}, messages(as_json))
        body = {"model": model, "training_file": file_id, "num_rows": rows, "first_row": first_row}
        put_pairs(body, setting or [])
        shown = post(client, "/fine_tuning/preview", body)
    if as_json:
        print_json(shown)
        return
    for row in shown["data"]:
        print_row(row, shown["max_length_tokens"])


def print_row(row: dict[str, Any], max_length_tokens: int) -> None:
    """One row: its counts, its pictures, its text."""
    counts = (
        f"{row['total_tokens']} tokens: {row['text_tokens']} text, {row['visual_tokens']} visual, "
        f"{row['supervised_tokens']} trained"
    )
    out.print(f"[bold]{escape(row['row'])}[/]  {counts}", highlight=False)
    if row["problem"]:
        out.print(f"[red]cannot be trained on[/]: {escape(row['problem'])}", highlight=False)
    elif not row["fits"]:
        out.print(f"[red]does not fit[/]: max_length_tokens is {max_length_tokens}", highlight=False)
    for image in row["images"]:
        _, high, wide = image["grid_thw"]
        out.print(
            f"  picture {image['width']} x {image['height']} -> {image['resized_width']} x {image['resized_height']}: "
            f"{high} x {wide} patches, {image['visual_tokens']} visual tokens ({image['token_start']}.."
            f"{image['token_end'] - 1})",
            style=IMAGE_STYLE,
            highlight=False,
        )
    out.print(coloured(row))
    out.print()


def coloured(row: dict[str, Any]) -> Text:
    """The row's text, its trained spans and its pictures marked."""
    text = Text(row["text"], style=PROMPT_STYLE)
    for span in row["trained_spans"]:
        text.stylize(f"not dim {TRAINED_STYLE}", span["start"], span["end"])
    for image in row["images"]:
        text.stylize(f"not dim {IMAGE_STYLE}", image["start"], image["end"])
    return text
