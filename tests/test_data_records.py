"""Rows stream out of JSONL and JSON arrays; what is no row is said with its number."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from data_samples import jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_dft.data.problems import FileError, RowError
from vlm_dft.data.records import count_lines, read_records

LIMIT = 1 << 20


def records_of(tmp_path: Path, data: bytes, limit: int = LIMIT) -> list:
    path = tmp_path / "rows"
    path.write_bytes(data)
    return [record.value for record in read_records(path, "rows.jsonl", limit)]


def codes(values: list) -> list[str | None]:
    return [value.reason_code if isinstance(value, RowError) else None for value in values]


def file_error(tmp_path: Path, data: bytes, limit: int = LIMIT) -> FileError:
    with pytest.raises(FileError) as caught:
        records_of(tmp_path, data, limit)
    return caught.value


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": 1', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'["a"]', "row_not_object"),
        (b"null", "row_not_object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested_too_deeply"),
        (b'{"a": "' + b"x" * LIMIT + b'"}', "row_too_large"),
    ],
)
def test_a_broken_line_costs_only_itself(tmp_path: Path, line: bytes, code: str) -> None:
    values = records_of(tmp_path, jsonl({"a": 1}, line, {"a": 2}))
    assert codes(values) == [None, code, None]
    assert values[2] == {"a": 2}


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n  \n{"a": 2}')
    assert [record.number for record in read_records(path, "rows", LIMIT)] == [2, 4]
    assert count_lines(path) == 4


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"question,answer\n1,2\n", "not_json"),
        (b"PAR1\x15\x04", "not_json"),
        ("[]".encode("utf-16"), "not_json"),
        (b"[]", "empty_file"),
        (b'[{"a": 1}, {"a"', "invalid_json"),
        (b'[{"a": 1} {"a": 2}]', "invalid_json"),
        (b'[{"a": 1}', "invalid_json"),
        (b'[{"a": 1}] more', "invalid_json"),
        (b'[{"a": 1},]', "invalid_json"),
        (b'[{"a": "\xff"}]', "invalid_utf8"),
        (b'[{"a": ' + b"[" * 100_000, "invalid_json"),
        (b'[{"a": "' + b"x" * 3 * LIMIT + b'"}]', "row_too_large"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes, code: str) -> None:
    error = file_error(tmp_path, data)
    assert (error.problem.code, error.problem.file) == (code, "rows.jsonl")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_a_number_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Its beginning is a number too, so the decoder alone would be content with what was read."""
    monkeypatch.setattr("vlm_dft.data.records._CHUNK", chunk)
    values = records_of(tmp_path, b'[123456, {"a": 1}]')
    assert codes(values) == ["row_not_object", None]
    assert "123456" in values[0].reason


def test_an_array_names_the_element_that_breaks_it(tmp_path: Path) -> None:
    assert file_error(tmp_path, b'[{"a": 1}, {"a": 2}, {"a": ]').problem.line == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), min_size=1, max_size=6)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(rows=ROWS, indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40), ascii_only=st.booleans())
def test_arrays_and_lines_give_back_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list, indent: int | None, chunk: int, ascii_only: bool
) -> None:
    """Whatever falls on the border of two reads: the reads are made tiny here."""
    monkeypatch.setattr("vlm_dft.data.records._CHUNK", chunk)
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    assert records_of(tmp_path, array) == rows
    assert records_of(tmp_path, b"\n".join(json.dumps(row).encode() for row in rows)) == rows


@pytest.mark.parametrize("array", [True, False])
def test_a_big_file_never_sits_in_memory(tmp_path: Path, array: bool) -> None:
    path = tmp_path / "rows"
    row = json.dumps({"a": "x" * 1000}).encode()
    with path.open("wb") as file:
        file.write(b"[" if array else b"")
        for index in range(40_000):
            file.write((b"," if array and index else b"") + row + b"\n")
        file.write(b"]" if array else b"")
    tracemalloc.start()
    count = sum(1 for _ in read_records(path, "rows", LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 8 * 2**20 < path.stat().st_size / 4
