"""Benchmarks are read from the authors' files and from VLMEvalKit's TSV alike; what is wrong is named by its place."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_dft.config import BenchmarkConfig, BenchmarkKind
from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.items import Benchmark


def load(kind: BenchmarkKind, path: Path, prompt: str = "direct", limit: int | None = None) -> Benchmark:
    assert prompt in ("direct", "cot")
    benchmark = load_benchmark(BenchmarkConfig(name=kind, kind=kind, path=path), prompt)  # type: ignore[arg-type]
    return benchmark.first(limit)


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def png(color: str = "red", size: tuple[int, int] = (56, 56)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def mathvision_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "1",
        "question": "How many?\n<image1>",
        "options": [],
        "answer": "3",
        "level": 1,
        "subject": "counting",
        "image": "images/1.png",
    }
    return row | changes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    return tmp_path


def write_jsonl(directory: Path, *rows: dict[str, Any]) -> Path:
    path = directory / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_real_mathverse_has_five_versions_of_each_problem(shared_data: Path) -> None:
    benchmark = load("mathverse", shared_data / "mathverse")
    assert len(benchmark.items) == benchmark.num_total == 305
    assert set(Counter(item.categories["version"] for item in benchmark.items).values()) == {61}
    assert len({item.group for item in benchmark.items}) == 61
    vision_only = next(item for item in benchmark.items if item.categories["version"] == "Vision Only")
    assert vision_only.prompt.startswith("According to the question shown in the image, please directly answer")
    cot = load("mathverse", shared_data / "mathverse", "cot")
    assert all("first conduct reasoning" in item.prompt for item in cot.items)


def test_real_mathvision_is_the_whole_testmini(shared_data: Path) -> None:
    benchmark = load("mathvision", shared_data / "mathvision")
    assert len(benchmark.items) == 304
    assert sum(bool(item.options) for item in benchmark.items) == 190
    lettered = next(item for item in benchmark.items if list(item.options.values()) == list("ABCDE"))
    assert "(A)" not in lettered.prompt  # the options are in the picture
    texts = next(item for item in benchmark.items if item.options.get("A") == "5-4-3-2-1")
    assert "(A) 5-4-3-2-1\n(B) 5-2-3-4-1" in texts.prompt


def test_real_wemath_options_are_read_letter_by_letter(shared_data: Path) -> None:
    benchmark = load("wemath", shared_data / "wemath_nc")
    assert len(benchmark.items) == 268
    assert len({item.group for item in benchmark.items}) == 79
    assert all(len(item.options) >= 4 and item.answer in item.options for item in benchmark.items)
    first = benchmark.items[0]
    expected = {"A": "300, 400", "B": "400, 300", "C": "3000, 4000", "D": "4000, 3000", "E": "No correct answer"}
    assert first.options == expected
    assert first.prompt.startswith("Question: According to the diagram")
    assert "Options:\nA. 300, 400\nB. 400, 300\n" in first.prompt


def test_every_real_picture_is_decoded(shared_data: Path) -> None:
    for kind, name in (("mathverse", "mathverse"), ("mathvision", "mathvision"), ("wemath", "wemath_nc")):
        for item in load(kind, shared_data / name).items[::17]:  # type: ignore[arg-type]
            assert item.picture is not None
            assert item.picture.decoded().size == item.picture.size()


def test_a_mathverse_tsv_with_pointer_rows_gives_the_same_questions_as_the_json(
    shared_data: Path, tmp_path: Path
) -> None:
    records = json.loads((shared_data / "mathverse" / "testmini_subset.json").read_text())[:20]
    rows, first_with = [], {}
    for record in records:
        index = record["sample_index"]
        picture = shared_data / "mathverse" / record["image"]
        pointer = first_with.setdefault(record["image"], index)
        rows.append(
            {
                "index": index,
                "problem_index": record["problem_index"],
                "problem_version": record["problem_version"],
                "question": record["query_wo"],
                "query_cot": record["query_cot"],
                "answer": record["answer"],
                "question_type": record["question_type"],
                "metadata": str(record["metadata"]),  # a Python dictionary, as VLMEvalKit writes it
                "image": base64_of(picture) if pointer == index else pointer,
            }
        )
    assert any(len(row["image"]) < 64 for row in rows)
    from_tsv = load("mathverse", write_tsv(tmp_path / "MathVerse_MINI.tsv", rows))
    from_json = load("mathverse", shared_data / "mathverse", limit=20)
    assert [item.prompt for item in from_tsv.items] == [item.prompt for item in from_json.items]
    for left, right in zip(from_tsv.items, from_json.items, strict=True):
        assert left.picture is not None
        assert right.picture is not None
        assert left.picture.encoded() == right.picture.encoded()
        assert left.categories == right.categories


def test_a_mathvision_tsv_is_asked_verbatim(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "mathvision" / "testmini.jsonl").read_text().splitlines()[:6]
    records = [json.loads(line) for line in lines]
    rows = [
        {
            "index": record["id"],
            "question": record["question"],
            "choices": str(record["options"]),
            "answer": record["answer"],
            "category": record["subject"],
            "image": base64_of(shared_data / "mathvision" / record["image"]),
        }
        for record in records
    ]
    benchmark = load("mathvision", write_tsv(tmp_path / "MathVision_MINI.tsv", rows))
    assert [item.prompt for item in benchmark.items] == [record["question"] for record in records]
    assert [list(item.options.values()) for item in benchmark.items] == [record["options"] for record in records]


def test_a_wemath_tsv_with_an_image_path_gives_the_same_items_as_the_json(shared_data: Path, tmp_path: Path) -> None:
    from_json = load("wemath", shared_data / "wemath_nc", limit=6)
    rows = []
    for index, item in enumerate(from_json.items):
        assert item.picture is not None
        (tmp_path / f"{index}.png").write_bytes(item.picture.encoded())
        row = {"index": index, "ID": item.group.split(":")[1], "key": item.id.split(":")[1]}
        row |= {"question": item.prompt.split("\n")[0].removeprefix("Question: ")}
        row |= {letter: item.options.get(letter, "") for letter in "ABCDEFGH"}
        row |= {"answer": item.answer, "knowledge concept": item.categories["concept"]}
        row |= {"requirement": "Answer in this form.", "hint": "", "image_path": f"{index}.png"}
        rows.append(row)
    path = write_tsv(tmp_path / "WeMath.tsv", rows)
    from_tsv = load("wemath", path)
    assert [item.prompt for item in from_tsv.items] == [item.prompt for item in from_json.items]
    assert [item.group for item in from_tsv.items] == [item.group for item in from_json.items]
    assert all(item.prompt.endswith("\nAnswer in this form.") for item in load("wemath", path, "cot").items)


def test_a_limit_takes_whole_groups_in_file_order(shared_data: Path) -> None:
    """We-Math's file lists all first steps before all second ones: the first 10 rows alone hold no complete group."""
    whole = load("wemath", shared_data / "wemath_nc")
    limited = whole.first(10)
    assert len(limited.items) == 9
    assert len({item.group for item in limited.items}) == 3
    assert set(Counter(item.group for item in limited.items).values()) == {3}
    assert len(whole.first(1).items) == 3
    assert limited.num_total == 268
    assert limited.sha256 != whole.sha256
    assert whole.first(None) is whole.first(1000) is whole


def test_an_absent_benchmark_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"mathverse is not at .*absent: .*MathVerse_MINI\.tsv, testmini\.json"):
        load("mathverse", tmp_path / "absent")
    with pytest.raises(BenchmarkError, match=r"holds no file of the benchmark wemath: put one of WeMath\.tsv"):
        load("wemath", tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(BenchmarkError, match=r"2 files \(a\.json, b\.json\)"):
        load("wemath", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, r"row 2: answer: the field is absent or empty"),
        ({"answer": ["3"]}, r"row 2: answer: expected text or a number, found list"),
        ({"options": "A"}, r"row 2: options: neither a JSON nor a Python literal"),
        ({"options": ["x", "y"], "answer": "C"}, r"row 2: answer: 'C' is none of the options A, B"),
        ({"image": "images/2.png"}, r"row 2: image: 'images/2.png' does not exist: put the image at"),
        ({"image": "../outside.png"}, r"row 2: image: '../outside.png' leaves the benchmark's directory"),
        ({"image": "/etc/passwd"}, r"row 2: image: '/etc/passwd' leaves the benchmark's directory"),
        ({"image": "images/link.png"}, r"row 2: image: 'images/link.png' leaves the benchmark's directory"),
        ({"image": "images/text.png"}, r"row 2: image: not an image that Pillow reads"),
        ({"image": "images/huge.png"}, r"row 2: image: .*absurdly large"),
        ({"id": "1"}, r"the item id '1' comes twice"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(directory: Path, changes: dict[str, Any], message: str) -> None:
    outside = directory.parent / "outside.png"
    outside.write_bytes(png())
    (directory / "images" / "link.png").symlink_to(outside)
    (directory / "images" / "text.png").write_text("not an image")
    if changes.get("image") == "images/huge.png":
        Image.new("1", (20_000, 20_000)).save(directory / "images" / "huge.png")
    path = write_jsonl(directory, mathvision_row(), mathvision_row(**({"id": "2"} | changes)))
    with pytest.raises(BenchmarkError, match=message) as caught:
        load("mathvision", path)
    assert str(path) in caught.value.message


def test_a_truncated_picture_is_named_when_it_is_decoded(directory: Path) -> None:
    data = Image.effect_noise((200, 200), 50)
    buffer = io.BytesIO()
    data.save(buffer, "PNG")
    (directory / "images" / "1.png").write_bytes(buffer.getvalue()[:2000])
    benchmark = load("mathvision", write_jsonl(directory, mathvision_row()))
    assert benchmark.items[0].picture is not None
    with pytest.raises(BenchmarkError, match=r"row 1: image: the image is damaged"):
        benchmark.items[0].picture.decoded()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ("[1]", "row 1: expected an object, found int"),
        ("not json", "line 1 is not JSON"),
        ('[{"id": 1}', "the array is not JSON"),
        ("[" * 100_000, "the array is not JSON"),
    ],
)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        load("mathvision", tmp_path)


def test_a_bad_tsv_is_named_by_row(tmp_path: Path) -> None:
    row = {"index": "1", "question": "q", "choices": "[]", "answer": "3", "category": "counting", "image": "7"}
    path = write_tsv(tmp_path / "MathVision.tsv", [row])
    with pytest.raises(BenchmarkError, match=r"row 1: image: the cell points at row index '7', which holds no image"):
        load("mathvision", path)
    write_tsv(path, [row | {"image": "!" * 100}])
    with pytest.raises(BenchmarkError, match=r"row 1: image: the cell is not base64 text"):
        load("mathvision", path)
    path.write_text(path.read_text() + "2\tq\n")
    with pytest.raises(BenchmarkError, match=r"row 2: 2 columns where the header has 6"):
        load("mathvision", path)
    path.write_bytes(b"index\tquestion\n\xff\t1\n")
    with pytest.raises(BenchmarkError, match="not a UTF-8 TSV"):
        load("mathvision", path)
    write_tsv(path, [row | {"choices": "__import__('os').system('true')"}])
    with pytest.raises(BenchmarkError, match=r"row 1: choices: neither a JSON nor a Python literal"):
        load("mathvision", path)


def test_a_long_base64_cell_is_read_whole(tmp_path: Path) -> None:
    """Python's csv stops at 128 kB per cell unless told otherwise."""
    buffer = io.BytesIO()
    Image.effect_noise((700, 700), 50).save(buffer, "PNG")
    cell = base64.b64encode(buffer.getvalue()).decode()
    assert len(cell) > 200_000
    row = {"index": "1", "question": "q", "choices": "[]", "answer": "3", "category": "counting", "image": cell}
    benchmark = load("mathvision", write_tsv(tmp_path / "MathVision.tsv", [row]))
    assert benchmark.items[0].picture is not None
    assert benchmark.items[0].picture.size() == (700, 700)


def test_an_unknown_mathverse_version_or_wemath_key_is_refused(directory: Path) -> None:
    row = {
        "sample_index": 1,
        "problem_index": 1,
        "problem_version": "Vision Mostly",
        "question": "q",
        "query_wo": "q",
        "answer": "1",
        "question_type": "free-form",
        "metadata": {"subject": "Functions", "subfield": "Property"},
        "image": "images/1.png",
    }
    (directory / "testmini.json").write_text(json.dumps([row]))
    with pytest.raises(BenchmarkError, match=r"problem_version: 'Vision Mostly' is none of Text Dominant"):
        load("mathverse", directory)
    (directory / "testmini.json").write_text(json.dumps([row | {"problem_version": "Vision Only", "metadata": {}}]))
    with pytest.raises(BenchmarkError, match=r"metadata\.subject: the field is absent"):
        load("mathverse", directory)
    (directory / "testmini.json").write_text(json.dumps([{"ID": "1", "key": "2steps_3", "option": "A. 1; B. 2"}]))
    with pytest.raises(BenchmarkError, match=r"key: '2steps_3' is none of"):
        load("wemath", directory)
