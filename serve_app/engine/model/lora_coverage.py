"""Comparison of the tensors in a LoRA file with the layers that they changed.

diffusers loads the keys that fit and only logs the others, so an adapter of another model may do
nothing, or half of what it was trained for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from serve_app.engine.model.networks import networks_of

_HUB_OPTIONS = (
    "local_files_only",
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "subfolder",
    "user_agent",
)
"""Arguments that `_fetch_state_dict` needs, here with their defaults."""


@dataclass(frozen=True)
class LoraCoverage:
    """The part of a LoRA file that the networks use.

    Attributes:
        used: keys of tensors that a layer has.
        unused: keys in the file that fit no layer.
        unfilled: keys that an adapted layer needs and the file does not have.
        parts: names of the components that may be adapted.
    """

    used: frozenset[str]
    unused: frozenset[str]
    unfilled: frozenset[str]
    parts: tuple[str, ...]


def cover(pipeline: Any, expected: Mapping[str, Tensor], adapter: str) -> LoraCoverage:
    """Compare the `expected_tensors` with what the adapter has in the pipeline's networks."""
    networks: dict[str, nn.Module] = networks_of(pipeline)
    found = _adapted(networks, adapter)
    used = set(expected.keys() & found.keys())
    unused, unfilled = dict(expected), dict(found)
    for key in used:
        del unused[key], unfilled[key]
    # A loader may rename keys in a way of its own. The values show it.
    for key, tensor in list(unused.items()):
        for other, adapted in unfilled.items():
            if _is_same(tensor, adapted):
                del unused[key], unfilled[other]
                used.add(key)
                break
    return LoraCoverage(
        frozenset(used),
        frozenset(unused),
        frozenset(unfilled),
        tuple(name for name in pipeline._lora_loadable_modules if name in networks),
    )


def _adapted(networks: Mapping[str, nn.Module], adapter: str) -> dict[str, Tensor]:
    """Return the adapter's tensors in the networks, by component, layer and role."""
    found: dict[str, Tensor] = {}
    for component, network in networks.items():
        for path, layer in network.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            for role in layer.adapter_layer_names:
                part = getattr(layer, role)
                if adapter not in part:
                    continue
                name = f"{component}.{path}.{role}"
                if isinstance(part[adapter], nn.Module):
                    for key, tensor in part[adapter].named_parameters():
                        found[_short(f"{name}.{key}")] = tensor
                else:
                    found[name] = part[adapter]
    return found


def wrong_shapes(pipeline: Any, expected: Mapping[str, Tensor]) -> list[str]:
    """Describe the `expected_tensors` whose layers have other numbers of inputs or outputs."""
    problems: list[str] = []
    for component, network in networks_of(pipeline).items():
        layers = dict(network.named_modules())
        for key, tensor in expected.items():
            path, _, role = key.removeprefix(f"{component}.").rpartition(".")
            weight = getattr(layers.get(path), "weight", None)
            side = {"lora_A": 1, "lora_B": 0}.get(role)
            if not key.startswith(f"{component}.") or side is None or weight is None:
                continue
            if weight.ndim > 1 < tensor.ndim and tensor.shape[side] != weight.shape[side]:
                problems.append(
                    f"{key} is {list(tensor.shape)}, the layer's weight is {list(weight.shape)}"
                )
    return problems


def changes_of_the_model(pipeline: Any, expected: Mapping[str, Tensor]) -> list[str]:
    """Name what diffusers would write into the model's own weights, or widen, for these tensors."""
    found: list[str] = []
    for component, network in networks_of(pipeline).items():
        layers = dict(network.named_modules())
        own = {f"{component}.{_short(name)}" for name, _ in network.named_parameters()}
        found += sorted(own & expected.keys())
        for key, tensor in expected.items():
            path, _, role = key.removeprefix(f"{component}.").rpartition(".")
            # Not the shape of the weight, which may be packed.
            size = {"lora_A": "in_features", "lora_B": "out_features"}.get(role)
            if not key.startswith(f"{component}.") or size is None or tensor.ndim != 2:
                continue
            most = getattr(layers.get(path), size, None)
            wide = tensor.shape[1 if role == "lora_A" else 0]
            if most is not None and wide > most:
                found.append(f"{key} has {wide} {size}, the layer has {most}")
    return found


def expected_tensors(pipeline: Any, source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file under the names that diffusers gives them.

    ``source`` has the arguments of ``load_lora_weights``.
    """
    networks = networks_of(pipeline)
    # The same call as in load_lora_weights; some families return no alphas.
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    converted = pipeline.lora_state_dict(**source, **options)
    tensors: dict[str, Tensor] = converted[0] if isinstance(converted, tuple) else converted
    # Of some formats, diffusers drops the scales of DoRA. Without them, the layers are others.
    expected = {key: tensor for key, tensor in _raw(source).items() if "dora_scale" in key}
    if any("lora_magnitude_vector" in key for key in tensors):
        expected = {}
    for component in [*networks, ""]:
        prefix = f"{component}." if component else ""
        part = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in part}
        part = {
            key.removeprefix(prefix): tensor
            for key, tensor in part.items()
            if not key.endswith(".alpha")  # a scale, not a tensor of a layer
        }
        if isinstance(networks.get(component), PreTrainedModel):
            part = _named_as_in_text_encoder(networks[component], part)
        elif component and part and "lora_A" not in next(iter(part)):
            part = convert_unet_state_dict_to_peft(part)
        expected.update({_short(prefix + key): tensor for key, tensor in part.items()})
    return expected


def _raw(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the file as they are stored."""
    options: dict[str, Any] = dict.fromkeys(_HUB_OPTIONS)
    options |= {"use_safetensors": True, "weight_name": None, "allow_pickle": False}
    options |= source
    tensors: dict[str, Tensor]
    tensors, _ = _fetch_state_dict(**options)
    return tensors


def _named_as_in_text_encoder(network: nn.Module, part: dict[str, Tensor]) -> dict[str, Tensor]:
    if not part:
        return part
    part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
    if hasattr(network, "text_model"):
        return part
    return {key.removeprefix("text_model."): tensor for key, tensor in part.items()}


def _short(key: str) -> str:
    return key.removesuffix(".weight")


def _is_same(tensor: Tensor, adapted: Tensor) -> bool:
    if adapted.is_meta or tensor.shape != adapted.shape:
        return False
    same: bool = tensor.to(adapted.device, adapted.dtype).equal(adapted)
    return same
