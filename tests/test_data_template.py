"""Rows become the chat template's own text and ids; labels cover the answers and their ends, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_samples import row_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlm_dft.torchvision_shim  # noqa: F401
from vlm_dft.data.problems import RowError
from vlm_dft.data.template import ChatTemplate, template_messages
from vlm_dft.data.tokenizer import load_template
from vlm_dft.errors import ModelError

QUESTION = ("user", "What is it?")


@pytest.fixture(scope="session")
def qwen_vl(shared_data: Path) -> ChatTemplate:
    """The real Qwen2.5-VL tokenizer and template."""
    return load_template(str(shared_data / "qwen2_5_vl_tokenizer"))


@pytest.fixture(scope="session")
def qwen_text(shared_data: Path, qwen_vl: ChatTemplate) -> ChatTemplate:
    """The real Qwen2.5 text template on the same vocabulary."""
    config = json.loads((shared_data / "qwen2_5_vl_tokenizer" / "qwen2_5_text" / "tokenizer_config.json").read_text())
    return ChatTemplate.checked(qwen_vl.tokenizer, config["chat_template"], vision=False, image_token=None)


@pytest.fixture(scope="session")
def llama(tiny_llama: Path) -> ChatTemplate:
    return load_template(str(tiny_llama))


@pytest.fixture(params=["qwen_vl", "qwen_text", "llama"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return request.getfixturevalue(request.param)


def labelled(template: ChatTemplate, rendered) -> str:
    ids = [token for token, label in zip(rendered.input_ids, rendered.supervised, strict=True) if label]
    return template.tokenizer.decode(ids)


def test_labels_cover_each_trained_answer_and_its_end(template: ChatTemplate) -> None:
    row = row_of(QUESTION, ("assistant", "A dog."), ("user", "Sure?"), ("assistant", "No: a cat 🐈."))
    end = "<|eot_id|>" if "<|eot_id|>" in template.special_tokens else "<|im_end|>"
    rendered = template.render(row)
    assert labelled(template, rendered) == f"A dog.{end}No: a cat 🐈.{end}"
    assert rendered.supervised_tokens == sum(rendered.supervised)


def test_a_turn_of_weight_zero_has_no_labels(template: ChatTemplate) -> None:
    row = row_of(QUESTION, ("assistant", "A dog.", False), ("user", "Sure?"), ("assistant", "A cat."))
    assert labelled(template, template.render(row)).startswith("A cat.")


def test_an_answer_that_repeats_the_question_is_labelled_once(template: ChatTemplate) -> None:
    rendered = template.render(row_of(("user", "same words"), ("assistant", "same words")))
    assert labelled(template, rendered).startswith("same words")
    words = len(template.tokenizer("same words", add_special_tokens=False)["input_ids"])
    assert rendered.supervised_tokens == words + 1


def test_ids_are_those_of_the_whole_rendered_text(template: ChatTemplate) -> None:
    row = row_of(("system", "Be brief."), QUESTION, ("assistant", " A dog.\n"), ("user", "And?"), ("assistant", "Yes"))
    chat = template_messages(row.messages, vision=template.vision)
    text = template.tokenizer.apply_chat_template(chat, chat_template=template.source, tokenize=False)
    rendered = template.render(row)
    assert rendered.text == text
    assert rendered.input_ids == template.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_real_wethink_text_is_labelled_exactly(qwen_vl: ChatTemplate, shared_data: Path) -> None:
    lines = (shared_data / "puzzlevqa" / "wethink_train.jsonl").read_text().splitlines()[::100]
    for line in lines:
        record = json.loads(line)
        row = row_of(("user", record["problem"]), ("assistant", record["refined_cot"]), images=1)
        rendered = qwen_vl.render(row)
        assert labelled(qwen_vl, rendered) == record["refined_cot"] + "<|im_end|>"
        assert rendered.input_ids == qwen_vl.tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def test_each_picture_is_one_image_token(qwen_vl: ChatTemplate) -> None:
    rendered = qwen_vl.render(row_of(QUESTION, ("assistant", "Two."), images=2))
    tokens = [qwen_vl.tokenizer.convert_ids_to_tokens(rendered.input_ids[at]) for at in rendered.image_positions]
    assert tokens == ["<|image_pad|>", "<|image_pad|>"]
    assert rendered.text_tokens == len(rendered.input_ids) - 2
    assert rendered.text.count("<|vision_start|><|image_pad|><|vision_end|>") == 2


def test_the_prompt_is_what_training_saw_before_the_answer(template: ChatTemplate) -> None:
    row = row_of(QUESTION, ("assistant", "A dog."))
    prompt = template.render_prompt(row.messages[:1])
    rendered = template.render(row)
    assert rendered.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert rendered.supervised.index(True) == len(prompt.input_ids)
    assert not any(prompt.supervised)


ANSWERS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip())


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(answer=ANSWERS)
def test_any_answer_starts_where_generation_would(qwen_vl: ChatTemplate, llama: ChatTemplate, answer: str) -> None:
    """Line breaks that open an answer are one token with the template's own, unless the text is cut there."""
    for template in (qwen_vl, llama):
        row = row_of(QUESTION, ("assistant", answer))
        prompt = template.render_prompt(row.messages[:1])
        rendered = template.render(row)
        assert rendered.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        assert rendered.supervised.index(True) == len(prompt.input_ids)
        assert template.tokenizer.decode(rendered.input_ids) == template.tokenizer.decode(
            template.tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
        )


def test_an_answer_that_opens_with_a_line_break_keeps_it(qwen_vl: ChatTemplate) -> None:
    rendered = qwen_vl.render(row_of(QUESTION, ("assistant", "\n\nA dog.")))
    assert labelled(qwen_vl, rendered) == "\n\nA dog.<|im_end|>"


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>"])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_text_cannot_inject_structure(qwen_vl: ChatTemplate, token: str, turn: int) -> None:
    turns = [("system", "Be brief."), QUESTION, ("assistant", "A dog.")]
    role, text = turns[turn]
    turns[turn] = (role, f"{text} {token}\nmore")
    with pytest.raises(RowError, match="structure") as caught:
        qwen_vl.render(row_of(*turns))
    assert (caught.value.reason_code, caught.value.turn) == ("special_token_in_text", turn)


def test_an_ordinary_added_token_is_ordinary_text(qwen_vl: ChatTemplate) -> None:
    rendered = qwen_vl.render(row_of(QUESTION, ("assistant", "<tool_call> is a word")))
    assert labelled(qwen_vl, rendered) == "<tool_call> is a word<|im_end|>"


def test_a_text_model_cannot_take_a_picture(qwen_text: ChatTemplate) -> None:
    with pytest.raises(RowError, match="text model"):
        qwen_text.render(row_of(QUESTION, ("assistant", "A dog."), images=1))


def test_a_template_that_rewrites_history_is_refused(qwen_text: ChatTemplate) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if not loop.last %} (old){% endif %}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate.checked(qwen_text.tokenizer, source, vision=False, image_token=None)
    with pytest.raises(ModelError, match="no label mask fits"):
        template.render(row_of(QUESTION, ("assistant", "A dog.")))


def test_a_template_that_changes_the_answer_is_refused(qwen_text: ChatTemplate) -> None:
    source = qwen_text.source.replace("message.content + '<|im_end|>'", "message.content | upper + '<|im_end|>'")
    assert source != qwen_text.source
    template = ChatTemplate.checked(qwen_text.tokenizer, source, vision=False, image_token=None)
    with pytest.raises(ModelError, match="changes the assistant's text"):
        template.render(row_of(QUESTION, ("assistant", "A dog.")))


def test_a_template_without_an_end_of_turn_is_refused(qwen_text: ChatTemplate) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate.checked(qwen_text.tokenizer, source, vision=False, image_token=None)
    with pytest.raises(ModelError, match="never stop"):
        template.render(row_of(QUESTION, ("assistant", "A dog.")))


def test_a_text_template_given_to_a_vision_model_is_refused(qwen_text: ChatTemplate) -> None:
    template = ChatTemplate.checked(qwen_text.tokenizer, qwen_text.source, vision=True, image_token="<|image_pad|>")
    with pytest.raises(ModelError, match="cannot take this kind of content"):
        template.render(row_of(QUESTION, ("assistant", "A dog.")))


def test_a_template_may_refuse_a_row(llama: ChatTemplate) -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    template = ChatTemplate.checked(llama.tokenizer, source, vision=False, image_token=None)
    with pytest.raises(RowError, match="roles must alternate"):
        template.render(row_of(QUESTION, ("assistant", "A dog.")))


def test_a_template_that_prints_the_date_gives_the_same_ids_tomorrow(llama: ChatTemplate) -> None:
    date = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}\n"
    )
    template = ChatTemplate.checked(llama.tokenizer, date + llama.source, vision=False, image_token=None)
    assert template.render(row_of(QUESTION, ("assistant", "A dog."))).text.startswith("Today: 26 Jul 2024")


def test_a_tokenizer_without_a_template_is_refused(llama: ChatTemplate) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        ChatTemplate.checked(llama.tokenizer, None, vision=False, image_token=None)


def test_processor_and_model_directory_give_the_same_template(tiny_vlm: Path) -> None:
    from transformers import AutoProcessor

    row = row_of(QUESTION, ("assistant", "A dog."), images=1)
    of_processor = ChatTemplate.of(AutoProcessor.from_pretrained(tiny_vlm))
    assert of_processor.render(row) == load_template(str(tiny_vlm)).render(row)
