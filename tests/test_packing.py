"""Packing: planned from lengths alone, and nothing but memory and speed changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from datasets_for_tests import metrics_of, shapes_dataset, sums_dataset
from gradients_for_tests import BATCH, config_of, definition_of, gradient_of, loaded_for, micro_batches_of, relative
from hypothesis import given
from hypothesis import strategies as st

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from vlm_dft import attention
from vlm_dft.attention import PACKED_ATTENTION, pack_arguments, packed_attention, use_packed_attention
from vlm_dft.batches import Plan, Steps, open_corpus
from vlm_dft.config import LoraConfig, PixelConfig, RunConfig
from vlm_dft.data.canonical import ImagePart, Message, TextPart
from vlm_dft.data.collate import collate, pack, positions_4T
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.errors import ModelError, SampleTooLongError
from vlm_dft.model import LoadedModel, base_of, load, set_use_cache
from vlm_dft.optimization import Optimization
from vlm_dft.packing import Size, balanced, packed
from vlm_dft.ranks import Ranks
from vlm_dft.run_dir import RunDir
from vlm_dft.trainer import train

sizes_and_length = st.lists(st.integers(1, 400), max_size=40).flatmap(
    lambda tokens: st.tuples(st.just([Size(t, t // 2) for t in tokens]), st.integers(max(tokens, default=1), 900))
)


@given(sizes_and_length)
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(drawn: tuple[list[Size], int]):
    sizes, length = drawn
    packs = packed(sizes, length)
    assert sorted(place for one in packs for place in one) == list(range(len(sizes)))
    assert all(0 < sum(sizes[place].tokens for place in one) <= length for one in packs)
    assert packs == packed(sizes, length)
    total = sum(size.tokens for size in sizes)
    assert len(packs) <= 2 * total / length + 1  # at most one pack is half empty


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 5))
def test_shares_of_ranks_differ_by_one_sample_at_most(tokens: list[int], count: int):
    sizes = [Size(t) for t in tokens]
    shares = balanced(sizes, count)
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    costs = [sum(sizes[place].cost for place in share) for share in shares]
    assert max(costs) - min(costs) <= max(size.cost for size in sizes)


def test_shares_are_even_in_what_they_cost_and_not_in_tokens():
    pictures_first = [Size(100, 90), Size(100), Size(100, 90), Size(100)]
    assert balanced(pictures_first, 2) == [[0, 1], [2, 3]]  # the vision tower's work counts
    one_long = [Size(32768), *[Size(10923)] * 4]
    assert balanced(one_long, 2) == [[0], [1, 2, 3, 4]]  # attention's, too: by tokens the long one would have company


def test_packs_of_the_same_number_of_samples_are_even():
    packs = packed([Size(300), Size(290), Size(20), Size(10)], 600)
    assert packs == [[0, 3], [1, 2]]  # best-fit alone would leave 580 and 40
    assert packed([Size(tokens) for tokens in (400, 300, 300, 200)], 600) == [[0, 3], [1, 2]]


def test_long_packs_are_nearly_full():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 1400, (256,), generator=generator).tolist()
    packs = packed([Size(t) for t in tokens], 8192)
    assert sum(tokens) / (8192 * len(packs)) > 0.97


def test_planning_opens_no_picture(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH)
    for image in (dataset / "images").iterdir():
        image.unlink()
    config = config_of(tiny_vlm, dataset, "dft", packing=True)
    encoder = Encoder(load(tiny_vlm, device="cpu").processor, config.pixels)
    corpus = open_corpus(dataset, encoder, config, tiny_vlm)
    steps = Steps(corpus, Plan(corpus.kept, 4, seed=0), micro_batch_size=1, pad_token_id=0, pack_length=170)
    assert [len(indices) for indices in steps.layout([0, 1, 2, 3])] == [2, 2]
    sizes = [corpus.sizes[index] for index in (0, 3)]
    assert (sizes[0].visual_tokens, sizes[1].visual_tokens) == (4, 0)


def test_no_samples_last_token_predicts_the_next_samples_first(tiny_qwen2: Path, tmp_path: Path):
    config = config_of(tiny_qwen2, sums_dataset(tmp_path / "dataset", 3), "dft", packing=True)
    loaded = load(tiny_qwen2, device="cpu")
    corpus = open_corpus(config.dataset, Encoder(loaded.processor, config.pixels), config, tiny_qwen2)
    steps = Steps(corpus, Plan(corpus.kept, 3, seed=None), micro_batch_size=1, pad_token_id=0, pack_length=4096)
    samples = [corpus.sample(index) for index in range(3)]
    # No chat template supervises a first token; nothing here relies on that.
    steps._cache = {n: dataclasses.replace(s, labels_T=s.input_ids_T) for n, s in enumerate(samples)}
    (pack_of_three,) = next(steps.read())
    expected = [torch.cat([sample.input_ids_T[1:], torch.tensor([-100])]) for sample in samples]
    assert torch.equal(pack_of_three.labels_BT[0], torch.cat(expected))


def samples_of(loaded: LoadedModel) -> list[Sample]:
    """Without, with one and with two pictures of different shapes; for text models of different lengths."""
    encoder = Encoder(loaded.processor, PixelConfig())
    samples = []
    for index, shapes in enumerate([((84, 56),), (), ((28, 140), (112, 112)), ()]):
        shapes = shapes if loaded.is_vision else ()
        images = [Image.linear_gradient("L").resize(size).convert("RGB") for size in shapes]
        parts = [ImagePart(image="", sha256="", width=width, height=height) for width, height in shapes]
        message = Message(role="user", content=(*parts, TextPart(text="How many shapes are there? " * (index + 1))))
        samples.append(encoder.encode_prompt([message], images, row_id=str(index)))
    return samples


def test_positions_are_those_that_the_model_computes(tiny_vlm: Path):
    loaded = load(tiny_vlm, device="cpu")
    for sample in samples_of(loaded):
        found_4T = positions_4T(sample)
        assert torch.equal(found_4T[0], torch.arange(len(sample)))
        if sample.image_grid_thw is None:
            assert torch.equal(found_4T[1:], torch.arange(len(sample)).expand(3, -1))
            continue
        assert sample.mm_token_type_ids_T is not None
        expected_3BT, _ = loaded.model.model.get_rope_index(
            sample.input_ids_T[None], sample.mm_token_type_ids_T[None], image_grid_thw=sample.image_grid_thw
        )
        assert torch.equal(found_4T[1:], expected_3BT[:, 0])


def packed_logits(loaded: LoadedModel, samples: list[Sample]) -> list[torch.Tensor]:
    inputs = pack(samples)
    inputs.pop("labels")
    lengths = tuple(len(sample) for sample in samples)
    with torch.no_grad():
        logits_BTV = loaded.model(**inputs, **pack_arguments(lengths, loaded.device), use_cache=False).logits
    return list(logits_BTV[0].split(lengths))


@pytest.mark.parametrize("family", ["tiny_vlm", "tiny_qwen2", "tiny_llama"])
def test_packed_logits_equal_those_of_each_sample_alone(family: str, request: pytest.FixtureRequest):
    loaded = load(request.getfixturevalue(family), device="cpu")
    samples = samples_of(loaded)
    expected = []
    for sample in samples:
        inputs = collate([sample], loaded.pad_token_id)
        inputs.pop("labels")
        with torch.no_grad():
            expected.append(loaded.model(**inputs).logits[0])
    set_use_cache(loaded.model, False)
    use_packed_attention(loaded.model)
    for found_TV, alone_TV in zip(packed_logits(loaded, samples), expected, strict=True):
        assert (found_TV - alone_TV).abs().max() < 1e-6
    # What comes before a sample is nothing to it, bit for bit.
    assert torch.equal(packed_logits(loaded, samples[1:])[0], packed_logits(loaded, [samples[3], samples[1]])[1])


def test_inputs_that_are_no_packs_get_stock_attention(tiny_vlm: Path):
    loaded = load(tiny_vlm, device="cpu")
    for side in ("left", "right"):
        inputs = collate(samples_of(loaded), loaded.pad_token_id, side)
        inputs.pop("labels")
        logits = []
        for name in ("sdpa", PACKED_ATTENTION):
            loaded.model.set_attn_implementation({"text_config": name})
            with torch.no_grad():
                logits.append(loaded.model(**inputs).logits)
        assert torch.equal(*logits)


def test_the_vision_tower_sees_the_same_through_packed_attention(tiny_vlm: Path):
    loaded = load(tiny_vlm, device="cpu")
    sample = samples_of(loaded)[2]  # of two pictures
    features = []
    for vision in (False, True):
        use_packed_attention(loaded.model, vision=vision)
        with torch.no_grad():
            outputs = loaded.model.model.get_image_features(sample.pixel_values, sample.image_grid_thw)
        features.append(torch.cat(outputs.pooler_output))
    assert torch.equal(*features)


@pytest.mark.parametrize("family", ["tiny_vlm", "tiny_qwen2", "tiny_llama"])
def test_packed_gradients_are_those_of_each_sample_alone(family: str, tmp_path: Path, request: pytest.FixtureRequest):
    model = request.getfixturevalue(family)
    is_vision = family == "tiny_vlm"
    dataset = (shapes_dataset if is_vision else sums_dataset)(tmp_path / "dataset", BATCH, masked=[1, 4])
    expected = definition_of(config_of(model, dataset, "dft"))
    for pack_length in (90, 4096):
        config = config_of(model, dataset, "dft", packing=True, pack_length_tokens=pack_length)
        assert relative(gradient_of(config), expected) < 1e-5


def test_packed_gradients_survive_checkpointing_and_lora(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH)
    adapter = LoraConfig(targets="all")
    expected = definition_of(config_of(tiny_vlm, dataset, "dft", adapter=adapter))
    config = config_of(tiny_vlm, dataset, "dft", adapter=adapter, packing=True, gradient_checkpointing=True)
    assert relative(gradient_of(config), expected) < 1e-5


def test_training_on_packs_gives_the_same_losses_and_weights(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 10, masked=[3])
    results, runs = [], [RunDir(tmp_path / "padded"), RunDir(tmp_path / "packed")]
    for run, packing in zip(runs, (False, True), strict=True):
        config = config_of(
            tiny_vlm,
            dataset,
            "dft",
            validation_dataset=dataset,
            max_steps=5,
            batch_size=4,
            learning_rate=1e-3,
            packing=packing,
        )
        run.create(RunConfig(run_id="test", train=config))
        results.append(train(config, run))
    padded, in_packs = (metrics_of(run.metrics_path) for run in runs)
    assert len(padded) == 5 + 2
    for expected, found in zip(padded, in_packs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert results[0].input_tokens == results[1].input_tokens
    expected, found = (load_file(run.export_path / "model.safetensors") for run in runs)
    difference = max((found[name] - expected[name]).abs().max().item() for name in expected)
    assert difference < 1e-4  # of weights that moved by about 1e-3


def test_a_sample_longer_than_the_pack_is_refused_by_name(tiny_qwen2: Path, tmp_path: Path):
    dataset = sums_dataset(tmp_path / "dataset", 4)
    config = config_of(tiny_qwen2, dataset, "dft", packing=True, pack_length_tokens=60)
    encoder = Encoder(loaded_for(config).processor, config.pixels)
    with pytest.raises(
        SampleTooLongError, match=r"longer than pack_length_tokens 60: test\.jsonl:\d \(\d+ tokens\).*Raise pack_length"
    ):
        open_corpus(dataset, encoder, config, tiny_qwen2)


def test_packing_settings_that_contradict_each_other_are_refused(tiny_qwen2: Path, tmp_path: Path):
    with pytest.raises(ValidationError, match="micro_batch_size 4 means nothing with packing"):
        config_of(tiny_qwen2, tmp_path, "dft", packing=True, micro_batch_size=4)
    with pytest.raises(ValidationError, match="pack_length_tokens 512 needs packing"):
        config_of(tiny_qwen2, tmp_path, "dft", pack_length_tokens=512)


def test_a_model_with_sliding_windows_is_not_packed(tiny_qwen2: Path):
    loaded = load(tiny_qwen2, device="cpu")
    loaded.model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="set packing to false"):
        use_packed_attention(loaded.model)


def exact_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What FlashAttention computes, on a CPU, with what it asks of its inputs."""
    assert {tensor.dtype for tensor in (query, key, value)} == {torch.bfloat16}
    assert {tensor.stride(-1) for tensor in (query, key, value)} == {1}
    assert torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff().tolist()
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == max(lengths)
    segments = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    settings = {"is_causal": window_size == (-1, 0), "scale": scale, "enable_gqa": enable_gqa}
    mixed = [torch.nn.functional.scaled_dot_product_attention(*heads, **settings) for heads in segments]
    return torch.cat(mixed, dim=1).transpose(0, 1)


def varlen_attn_of_torch_2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return exact_varlen_attn(
        query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


@pytest.mark.parametrize(
    ("master_weights", "varlen_attn"),
    [(True, varlen_attn_of_torch_2_11), (False, exact_varlen_attn)],
    ids=["2.11", "2.13"],
)
def test_flash_attention_is_given_the_heads_of_every_bf16_pack(
    master_weights: bool, varlen_attn, tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH)
    config = config_of(tiny_vlm, dataset, "dft", packing=True, pack_length_tokens=170)
    expected = gradient_of(config)
    # transformers 5.17 would hand arguments of these names to the vision tower, which has its own, a second time.
    theirs = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert not theirs & pack_arguments((2, 3), torch.device("cpu")).keys()
    calls = []

    def counted(query, *arguments, **keywords):
        calls.append(query.shape)
        return varlen_attn(query, *arguments, **keywords)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_GROUPED", attention._grouped(varlen_attn))
    monkeypatch.setattr(attention, "_flash_serves", lambda query_BHTD: query_BHTD.dtype in attention.HALF)
    loaded = loaded_for(config, load(tiny_vlm, precision="bf16", device="cpu", master_weights=master_weights))
    optimization = Optimization(loaded, config, Ranks(), 1)
    use_packed_attention(base_of(loaded.model), vision=True)
    micro_batches = micro_batches_of(config, loaded)
    loaded.model.train()
    optimization.gradients(micro_batches)
    with_pictures = sum("pixel_values" in micro_batch.inputs for micro_batch in micro_batches)
    assert len(calls) == 2 * len(micro_batches) + 2 * with_pictures  # layers, and blocks of the tower
    gradients = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    assert relative(gradients, expected) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_over_a_pack_equals_attention_per_sample():
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = (130, 7, 300)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, count, sum(lengths), 64, generator=generator, device="cuda", dtype=torch.bfloat16)

    query, key, value = heads(8), heads(2), heads(2)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    arguments = pack_arguments(lengths, query.device)
    for causal in (True, False):
        settings = {"scaling": 0.125, "is_causal": causal, **arguments}
        fast, _ = packed_attention(module, query, key, value, None, **settings)
        exact, _ = packed_attention(module, query.float(), key.float(), value.float(), None, **settings)
        assert (fast.float() - exact).norm() / exact.norm() < 1e-2
