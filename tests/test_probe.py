"""Histograms of target probabilities: the right rows, the right parts, the right numbers, at the right steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets_for_tests import metrics_of, shapes_dataset, sums_dataset
from gradients_for_tests import config_of, loaded_for

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft import trainer
from vlm_dft.batches import open_corpus
from vlm_dft.config import RunConfig, TrainConfig
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder
from vlm_dft.model import LoadedModel, load
from vlm_dft.probe import NUM_BINS, in_reasoning
from vlm_dft.results import Histogram
from vlm_dft.run_dir import RunDir


def trained(path: Path, model: Path, dataset: Path, **settings) -> tuple[RunDir, TrainConfig]:
    defaults = {"max_steps": 5, "batch_size": 4, "learning_rate": 3e-3}
    config = config_of(model, dataset, "nll", **(defaults | settings))
    run = RunDir(path)
    run.create(RunConfig(run_id="test", train=config))
    trainer.train(config, run)
    return run, config


@pytest.mark.parametrize("family", ["tiny_vlm", "tiny_llama"])
def test_reasoning_and_answer_are_told_apart_by_their_tags(family: str, request: pytest.FixtureRequest):
    loaded = load(request.getfixturevalue(family), device="cpu")
    tokenizer, end = loaded.tokenizer, loaded.end_of_turn_token_id

    def parts(text: str) -> tuple[str, str]:
        ids = [token for turn in text.split("|") for token in (*tokenizer.encode(turn, add_special_tokens=False), end)]
        inside = in_reasoning(ids, tokenizer, end)
        reasoning = [token for token, flag in zip(ids, inside, strict=True) if flag]
        answer = [token for token, flag in zip(ids, inside, strict=True) if not flag]
        return tokenizer.decode(reasoning), tokenizer.decode(answer)

    stop = tokenizer.decode([end])
    assert parts("<think>a = 2.</think><answer>2</answer>") == ("<think>a = 2.</think>", f"<answer>2</answer>{stop}")
    assert parts("no tags, 2 > 1") == ("", f"no tags, 2 > 1{stop}")
    assert parts("<think>ü does not end") == ("<think>ü does not end", stop)
    assert parts("<think>a|b") == ("<think>a", f"{stop}b{stop}")  # the next turn is an answer again
    assert parts("x<think>a</think>y<think>b</think>z") == ("<think>a</think><think>b</think>", f"xyz{stop}")


def counts_by_definition(loaded: LoadedModel, config: TrainConfig, dataset: Path) -> dict[str, list[int]]:
    """Of all rows of a dataset, one at a time."""
    corpus = open_corpus(dataset, Encoder(loaded.processor, config.pixels), config, Path(config.model))
    counts = {"reasoning": [0] * NUM_BINS, "answer": [0] * NUM_BINS}
    for index in corpus.kept:
        inputs = collate([corpus.sample(index)], loaded.pad_token_id)
        labels_T = inputs.pop("labels")[0, 1:]
        keep = labels_T != -100
        with torch.no_grad():
            p_NV = loaded.model(**inputs, use_cache=False).logits[0, :-1][keep].double().softmax(-1)
        p_N = p_NV.gather(1, labels_T[keep][:, None]).squeeze(1).tolist()
        text = loaded.tokenizer.decode(labels_T[keep])
        reasoning = loaded.tokenizer.encode(text[: text.rfind("</think>") + 8]) if "<think>" in text else []
        for place, p in enumerate(p_N):
            part = "reasoning" if place < len(reasoning) else "answer"
            counts[part][min(int(p * NUM_BINS), NUM_BINS - 1)] += 1
    return counts


@pytest.mark.parametrize("packing", [False, True])
def test_the_histograms_are_those_of_the_rows_before_and_after(packing: bool, tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 6, masked=[1])
    held_out = sums_dataset(tmp_path / "held-out", 3)
    settings = {"validation_dataset": held_out, "packing": packing, "max_steps": 12, "learning_rate": 2e-2}
    run, config = trained(tmp_path / "run", tiny_vlm, dataset, **settings)
    found = run.read_histograms()
    assert [(h.step, h.split, h.part) for h in found] == [
        (step, split, part) for step in (0, 12) for split in ("train", "validation") for part in ("reasoning", "answer")
    ]
    assert {h.num_rows for h in found} == {6, 3}
    before, after = loaded_for(config), load(run.export_path, precision="fp32", device="cpu")
    for loaded, step in ((before, 0), (after, 12)):
        for split, path in (("train", dataset), ("validation", held_out)):
            expected = counts_by_definition(loaded, config, path)
            for h in found:
                if (h.step, h.split) == (step, split):
                    assert list(h.counts) == expected[h.part]
                    assert h.num_tokens == sum(h.counts)
    assert found[0].num_tokens > 0
    assert found[0].counts != found[4].counts


def test_the_probe_is_small_fixed_and_changes_nothing(tiny_qwen2: Path, tmp_path: Path):
    dataset = sums_dataset(tmp_path / "dataset", 12)
    with_probe, _ = trained(tmp_path / "with", tiny_qwen2, dataset, probe_rows=3, probe_every_steps=2)
    again, _ = trained(tmp_path / "again", tiny_qwen2, dataset, probe_rows=3, probe_every_steps=2, packing=True)
    without, _ = trained(tmp_path / "without", tiny_qwen2, dataset, probe_rows=0)
    found = with_probe.read_histograms()
    assert [h.step for h in found] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert {h.num_rows for h in found} == {3}
    assert len({h.num_tokens for h in found if h.part == "answer"}) == 1
    assert [h.counts for h in again.read_histograms()] == [h.counts for h in found]
    assert without.read_histograms() == []
    assert metrics_of(with_probe.metrics_path) == metrics_of(without.metrics_path)


def test_a_resumed_run_forgets_the_histograms_that_it_makes_again(tmp_path: Path):
    run = RunDir(tmp_path)
    for step in (0, 2, 4):
        run.append_histogram(
            Histogram(step=step, split="train", part="answer", counts=(1, 2), num_tokens=3, num_rows=1, time=0.0)
        )
    run.forget_after(2)
    assert [h.step for h in run.read_histograms()] == [0, 2]
    assert not run.metrics_path.exists()
