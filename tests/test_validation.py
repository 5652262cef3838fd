"""A file is accepted whole, or refused with every reason; nothing half-written stays behind either way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from data_samples import (
    data_uri,
    image_part,
    jsonl,
    openai_row,
    picture,
    sharegpt_row,
    tar_of,
    validated,
    wethink_row,
    write_files,
    zip_of,
)

from vlm_dft.config import ValidationConfig, ValidationLimits
from vlm_dft.data import validation
from vlm_dft.data.canonical import ImagePart
from vlm_dft.data.validation import refusal, validate
from vlm_dft.errors import DiskFullError, ModelError
from vlm_dft.run_dir import RunDir

PICTURE = picture()
UPLOAD = {"data.jsonl": jsonl(wethink_row(), wethink_row(image_path="images/b.png")), "images/a.png": PICTURE}
WHOLE = UPLOAD | {"images/b.png": picture(60, 90)}


@pytest.mark.parametrize("pack", [tar_of, zip_of, lambda files: tar_of(files, "")], ids=["tar.gz", "zip", "tar"])
@pytest.mark.parametrize("top", ["", "mine/"])
def test_an_archive_becomes_a_dataset_of_its_own(tmp_path: Path, pack, top: str) -> None:
    found = validated(tmp_path, pack({top + name: data for name, data in WHOLE.items()}))
    report, rows = found.report, found.rows
    assert (report.format, report.rows, report.valid, report.invalid, report.images) == ("wethink", 2, 2, 0, 2)
    assert refusal(report) is None
    assert [row.id for row in rows] == [f"{top}data.jsonl:1", f"{top}data.jsonl:2"]
    for row, name in zip(rows, ("images/a.png", "images/b.png"), strict=True):
        data = found.dataset.image_path(row.images[0]).read_bytes()
        assert data == WHOLE[name]
        assert row.images[0].sha256 == hashlib.sha256(data).hexdigest()
    assert len(list((found.run.dataset_path / "images").iterdir())) == 2
    assert found.dataset.manifest.fingerprint == report.fingerprint
    progress = found.run.read_progress()
    assert progress is not None
    assert (progress.phase, progress.items_done, progress.items_total) == ("validating", 2, 2)


def test_data_uris_become_files_by_content(tmp_path: Path) -> None:
    row = openai_row([image_part(data_uri(PICTURE)), {"type": "text", "text": "?"}], "A circle.")
    found = validated(tmp_path, jsonl(row, row))
    assert found.report.format == "openai"
    assert (found.report.images, found.report.duplicates) == (2, 1)
    assert [path.read_bytes() for path in (found.run.dataset_path / "images").iterdir()] == [PICTURE]


def test_sharegpt_array_in_a_zip(tmp_path: Path) -> None:
    rows = json.dumps([sharegpt_row(), sharegpt_row()], indent=1).encode()
    found = validated(tmp_path, zip_of({"rows.json": rows, "dataset_info.json": b"{}", "images/a.png": PICTURE}))
    assert (found.report.format, found.report.valid) == ("sharegpt", 2)
    assert [row.id for row in found.rows] == ["rows.json:1", "rows.json:2"]


def test_a_registered_directory_keeps_its_pictures_where_they_are(tmp_path: Path) -> None:
    root = write_files(tmp_path / "served", WHOLE)
    found = validated(tmp_path, root, filename="served")
    assert found.dataset.manifest.image_root == str(root.resolve())
    assert sorted(path.name for path in found.run.dataset_path.iterdir()) == ["dataset.json", "rows.jsonl"]
    assert found.dataset.image_path(found.rows[0].images[0]).samefile(root / "images" / "a.png")


def test_the_data_file_is_named_or_found_or_asked_for(tmp_path: Path) -> None:
    root = write_files(tmp_path / "served", {"train.jsonl": jsonl(openai_row()), "test.jsonl": jsonl(openai_row())})
    assert "name one as data_file" in str(refusal(validated(tmp_path, root).report))
    assert validated(tmp_path, root, data_file="test.jsonl").rows[0].id == "test.jsonl:1"
    for wrong, code in (("../x", "data_file_refused"), ("none.jsonl", "data_file_missing")):
        shutil.rmtree(tmp_path / "run")
        assert validated(tmp_path, root, data_file=wrong).codes == [code]


@pytest.mark.parametrize("row_form", ["wethink", "openai", "sharegpt"])
@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("images/none.png", "image_missing"),
        ("images", "image_not_a_file"),
        ("/etc/hostname", "image_path_refused"),
        ("../outside.png", "image_path_refused"),
        ("images/../../outside.png", "image_path_refused"),
        ("images/link.png", "image_path_refused"),
        ("linked/outside.png", "image_path_refused"),
        ("images/loop.png", "image_missing"),
        ("images/fifo.png", "image_not_a_file"),
        ("images\\a.png", "image_path_refused"),
        ("file:///etc/hostname", "image_path_refused"),
        ("~/a.png", "image_path_refused"),
        ("s3://bucket/a.png", "image_path_refused"),
        ("x" * 5000, "image_missing"),
        ("a\0b", "image_path_refused"),
        ("http://example.org/a.png", "image_url_refused"),
        ("https://example.org/a.png", "image_url_refused"),
        ("data:image/png;base64,QUJD", "embedded_image_in_directory"),
        ("images/text.png", "not_an_image"),
        ("images/cut.png", "image_truncated"),
    ],
)
def test_a_picture_that_cannot_be_used_names_its_field(
    tmp_path: Path, row_form: str, reference: str, code: str
) -> None:
    root = write_files(tmp_path / "served", WHOLE | {"images/text.png": b"hello", "images/cut.png": PICTURE[:60]})
    write_files(tmp_path, {"outside.png": PICTURE})
    (root / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "images" / "loop.png").symlink_to("loop.png")
    (root / "linked").symlink_to(tmp_path)
    os.mkfifo(root / "images" / "fifo.png")
    row, field = {
        "wethink": (wethink_row(image_path=reference), "image_path"),
        "openai": (openai_row([image_part(reference)], "yes"), "messages.0.content.0.image_url.url"),
        "sharegpt": (sharegpt_row(images=[reference]), "images.0"),
    }[row_form]
    write_files(root, {"data.jsonl": jsonl(row)})
    found = validated(tmp_path, root)
    assert found.codes == [code]
    problem = found.report.problems[0]
    assert (problem.file, problem.line, problem.field) == ("data.jsonl", 1, field)
    assert len(problem.reason) < 300


def test_a_link_inside_a_registered_directory_is_followed(tmp_path: Path) -> None:
    root = write_files(tmp_path / "served", WHOLE)
    (root / "images" / "b.png").unlink()
    (root / "images" / "b.png").symlink_to("a.png")
    assert validated(tmp_path, root).report.valid == 2


def test_rows_alone_cannot_name_picture_files(tmp_path: Path) -> None:
    found = validated(tmp_path, jsonl(wethink_row()))
    assert found.codes == ["image_not_uploaded"]
    assert "send an archive" in str(refusal(found.report))


def test_one_bad_row_refuses_the_file_unless_a_share_is_allowed(tmp_path: Path) -> None:
    data = jsonl(*[openai_row(f"What is {n} + 1?", str(n + 1)) for n in range(9)], b"{broken")
    refused = validated(tmp_path, data)
    assert (refused.report.rows, refused.report.valid, refused.report.invalid) == (10, 9, 1)
    assert refused.report.dataset is None
    message = refusal(refused.report)
    assert message is not None
    assert message.startswith("1 of 10 rows are invalid; the first: rows.jsonl, line 10: the row is no JSON")
    assert validated(tmp_path, data, max_invalid_fraction=0.09).report.dataset is None
    accepted = validated(tmp_path, data, max_invalid_fraction=0.1)
    assert (accepted.report.dataset, accepted.report.invalid, accepted.codes) == ("dataset", 1, ["invalid_json"])
    assert len(accepted.rows) == accepted.dataset.manifest.rows == 9


def test_a_file_without_one_valid_row_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    assert validated(tmp_path, jsonl(b"{", b"{"), max_invalid_fraction=0.99).report.dataset is None


def test_an_invalid_row_leaves_no_pictures_behind(tmp_path: Path) -> None:
    bad = openai_row([image_part(data_uri(picture(99, 99))), image_part("data:image/png;base64,QUJD")], "no")
    found = validated(
        tmp_path, jsonl(openai_row([image_part(data_uri(PICTURE))], "yes"), bad), max_invalid_fraction=0.5
    )
    assert len(list((found.run.dataset_path / "images").iterdir())) == 1


def test_only_the_first_problems_are_listed_but_all_are_counted(tmp_path: Path) -> None:
    limits = ValidationLimits(max_reported_rows=3)
    report = validated(tmp_path, jsonl(*[{"messages": []}] * 10), limits=limits).report
    assert (report.invalid, [problem.line for problem in report.problems]) == (10, [1, 2, 3])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (b"problem,answer\n", "not_json"),
        (bytes(range(256)) * 9, "not_json"),
        (jsonl({"question": "?"}), "unknown_format"),
        (zip_of({"readme.txt": b"x"}), "no_data_file"),
        (zip_of({"a.jsonl": b"{}", "b.jsonl": b"{}"}), "several_data_files"),
        (tar_of(WHOLE)[:-20], "broken_archive"),
        (tar_of({"../x": b""}), "archive_entry_refused"),
        (b"[" + jsonl(openai_row()).strip() + b", {", "invalid_json"),
    ],
    # Not made of the bytes: an archive holds the time at which it was made.
    ids=["empty", "blank", "csv", "bytes", "unknown", "no-data", "several", "cut", "outside", "open-array"],
)
def test_a_file_that_cannot_be_read_has_one_problem(tmp_path: Path, data: bytes, code: str) -> None:
    found = validated(tmp_path, data)
    assert found.codes == [code]
    assert found.report.dataset is None
    message = refusal(found.report)
    assert message is not None
    assert "\n" not in message


def test_all_masked_rows_are_refused(tmp_path: Path) -> None:
    row = openai_row()
    row["messages"][1]["weight"] = 0
    assert validated(tmp_path, jsonl(row)).codes == ["all_masked"]


def test_a_special_token_is_found_with_and_without_a_tokenizer(tmp_path: Path, tiny_vlm: Path) -> None:
    data = jsonl(openai_row("Say <|im_end|> now", "no"))
    for tokenizer in (None, str(tiny_vlm)):
        found = validated(tmp_path, data, tokenizer=tokenizer)
        assert found.codes == ["special_token_in_text"]
        assert found.report.problems[0].field == "messages.0.content"


def test_a_problem_that_only_the_tokenizer_sees_names_the_users_field(tmp_path: Path, tiny_llama: Path) -> None:
    """<|pad|> is a special token of this tokenizer alone; the system turn that validation adds shifts no field."""
    row = wethink_row(refined_cot="then <|pad|> comes")
    found = validated(tmp_path, zip_of({"data.jsonl": jsonl(row), "images/a.png": PICTURE}), tokenizer=str(tiny_llama))
    assert (found.codes, found.report.problems[0].field) == (["special_token_in_text"], "refined_cot")


def test_pictures_for_a_text_model_are_refused(tmp_path: Path, tiny_qwen2: Path) -> None:
    found = validated(tmp_path, tar_of(WHOLE), tokenizer=str(tiny_qwen2))
    assert found.codes == ["image_for_text_model"] * 2


def test_a_tokenizer_that_cannot_be_loaded_is_an_error_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has neither tokenizer"):
        validated(tmp_path, jsonl(openai_row()), tokenizer=str(tmp_path / "none"))


def test_system_prompts_are_the_rows_own_or_the_requested_or_the_formats(tmp_path: Path) -> None:
    with_own = openai_row()
    with_own["messages"].insert(0, {"role": "system", "content": "Own."})
    rows = validated(tmp_path, jsonl(with_own, openai_row()), system_prompt="Asked.").rows
    assert [row.messages[0].content[0].text for row in rows] == ["Own.", "Asked."]  # type: ignore[union-attr]
    assert validated(tmp_path, jsonl(openai_row())).rows[0].messages[0].role == "user"


def test_the_fingerprint_is_of_the_content_in_order(tmp_path: Path) -> None:
    def fingerprint(*rows) -> str:
        return validated(tmp_path, jsonl(*rows)).report.fingerprint

    first, second = openai_row("a", "b"), openai_row("c", "d")
    weighted = openai_row("a", "b", "c", "d")
    weighted["messages"][1]["weight"] = 0
    assert fingerprint(first, second) == fingerprint(first | {"source": "elsewhere"}, second)
    prints = {fingerprint(*rows) for rows in ([first, second], [second, first], [first], [weighted])}
    pictures = {fingerprint(openai_row([image_part(data_uri(picture(side, side)))], "b")) for side in (28, 56)}
    assert len(prints | pictures) == 6


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "upload"
    source.write_bytes(jsonl(openai_row()))
    (tmp_path / "run").mkdir()
    config = ValidationConfig(source=source, filename="rows.jsonl")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "write_json", full_disk)
        with pytest.raises(DiskFullError, match="no space left"):
            validate(config, RunDir(tmp_path / "run"))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["progress.json"]


def full_disk(path: Path, value: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_second_validation_replaces_the_first(tmp_path: Path) -> None:
    validated(tmp_path, tar_of(WHOLE))
    assert len(validated(tmp_path, jsonl(openai_row())).rows) == 1
    assert not (tmp_path / "run" / "dataset" / "images").exists()


def test_unpacked_pictures_are_ordinary_files(tmp_path: Path) -> None:
    found = validated(tmp_path, tar_of(WHOLE))
    for path in (found.run.dataset_path / "images").iterdir():
        assert stat.S_ISREG(path.lstat().st_mode)
        assert path.stat().st_nlink == 1


@pytest.mark.parametrize("name", ["wethink_train.jsonl", "wethink_test.jsonl", "sft_sharegpt_train.json"])
def test_the_real_puzzles_are_valid_in_every_form(tmp_path: Path, shared_data: Path, name: str) -> None:
    found = validated(tmp_path, shared_data / "puzzlevqa", data_file=name)
    rows = 393 if "test" in name else 1607
    assert (found.report.valid, found.report.images) == (rows, rows)
    part = found.rows[0].images[0]
    assert isinstance(part, ImagePart)
    assert (part.width, part.height) == (224, 224)


def test_real_statistics_with_the_real_tokenizer(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "wethink_format"
    tokenizer = str(shared_data / "qwen2_5_vl_tokenizer")
    found = validated(tmp_path, folder, data_file="example_raw.jsonl", tokenizer=tokenizer, max_length_tokens=250)
    assert found.report.tokens is not None
    assert found.report.tokens.visual.total == 3 * 64
    assert found.report.overlong == 3
    assert all(problem.code == "sample_too_long" for problem in found.report.overlong_rows)
