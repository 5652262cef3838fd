"""Small files for the data tests: pictures, rows in each format, archives, and one validated dataset."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_dft.config import ValidationConfig
from vlm_dft.data.canonical import CanonicalDataset, ImagePart, Message, Row, TextPart
from vlm_dft.data.validation import validate
from vlm_dft.results import ValidationReport
from vlm_dft.run_dir import RunDir


def picture(width: int = 56, height: int = 28, mode: str = "RGB", file_format: str = "PNG", **options: Any) -> bytes:
    """An encoded picture of one colour."""
    out = io.BytesIO()
    Image.new(mode, (width, height), options.pop("color", 0)).save(out, file_format, **options)
    return out.getvalue()


def data_uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def wethink_row(**changes: Any) -> dict[str, Any]:
    row = {
        "problem": "How many circles are there?",
        "answer": "3",
        "category": "counting",
        "abilities": "perception",
        "refined_cot": "I see one, two, three circles.",
        "image_path": "images/a.png",
        "reward": "rule-based",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def openai_row(*contents: Any, **changes: Any) -> dict[str, Any]:
    """User and assistant turns in alternation; a question and an answer unless told."""
    turns = contents or ("What is 2 + 2?", "4")
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(turns)]
    return {"messages": messages} | changes


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def sharegpt_row(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
    return {"conversations": turns, "images": ["images/a.png"]} | changes


def jsonl(*rows: Any) -> bytes:
    """One line per row; bytes are taken as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def tar_of(files: dict[str, bytes], compression: str = "gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


class Validated:
    """A validation that ran: its report, its run directory, its dataset."""

    def __init__(self, report: ValidationReport, run: RunDir) -> None:
        self.report = report
        self.run = run

    @property
    def codes(self) -> list[str]:
        return [problem.code for problem in self.report.problems]

    @property
    def rows(self) -> list[Row]:
        return list(self.dataset)

    @property
    def dataset(self) -> CanonicalDataset:
        return CanonicalDataset.open(self.run.dataset_path)


def validated(tmp_path: Path, source: bytes | Path, filename: str = "rows.jsonl", **options: Any) -> Validated:
    """Validate bytes as an upload, or a directory as a registered one."""
    if isinstance(source, bytes):
        path = tmp_path / "upload"
        path.write_bytes(source)
    else:
        path = source
    run = RunDir(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    report = validate(ValidationConfig(source=path, filename=filename, **options), run)
    leftovers = {entry.name for entry in run.path.iterdir()} - {"dataset", "progress.json"}
    assert not leftovers, f"left behind: {leftovers}"
    assert run.dataset_path.exists() == (report.dataset is not None), "half a dataset"
    return Validated(report, run)


def row_of(*turns: tuple[str, str] | tuple[str, str, bool], images: int = 0) -> Row:
    """A canonical row; the first user turn opens with that many pictures."""
    part = ImagePart(image="images/a.png", sha256="0" * 64, width=56, height=28)
    messages = []
    for role, text, *train in turns:
        pictures = (part,) * images if role == "user" else ()
        images = 0 if role == "user" else images
        content = (*pictures, TextPart(text=text))
        messages.append(Message.model_validate({"role": role, "content": content, "train": not train or train[0]}))
    return Row(id="rows.jsonl:1", messages=tuple(messages))
