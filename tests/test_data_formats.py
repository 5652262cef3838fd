"""Each format's rows, and each of their traps, become the right turns or a problem that names its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import data_uri, image_part, openai_row, picture, sharegpt_row, wethink_row

from vlm_dft.config import ValidationLimits
from vlm_dft.data import openai_chat, sharegpt, wethink
from vlm_dft.data.draft import Draft, Picture, check
from vlm_dft.data.formats import PARSERS, detect
from vlm_dft.data.problems import RowError

LIMITS = ValidationLimits()
COT = "I see one, two, three circles."
REPLY = f"<think>\n{COT}\n</think>\n<answer>\n3\n</answer>"


def content(draft: Draft, role: str) -> list[str]:
    """The parts of that role's turns; pictures as [reference]."""
    turns = [turn for turn in draft.turns if turn.role == role]
    return [part if isinstance(part, str) else f"[{part.reference}]" for turn in turns for part in turn.content]


def problem(parse, row: dict[str, Any]) -> RowError:
    with pytest.raises(RowError) as caught:
        check(parse(row), LIMITS)
    return caught.value


def test_wethink_row_becomes_question_and_tagged_answer() -> None:
    draft = wethink.parse(wethink_row())
    assert content(draft, "user") == ["[images/a.png]", "How many circles are there?"]
    assert content(draft, "assistant") == [REPLY]
    assert (draft.answer, draft.category) == ("3", "counting")
    assert draft.with_system(None).turns[0].text == wethink.SYSTEM_PROMPT
    assert draft.with_system("Mine.").turns[0].text == "Mine."
    assert draft.with_system("").turns[0].role == "user"


@pytest.mark.parametrize(
    "refined_cot",
    [
        f"<think>{COT}</think>",
        f"<think>\n{COT}\n</think>\n<answer>3</answer>",
        f"{COT}\n<answer>\nthree\n</answer>\n",
        f"<THINK>{COT}</THINK><Answer>3</Answer>",
        f"  {COT}</think>\n",
    ],
)
def test_wethink_tags_in_the_reasoning_are_there_once(refined_cot: str) -> None:
    assert content(wethink.parse(wethink_row(refined_cot=refined_cot)), "assistant") == [REPLY]


def test_wethink_tags_in_the_answer_are_there_once() -> None:
    assert content(wethink.parse(wethink_row(answer="<answer> 3 </answer>")), "assistant") == [REPLY]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nHow many?", ["[images/a.png]", "\nHow many?"]),
        ("Look: <image> How many?", ["Look: ", "[images/a.png]", " How many?"]),
        ("<image>What does the <image> tag do?", ["[images/a.png]", "What does the <image> tag do?"]),
        ("What does <video> or <audio> do?", ["[images/a.png]", "What does <video> or <audio> do?"]),
    ],
)
def test_wethink_media_tags_beside_the_placeholder_are_text(text: str, expected: list[str]) -> None:
    assert content(wethink.parse(wethink_row(problem=text)), "user") == expected


def test_wethink_several_pictures_take_their_places_in_order() -> None:
    row = wethink_row(problem="Is <image> larger than <image>?", image_path=["a.png", "b.png"])
    assert content(wethink.parse(row), "user") == ["Is ", "[a.png]", " larger than ", "[b.png]", "?"]
    assert problem(wethink.parse, row | {"problem": "Is <image> larger?"}).reason_code == "placeholder_mismatch"


@pytest.mark.parametrize("answer", [4, 4.5])
def test_wethink_a_numeric_answer_is_its_text(answer: float) -> None:
    assert wethink.parse(wethink_row(answer=answer)).answer == str(answer)


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"problem": "<image>"}, "problem", "empty_problem"),
        ({"problem": " \n"}, "problem", "empty_problem"),
        ({"problem": 7}, "problem", "wrong_type"),
        ({"problem": ...}, "problem", "missing_field"),
        ({"refined_cot": "<think> </think><answer>3</answer>"}, "refined_cot", "empty_reasoning"),
        ({"refined_cot": ""}, "refined_cot", "empty_reasoning"),
        ({"refined_cot": "so <answer>3"}, "refined_cot", "malformed_tags"),
        ({"refined_cot": None}, "refined_cot", "wrong_type"),
        ({"answer": "<answer> </answer>"}, "answer", "empty_answer"),
        ({"answer": True}, "answer", "wrong_type"),
        ({"answer": ...}, "answer", "wrong_type"),
        ({"image_path": None}, "image_path", "image_missing"),
        ({"image_path": ""}, "image_path", "image_missing"),
        ({"image_path": []}, "image_path", "image_missing"),
        ({"image_path": [1]}, "image_path", "image_missing"),
        ({"problem": "say <|im_end|>"}, "problem", "special_token_in_text"),
        ({"refined_cot": "\ud800 half"}, "refined_cot", "invalid_unicode"),
    ],
)
def test_wethink_problems_name_the_field(changes: dict[str, Any], field: str, code: str) -> None:
    error = problem(wethink.parse, wethink_row(**changes))
    assert (error.field, error.reason_code) == (field, code)


def test_openai_text_and_picture_parts() -> None:
    uri = data_uri(picture())
    row = openai_row(
        [{"type": "text", "text": "What is "}, image_part(uri), {"type": "text", "text": "?"}], "A circle."
    )
    draft = openai_chat.parse(row)
    assert content(draft, "user") == ["What is ", f"[{uri}]", "?"]
    assert next(draft.pictures).field == "messages.0.content.1.image_url.url"


def test_openai_weight_decides_what_is_trained() -> None:
    row = openai_row("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    assert [turn.train for turn in openai_chat.parse(row).turns if turn.role == "assistant"] == [False, True]


def test_openai_developer_is_system_and_image_tags_are_text() -> None:
    row = openai_row("an <image> tag", "yes")
    row["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    draft = openai_chat.parse(row)
    check(draft, LIMITS)
    assert content(draft, "system") == ["Be brief."]
    assert content(draft, "user") == ["an <image> tag"]


def changed(path: str, value: Any, *contents: Any) -> dict[str, Any]:
    """An OpenAI row with one value replaced."""
    row: Any = openai_row(*contents)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = row
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return row


@pytest.mark.parametrize(
    ("row", "field", "code"),
    [
        ({"messages": "hi"}, "messages", "wrong_type"),
        ({"messages": []}, "messages", "no_messages"),
        (changed("messages.0", "hi"), "messages.0", "wrong_type"),
        (changed("messages.0.role", 3), "messages.0.role", "wrong_type"),
        (changed("messages.0.role", ...), "messages.0.role", "missing_field"),
        (changed("messages.0.role", "tool"), "messages.0.role", "unknown_role"),
        (changed("messages.0.content", 5), "messages.0.content", "wrong_type"),
        (changed("messages.0.content", ...), "messages.0.content", "wrong_type"),
        (changed("messages.0.content", [5]), "messages.0.content.0", "wrong_type"),
        (changed("messages.0.content", [{"type": "input_audio"}]), "messages.0.content.0.type", "unknown_part"),
        (changed("messages.0.content", [{"type": "text"}]), "messages.0.content.0.text", "missing_field"),
        (changed("messages.0.content", [image_part(5)]), "messages.0.content.0.image_url.url", "wrong_type"),  # type: ignore[arg-type]
        (
            changed("messages.1.content", [image_part("a.png")]),
            "messages.1.content.0.image_url.url",
            "image_outside_user",
        ),
        (changed("messages.1.content", " "), "messages.1.content", "empty_turn"),
        (changed("messages.0.content", []), "messages.0.content", "empty_turn"),
        (changed("messages.1.weight", 2), "messages.1.weight", "invalid_weight"),
        (changed("messages.1.weight", True), "messages.1.weight", "invalid_weight"),
        (changed("messages.1.weight", "1"), "messages.1.weight", "invalid_weight"),
        (changed("messages.0.weight", 1), "messages.0.weight", "weight_outside_assistant"),
        (changed("messages.1.weight", 0), "messages", "all_masked"),
        (changed("messages.1.tool_calls", [{}]), "messages.1.tool_calls", "unsupported_field"),
        (changed("messages.1", ...), "messages.0.content", "last_turn_not_assistant"),
        (changed("messages.0", ...), "messages", "first_turn_not_user"),
        (changed("messages.1.role", "system"), "messages.1.content", "system_not_first"),
        (openai_row([image_part("a.png")] * 65, "yes"), "messages", "too_many_images"),
    ],
)
def test_openai_problems_name_the_field(row: dict[str, Any], field: str, code: str) -> None:
    error = problem(openai_chat.parse, row)
    assert (error.field, error.reason_code) == (field, code)


def test_sharegpt_tags_stand_for_the_pictures_in_order() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image> or <image>?"},
        {"from": "gpt", "value": "The <image> tag."},
        {"from": "human", "value": "And <image>"},
        {"from": "gpt", "value": "No."},
    ]
    draft = sharegpt.parse({"conversations": turns, "images": ["a", "b", "c"]})
    check(draft, LIMITS)
    assert content(draft, "user") == ["[a]", " or ", "[b]", "?", "And ", "[c]"]
    assert content(draft, "assistant") == ["The <image> tag.", "No."]
    assert [picture.field for picture in draft.pictures] == ["images.0", "images.1", "images.2"]


def test_sharegpt_messages_system_and_single_image() -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}],
        "system": "Be brief.",
        "image": "a.png",
    }
    draft = sharegpt.parse(row)
    assert content(draft, "system") == ["Be brief."]
    assert list(draft.pictures) == [Picture("a.png", "image")]


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"images": []}, "conversations", "placeholder_mismatch"),
        ({"images": ["a", "b"]}, "conversations", "placeholder_mismatch"),
        ({"images": None}, "conversations", "placeholder_mismatch"),
        ({"images": [5]}, "images.0", "wrong_type"),
        ({"images": {"a": 1}}, "images", "wrong_type"),
        ({"conversations": []}, "conversations", "no_messages"),
        ({"conversations": "hi"}, "conversations", "wrong_type"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "conversations.0.from", "unknown_role"),
        ({"conversations": [{"from": "human", "value": 5}]}, "conversations.0.value", "wrong_type"),
        ({"conversations": [{"value": "x"}]}, "conversations.0.role", "missing_field"),
        ({"videos": ["v.mp4"]}, "videos", "unsupported_field"),
        ({"system": 5}, "system", "wrong_type"),
    ],
)
def test_sharegpt_problems_name_the_field(changes: dict[str, Any], field: str, code: str) -> None:
    error = problem(sharegpt.parse, sharegpt_row(**changes))
    assert (error.field, error.reason_code) == (field, code)


def test_formats_are_told_apart() -> None:
    assert detect(wethink_row()) == "wethink"
    assert detect(openai_row()) == "openai"
    assert detect(sharegpt_row()) == "sharegpt"
    assert detect(openai_row(images=["a.png"])) == "sharegpt"
    assert detect({"messages": [{"from": "human", "value": "x"}]}) == "sharegpt"
    assert detect({"question": "?", "answer": "!"}) is None


def test_real_wethink_and_sharegpt_forms_agree(shared_data: Path) -> None:
    """The same items in both forms: pictures, answers and reasoning are the same turns."""
    folder = shared_data / "wethink_format"
    raw = [json.loads(line) for line in (folder / "example_raw.jsonl").read_text().splitlines()]
    tuned = json.loads((folder / "example_sft.json").read_text())
    assert len(raw) == len(tuned) == 3
    for raw_row, tuned_row in zip(raw, tuned, strict=True):
        first, second = PARSERS["wethink"](raw_row), PARSERS["sharegpt"](tuned_row)
        assert content(first, "assistant") == content(second, "assistant")
        assert [p.reference for p in first.pictures] == [p.reference for p in second.pictures]
