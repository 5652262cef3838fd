"""FSDP2: the language model's layers cut over ranks, so that each holds its share of weights, gradients and moments.

What repeats is cut; embedding, head, last norm and vision tower are whole on every rank. The loss head takes its weight
as a whole, and a tower that one rank's micro-batches run and another's do not must not be waited for. This is torch's
own fully_shard: accelerate's FSDP2 also cuts the root, whose forward, logits included, would then have to be called.
All ranks run a layer together, so ``batches.Steps`` gives each as many micro-batches. Gradients are sums, as without.
Without fsdp everything here hands on what it is given.
Knows nothing about losses or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from vlm_dft.compilation import decoder_layers
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError
from vlm_dft.model import LoadedModel, base_of
from vlm_dft.ranks import Ranks

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


class Sharding:
    """One training's model, its layers cut over ranks if the config asks for it."""

    def __init__(self, loaded: LoadedModel, config: TrainConfig, ranks: Ranks) -> None:
        """In place; weights are in their final types. Raises ConfigError where there is nothing to cut over."""
        self.active = config.fsdp
        self._ranks = ranks
        self._loaded = loaded
        if not self.active:
            return
        if ranks.count == 1:
            raise ConfigError(
                "fsdp cuts the model over several processes, and there is one: start it with torchrun, or set fsdp to "
                "false",
                param="train.fsdp",
            )
        _cut_layers(base_of(loaded.model), init_device_mesh(ranks.device.type, (ranks.count,)))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Of what is whole on every rank; the rest was summed on its way."""
        self._ranks.sum_gradients([parameter for parameter in parameters if not is_sharded(parameter)])

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Like torch.nn.utils.clip_grad_norm_: the norm over all, before clipping."""
        if not self.active:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        squares = self._ranks.sum(nn.utils.get_total_norm(parts) ** 2) + nn.utils.get_total_norm(whole) ** 2
        norm = squares.sqrt()
        scale = (max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
        for gradient in (*whole, *parts):
            gradient.mul_(scale)
        return norm

    def whole(self, state: Any) -> Any:
        """Every tensor of a state_dict as a whole, on the CPU where it was cut; to be called by all ranks."""
        return tree_map(_whole, state) if self.active else state

    def cut(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The inverse, of an optimizer's state_dict: moments are cut as their parameters are."""
        if not self.active:
            return state
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            place: {name: _cut(value, parameters[place]) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        return {**state, "state": moments}

    def weights(self) -> dict[str, Tensor] | None:
        """The model's state_dict as a whole; to be called by all ranks. None without fsdp: the model has it."""
        return self.whole(self._loaded.model.state_dict()) if self.active else None


def _cut_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    layers = decoder_layers(model)
    cut: list[Any] = [fully_shard(layer, mesh=mesh) for layer in layers]
    # The root plans ahead for its layers and holds nothing itself.
    body: Any = model.base_model
    root = getattr(body, "language_model", body)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    cut.append(fully_shard(root, mesh=mesh, ignored_params={p for p in root.parameters() if p not in inside}))
    for module in cut:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _cut(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:  # AdamW's step is a number
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
