"""Whatever comes in, it is taken or refused with a typed problem: nothing else is ever raised."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from data_samples import picture, tar_of, zip_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_dft.config import PixelConfig, ValidationLimits
from vlm_dft.data.archive import archive_kind, unpack
from vlm_dft.data.draft import check
from vlm_dft.data.formats import PARSERS, detect
from vlm_dft.data.images import inspect
from vlm_dft.data.problems import FileError, RowError

LIMITS = ValidationLimits(max_archive_bytes=2**20)
WORDS = """
messages conversations role content from value type text image_url url weight images image system problem answer
refined_cot image_path category user assistant human gpt tools
"""
NAMES = st.sampled_from(WORDS.split())
TEXT = NAMES | st.sampled_from(["<image>", "<think>", "</answer>", "<|im_end|>", "data:image/png;base64,"]) | st.text()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=25,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=st.dictionaries(NAMES, JSON, max_size=8), name=st.sampled_from(sorted(PARSERS)))
def test_any_row_becomes_a_draft_or_a_problem_with_a_field(row: dict, name) -> None:
    detect(row)
    try:
        draft = PARSERS[name](row).with_system("Be brief.")
        check(draft, LIMITS)
    except RowError as error:
        problem = json.loads(error.at("rows.jsonl", 1).model_dump_json())
    else:
        problem = {"reason": "none", "code": "none"}
        assert draft.turns[-1].role == "assistant"
    assert problem["reason"]
    assert problem["code"]


def damaged(data: bytes, cuts: list[tuple[float, int]], end: float) -> bytes:
    """Bytes overwritten at some places, and cut at the end."""
    changed = bytearray(data[: int(len(data) * end)] or b"\0")
    for place, value in cuts:
        changed[int(place * (len(changed) - 1))] = value
    return bytes(changed)


DAMAGE = {
    "cuts": st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    "end": st.floats(0.2, 1),
}
PICTURES = [picture(40, 40, file_format=name) for name in ("PNG", "JPEG", "WEBP")]
ARCHIVES = [pack({"data.jsonl": b"{}" * 300, "images/a.png": PICTURES[0]}) for pack in (tar_of, zip_of)]
ARCHIVES.append(tar_of({"data.jsonl": b"{}" * 300, "images/a.png": PICTURES[0]}, ""))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.sampled_from(PICTURES), **DAMAGE)
def test_any_damaged_picture_is_usable_or_a_problem(data: bytes, cuts: list, end: float) -> None:
    try:
        info = inspect(damaged(data, cuts, end), "image", LIMITS, PixelConfig())
    except RowError:
        return
    assert min(info.width, info.height) >= 4


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.sampled_from(ARCHIVES), **DAMAGE)
def test_any_damaged_archive_unpacks_inside_or_is_refused(data: bytes, cuts: list, end: float) -> None:
    with TemporaryDirectory() as directory:
        packed, target = Path(directory) / "packed", Path(directory) / "target"
        packed.write_bytes(damaged(data, cuts, end))
        target.mkdir()
        if archive_kind(packed) is None:
            return
        with suppress(FileError):
            unpack(packed, "up", target, LIMITS)
        assert sorted(entry.name for entry in Path(directory).iterdir()) == ["packed", "target"]
