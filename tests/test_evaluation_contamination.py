"""Benchmark items that stood in the training data are found, in other spellings and sizes, and others are not."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import pytest
from datasets_for_tests import text_row, write_dataset
from evaluation_fixtures import colour_benchmark, diverse_vlm
from PIL import Image, ImageDraw
from test_evaluation_report import score
from test_evaluation_runs import config, new_run

from vlm_dft.config import BenchmarkConfig, BenchmarkKind
from vlm_dft.data.canonical import ImagePart, Message, Row, TextPart
from vlm_dft.errors import DatasetError
from vlm_dft.evaluation import contamination, evaluate
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.contamination import ContaminationReport, check, look_of, words_of
from vlm_dft.evaluation.items import Benchmark, Item, Picture
from vlm_dft.evaluation.report import score_table

LONG = "A train leaves town $A$ at noon with $60$ km/h, and another one leaves $B$ an hour later with $80$ km/h."


def benchmark_of(*items: Item) -> Benchmark:
    return Benchmark("custom", Path("x"), items, len(items))


def question(id: str, text: str) -> Item:
    return Item(id, id, text + "\nAnswer in a box.", None, "1", {}, {}, text)


def picture_row(dataset: Path, id: str, image: Image.Image, suffix: str = "png", **options: int) -> Row:
    data = io.BytesIO()
    image.save(data, {"png": "PNG", "jpg": "JPEG"}[suffix], **options)
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    name = f"images/{digest}.{suffix}"
    (dataset / "images").mkdir(parents=True, exist_ok=True)
    (dataset / name).write_bytes(data.getvalue())
    part = ImagePart(image=name, sha256=digest, width=image.width, height=image.height)
    asked = Message(role="user", content=(part, TextPart(text=f"What does picture {id} show?")))
    return Row(id=id, messages=(asked, Message(role="assistant", content=(TextPart(text="This."),))))


def test_a_question_is_found_in_another_spelling_and_in_more_text(tmp_path: Path) -> None:
    rows = [
        text_row(0, "Something else altogether, about a boat that is rowed upstream for three hours and back.", "1"),
        text_row(1, "Solve: " + LONG.upper().replace("$", "") + " When do they meet?", "2"),
        text_row(2, "What is the area?", "3"),
        text_row(3, "LONG answer", LONG),
    ]
    items = [
        question("train", LONG),
        question("other-numbers", LONG.replace("60", "50").replace("80", "90").replace("noon", "dawn")),
        question("short", "what is THE area"),
        question("longer", "What is the area of it?"),
        question("too-short", "LONG answer"),
    ]
    report = check(write_dataset(tmp_path / "data", rows), {"b": benchmark_of(*items)})
    found = report.benchmarks["b"]
    assert [(overlap.item, overlap.by, overlap.row) for overlap in found.overlaps] == [
        (item, by, row.id)
        for item, row in (("train", rows[1]), ("short", rows[2]))
        for by in ("item", "question")  # without a picture, its question is the item
    ]
    assert (found.rows, found.items, report.checked) == (4, 5, True)


def test_words_are_compared_without_marks() -> None:
    assert words_of("The $x^2$, of  ½ Café!") == words_of("the x^2 OF 1\u20442 cafe\u0301")


def test_a_picture_is_found_resized_and_compressed_and_no_other_one_is(shared_data: Path, tmp_path: Path) -> None:
    """40 pictures of MathVision in three disguises among 61 of MathVerse and 40 others of MathVision itself."""
    names = sorted((shared_data / "mathvision" / "images").iterdir())[:80]
    asked, others = names[:40], [*names[40:], *sorted((shared_data / "mathverse/images_version_1-4").iterdir())]
    data, rows = tmp_path / "data", []
    for number, name in enumerate(asked):
        image = Image.open(name).convert("RGB")
        if number % 3 == 0:
            rows.append(picture_row(data, name.stem, image.resize((image.width // 2 + 1, image.height // 2 + 1))))
        elif number % 3 == 1:
            rows.append(picture_row(data, name.stem, image, "jpg", quality=70))
        else:
            shutil.copy(name, tmp_path / "same")
            image = Image.open(name)
            rows.append(picture_row(data, name.stem, image))
    rows += [picture_row(data, f"other-{name.stem}", Image.open(name).convert("RGB")) for name in others]
    items = [Item(name.stem, name.stem, "q", Picture("p", path=name), "1") for name in asked]
    overlaps = check(write_dataset(data, rows), {"b": benchmark_of(*items)}).benchmarks["b"].overlaps
    assert all(overlap.row == overlap.item for overlap in overlaps), "nothing else is taken for it"
    for kind in ("picture", "item"):  # questions of a word say nothing: the picture is the item
        assert sum(overlap.by == kind for overlap in overlaps) >= 36


@pytest.mark.parametrize(
    ("kind", "name"), [("mathvision", "mathvision"), ("mathverse", "mathverse"), ("wemath", "wemath_nc")]
)
def test_real_benchmarks_do_not_overlap_with_puzzles(
    shared_data: Path, tmp_path: Path, kind: BenchmarkKind, name: str
) -> None:
    pictures = sorted(path for path in (shared_data / "puzzlevqa" / "images").rglob("*") if path.is_file())[:60]
    data = tmp_path / "data"
    rows = [picture_row(data, path.stem, Image.open(path)) for path in pictures]
    benchmark = load_benchmark(BenchmarkConfig(name=name, kind=kind, path=shared_data / name), "direct")
    assert len(rows) == 60
    report = check(write_dataset(data, rows), {name: benchmark.first(60)})
    assert report.benchmarks[name].overlaps == ()


def test_drawings_of_one_layout_in_other_colours_are_other_pictures(tmp_path: Path) -> None:
    def bars(colours: str) -> Image.Image:
        image = Image.new("RGB", (84, 84), "white")
        for place, colour in enumerate(colours.split()):
            ImageDraw.Draw(image).rectangle((8 + 26 * place, 70 - 20 * place, 24 + 26 * place, 80), fill=colour)
        return image

    data = tmp_path / "data"
    rows = [picture_row(data, "other", bars("blue red red")), picture_row(data, "same", bars("red blue red"), "jpg")]
    bars("red blue red").save(tmp_path / "item.png")
    item = Item("a", "a", "Which is highest?", Picture("p", path=tmp_path / "item.png"), "1")
    overlaps = check(write_dataset(data, rows), {"b": benchmark_of(item)}).benchmarks["b"].overlaps
    assert [(overlap.by, overlap.row) for overlap in overlaps] == [("item", "same"), ("picture", "same")]


def test_a_short_question_about_a_picture_says_nothing(tmp_path: Path) -> None:
    rows = [text_row(0, "What is the area of it?", "3")]
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    item = Item("a", "a", "What is the area of it?", Picture("p", path=tmp_path / "noise.png"), "1")
    report = check(write_dataset(tmp_path / "data", rows), {"b": benchmark_of(item)})
    assert report.benchmarks["b"].overlaps == ()


def test_nearly_blank_pictures_are_compared_as_files_alone(tmp_path: Path) -> None:
    assert look_of(Image.new("RGB", (300, 200), "white")) is None
    data = tmp_path / "data"
    row = picture_row(data, "white", Image.new("RGB", (300, 200), "white"))
    Image.new("RGB", (100, 100), "white").save(tmp_path / "white.png")
    same = next((data / "images").iterdir())
    items = [
        Item("other", "other", "q", Picture("p", path=tmp_path / "white.png"), "1"),
        Item("same", "same", "q", Picture("p", path=same), "1"),
    ]
    whole, picture = check(write_dataset(data, [row]), {"b": benchmark_of(*items)}).benchmarks["b"].overlaps
    assert (whole.item, picture.item, picture.differing_bits) == ("same", "same", 0)


def test_question_and_picture_are_the_item_only_where_one_row_holds_both(tmp_path: Path) -> None:
    """A template's question about another picture, and a known picture with another question, are counted apart."""
    data = tmp_path / "data"
    pictures = {name: Image.effect_noise((64, 64), 50).convert("RGB") for name in ("one", "two", "three")}
    items = []
    for name, image in pictures.items():
        image.save(tmp_path / f"{name}.png")
        items.append(Item(name, name, LONG, Picture("p", path=tmp_path / f"{name}.png"), "1", question=LONG))

    def row(id: str, name: str, text: str) -> Row:
        shown = picture_row(data, id, pictures[name])
        asked = Message(role="user", content=(shown.images[0], TextPart(text=text)))
        return Row(id=id, messages=(asked, shown.messages[1]))

    rows = [row("apart", "two", "What is it?"), row("both", "one", LONG), row("again", "one", "And now?")]
    found = check(write_dataset(data, rows), {"b": benchmark_of(*items)}).benchmarks["b"]
    assert found.items_by("item") == {"one"}
    assert found.items_by("picture") == {"one", "two"}
    assert found.items_by("question") == {"one", "two", "three"}
    rows = [row("first", "one", "What?"), row("second", "one", LONG)]  # a picture is looked at once, its rows are all
    assert check(write_dataset(data, rows), {"b": benchmark_of(*items)}).benchmarks["b"].items_by("item") == {"one"}


def test_a_comparison_is_kept_by_data_and_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", [text_row(1, LONG, "2")])
    cache = tmp_path / "cache"
    first = check(data, {"b": benchmark_of(question("train", LONG))}, cache=cache)
    calls: list[str] = []
    compared = contamination._compared
    monkeypatch.setattr(contamination, "_compared", lambda *args: calls.append("") or compared(*args))
    assert (
        check(data, {"renamed": benchmark_of(question("train", LONG))}, cache=cache).benchmarks["renamed"]
        == (first.benchmarks["b"])
    )
    assert not calls
    assert (
        not check(data, {"b": benchmark_of(question("boat", "no such question"))}, cache=cache).benchmarks["b"].overlaps
    )
    assert len(calls) == 1
    next(cache.iterdir()).write_text("torn")
    check(data, {"b": benchmark_of(question("train", LONG))}, cache=cache)


def test_training_data_that_is_gone_is_told_and_a_broken_picture_is_an_error(tmp_path: Path) -> None:
    report = check(tmp_path / "gone", {"b": benchmark_of(question("train", LONG))})
    assert (report.checked, report.benchmarks) == (False, {})
    assert "not a complete validated dataset" in str(report.reason)
    data = tmp_path / "data"
    row = picture_row(data, "x", Image.new("RGB", (50, 50), "red"))
    next((data / "images").iterdir()).write_bytes(b"no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    item = Item("a", "a", "q", Picture("p", path=tmp_path / "noise.png"), "1")
    with pytest.raises(DatasetError, match="the training picture cannot be read"):
        check(write_dataset(data, [row]), {"b": benchmark_of(item)})


def test_overlaps_are_in_the_report_the_score_and_the_table(tmp_path: Path) -> None:
    benchmark = colour_benchmark(tmp_path / "colours", num_items=4)
    model = diverse_vlm(tmp_path / "model")
    copied = tmp_path / "data" / "images"
    copied.mkdir(parents=True)
    shutil.copy(benchmark / "images" / "1.png", copied / "one.png")
    digest = hashlib.sha256((copied / "one.png").read_bytes()).hexdigest()
    part = ImagePart(image="images/one.png", sha256=digest, width=84, height=56)
    asked = Message(role="user", content=(part, TextPart(text="Colour?")))
    row = Row(id="r7", messages=(asked, Message(role="assistant", content=(TextPart(text="blue"),))))
    data = write_dataset(tmp_path / "data", [row])
    run = new_run(tmp_path / "run")
    (found,) = evaluate(config(benchmark, training_dataset=data), run, tuned=str(model), base=None)
    assert (found.contaminated, found.contaminated_questions, found.contaminated_pictures) == (1, 0, 1)
    assert (found.clean_value, found.clean_value_strict) == (0.0, 0.0)
    report = ContaminationReport.model_validate_json((run.path / "evaluation" / "contamination.json").read_bytes())
    assert [(o.item, o.row) for o in report.benchmarks["colours"].overlaps] == [("1", "r7"), ("1", "r7")]
    gone = config(benchmark, training_dataset=tmp_path / "gone", resume_from=run.path)
    (unknown,) = evaluate(gone, new_run(tmp_path / "again"), tuned=str(model), base=None)
    assert (unknown.contaminated, unknown.clean_value) == (None, None)
    kinds = {"contaminated": 3, "contaminated_questions": 9, "contaminated_pictures": 4, "clean_value_strict": None}
    base, tuned = score(clean_value=0.25, **kinds), score(clean_value=0.5, **kinds)
    table = score_table({"base": [base], "tuned": [tuned]})
    assert "question and picture in one row; without them: base 25.0, tuned 50.0." in table
    assert "the question of 9 items and the picture of 4 stand in the training data, together or alone" in table
    assert "of these: base -, tuned -." in table
