"""Attention over packs: several samples one after another in one row, none of which sees another.

Each sample attends causally to itself alone. On a CPU, and in float32, that is one small attention per sample: a mask
over the whole row would compute all the products that it then throws away. In half precision on a GPU it is torch's own
FlashAttention over variable lengths. Inputs that are no packs get transformers' stock attention and masks.
Knows nothing about which samples make up a pack (``vlm_dft.packing``).

Shapes: B rows, H heads, K key-value heads, T tokens, D head size, S samples of a pack.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_dft.errors import ModelError

PACKED_ATTENTION: Final = "vlm_dft_packed"
"""The name under which transformers finds it."""
PACKED_VISION_ATTENTION: Final = "vlm_dft_flash_packed"
"""The same for a vision tower, which hands over all its windows at once to what has flash in its name."""

HALF: Final = (torch.float16, torch.bfloat16)
"""What FlashAttention computes in."""


def _grouped(attention: Callable[..., Any]) -> dict[str, Any]:
    """How to ask for fewer key-value heads than queries; torch 2.11 takes them without being asked."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(attention).parameters else {}


_GROUPED: Final = _grouped(varlen_attn)


def pack_arguments(segment_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a model takes beside a pack, and hands on to every attention; no kernel has to ask for it.

    Not by transformers' names: 5.17 gives these to the vision tower too, which has such arguments of its own.
    """
    ends_S1 = torch.tensor((0, *segment_lengths)).cumsum(0).to(device, torch.int32, non_blocking=True)
    return {"pack_ends_S1": ends_S1, "longest_in_pack": max(segment_lengths)}


def use_packed_attention(model: PreTrainedModel, *, vision: bool = False) -> None:
    """Make the language model's attention ready for packs; vision: and the tower's pictures and windows one call.

    Raises ModelError for a language model that only sees a window.
    """
    text_config = model.config.get_text_config()
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        raise ModelError("packing does not know sliding-window attention: set packing to false", param="train.packing")
    is_composite = text_config is not model.config
    model.set_attn_implementation({"text_config": PACKED_ATTENTION} if is_composite else PACKED_ATTENTION)
    if vision and is_composite:
        # Not through set_attn_implementation, which would look for a package by this name.
        model.config.vision_config._attn_implementation = PACKED_VISION_ATTENTION


def packed_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    pack_ends_S1: Tensor | None = None,
    longest_in_pack: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: B x T x H x D. pack_ends_S1: ends of the samples, when B is one pack.

    A vision tower gives cu_seq_lens_q, the ends of its pictures, or of their windows, in which every patch sees every
    other; it is handed those of the language model's pack as well.
    """
    heads: tuple[Tensor, ...] = (query_BHTD, key_BKTD, value_BKTD)
    ends_S1, longest = (pack_ends_S1, longest_in_pack) if cu_seq_lens_q is None else (cu_seq_lens_q, max_length_q)
    if ends_S1 is None:
        return sdpa_attention_forward(module, *heads, attention_mask, **arguments)
    assert attention_mask is None, "a pack has no padding to mask"
    heads = _as_autocast(*heads)
    if _flash_serves(heads[0]) and not arguments.get("dropout"):
        assert longest is not None, "it comes with the ends"
        causal = arguments.get("is_causal")
        causal = module.is_causal if causal is None else causal
        return _flash(heads, ends_S1, longest, scaling=arguments["scaling"], causal=bool(causal)), None
    lengths = ends_S1.diff().tolist()
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in heads)
    parts = [
        sdpa_attention_forward(module, query, key, value, None, **arguments)[0]
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _as_autocast(*heads: Tensor) -> tuple[Tensor, ...]:
    """In the type that autocast computes attention in: beside float32 weights, rotation has left heads in float32."""
    device = heads[0].device.type
    if not torch.is_autocast_enabled(device):
        return heads
    return tuple(head.to(torch.get_autocast_dtype(device)) for head in heads)


def _flash_serves(query_BHTD: Tensor) -> bool:
    return query_BHTD.is_cuda and query_BHTD.dtype in HALF


def _flash(heads: tuple[Tensor, ...], ends_S1: Tensor, longest: int, *, scaling: float, causal: bool) -> Tensor:
    query_THD, key_TKD, value_TKD = (tensor.squeeze(0).transpose(0, 1) for tensor in heads)
    mixed_THD = varlen_attn(
        query_THD,
        key_TKD,
        value_TKD,
        ends_S1.int(),
        ends_S1.int(),
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        **_GROUPED,
    )
    assert isinstance(mixed_THD, Tensor), "no log-sum-exp was asked for"
    return mixed_THD.unsqueeze(0)


def _mask(*, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """Transformers' mask where there is padding. A pack needs none: the stock one would be T x T."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **arguments)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(PACKED_VISION_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask)
