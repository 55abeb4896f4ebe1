"""The LoRA adapters in the networks of a pipeline, switched between calls.

The active adapters are a property of the shared networks. So only requests with the same adapters
at the same scales may share a call; see `AdapterSet`.

Adapters of the start are loaded into the networks themselves. An adapter on demand is loaded into
a `twin` of the networks, on any thread and in its own time, while calls go on. The thread of the
networks then moves its layers over, which takes milliseconds.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from serve_app.engine.model.lora_files import load_lora, lora_layers
from serve_app.engine.model.networks import networks_of
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import AdapterSet


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter whose layers are in no network yet."""

    key: str
    """Its name in the layers."""
    layers: tuple[tuple[str, str, Any], ...]
    """Each layer with the name of its component and its path in it."""
    size_bytes: int
    """Size of its tensors in memory."""


class Adapters:
    """The adapters in the networks of one pipeline; used by the thread that runs them.

    Attributes:
        names: names of the adapters of the start.
        partial: for each of them that fits only in part, the share of it that is used.
    """

    def __init__(
        self, pipeline: Any, loras: Mapping[str, str], allow_partial: bool = False
    ) -> None:
        """Load ``loras`` into the pipeline's networks, and switch all of them off.

        Raises:
            ModelLoadError: an adapter cannot be loaded or does not fit; the message names it.
        """
        self.names = tuple(loras)
        self.partial: dict[str, str] = {}
        self._networks: dict[str, nn.Module] = networks_of(pipeline)
        self._keys = {name: f"lora_{index}" for index, name in enumerate(loras)}
        self._layers: list[Any] = []
        self._active: AdapterSet = ()
        if not loras:
            return
        check_takes_loras(pipeline, "model.loras")
        for name, source in loras.items():
            what = f"model.loras: {name!r} ({source})"
            with warnings.catch_warnings(action="ignore"):  # for each adapter after the first
                share = load_lora(pipeline, what, source, self._keys[name], allow_partial)
            if share:
                self.partial[name] = share
        self._layers = [layer for _, _, layer in lora_layers(pipeline)]
        self._set(())

    @property
    def layer_count(self) -> int:
        """Number of layers that have adapters."""
        return len(self._layers)

    @property
    def active(self) -> AdapterSet:
        """Adapters that the next call uses, with their scales."""
        return self._active

    def switch(self, wanted: AdapterSet) -> bool:
        """Activate exactly these adapters; return True if others were active.

        Costs a few microseconds per layer that has adapters.
        """
        if wanted == self._active:
            return False
        self._set(wanted)
        return True

    def attach(self, name: str, adapter: LoadedAdapter) -> None:
        """Move the layers of a loaded adapter into the networks. It is not active."""
        for component, path, layer in adapter.layers:
            where, _, child = path.rpartition(".")
            parent = self._networks[component].get_submodule(where)
            present = _of_same_kind(parent._modules[child], layer)
            if present is None:
                layer.base_layer = parent._modules[child]
                parent._modules[child] = layer
                self._layers.append(layer)
            else:
                _move(adapter.key, layer, present)
        self._keys[name] = adapter.key
        self._set(self._active)

    def keys(self, adapters: AdapterSet) -> AdapterSet:
        """Return the same adapters by keys, which are never used again."""
        return tuple((self._keys[name], scale) for name, scale in adapters)

    def detach(self, name: str) -> None:
        """Remove an adapter from the networks. Its layers stay, without it."""
        self._set(())
        key = self._keys.pop(name)
        for layer in self._layers:
            layer.delete_adapter(key)

    def _set(self, wanted: AdapterSet) -> None:
        keys = [self._keys[name] for name, _ in wanted]
        for layer in self._layers:
            # Not by set_adapter, which visits the gradients of every weight: ten times slower.
            layer._active_adapter = keys
            for key, (_, scale) in zip(keys, wanted, strict=True):
                layer.set_scale(key, scale)
        self._active = wanted


def check_takes_loras(pipeline: Any, setting: str) -> None:
    """Raise `ModelLoadError` if diffusers has no adapters for this class of pipelines."""
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelLoadError(
            f"{setting}: {type(pipeline).__name__} takes no LoRA adapters. Remove it."
        )


def prepare_loads() -> None:
    """Import what loads need, which takes a second. The first one would hold up calls with it."""
    import serve_app.engine.model.lora_coverage  # noqa: F401, it imports peft


def load_adapter(
    pipeline: Any, what: str, source: str, key: str, allow_partial: bool
) -> LoadedAdapter:
    """Load a file for the networks of a pipeline, without changing them.

    May run on any thread, beside calls of the pipeline. ``what`` names the adapter in messages.

    Raises:
        ModelLoadError: it cannot be loaded, or does not fit.
    """
    copied = twin(pipeline)
    load_lora(copied, what, source, key, allow_partial)
    layers = tuple(lora_layers(copied))
    networks = networks_of(pipeline)
    for component, path, _ in layers:
        try:
            networks[component].get_submodule(path)
        except AttributeError:
            raise ModelLoadError(
                f"{what} adds the layer {component}.{path} to the model. Serve it as a separate "
                "model."
            ) from None
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for _, _, layer in layers
        for part in layer.adapter_layer_names
        for tensor in getattr(layer, part).parameters()
    }
    return LoadedAdapter(key, layers, sum(tensors.values()))


def twin(pipeline: Any) -> Any:
    """Copy a pipeline with networks whose modules are new, without adapters, on the same weights.

    Only the networks that may have adapters are copied.
    """
    copied = copy.copy(pipeline)
    networks = networks_of(pipeline)
    for name in pipeline._lora_loadable_modules:
        if name in networks:
            vars(copied)[name] = _copied(networks[name], {})
    return copied


def _copied(module: Any, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    while hasattr(module, "adapter_layer_names"):
        module = module.base_layer
    if module in copies:  # at two places
        return copies[module]
    new: nn.Module = object.__new__(type(module))
    copies[module] = new
    # The thread of the calls may change a dict meanwhile, so each is copied in one step.
    attributes = dict(vars(module))
    # This one is not called: calls of the original may park.
    for name in ("forward", "peft_config", "_hf_peft_config_loaded"):
        attributes.pop(name, None)
    for name in ("_parameters", "_buffers"):
        attributes[name] = dict(attributes[name])
    attributes["_modules"] = {
        name: None if child is None else _copied(child, copies)
        for name, child in dict(attributes["_modules"]).items()
    }
    vars(new).update(attributes)
    return new


def _of_same_kind(module: Any, layer: Any) -> Any | None:
    """Return the layer with adapters at a place that can take those of ``layer``, if there is one.

    Layers of two kinds, such as LoRA and LoKr, are one in the other.
    """
    while hasattr(module, "adapter_layer_names"):
        if type(module) is type(layer):
            return module
        module = module.base_layer
    return None


def _move(key: str, layer: Any, present: Any) -> None:
    """Move one adapter from a layer to another layer of the same module."""
    for name in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        values = getattr(layer, name, {})
        if key in values:
            getattr(present, name)[key] = values[key]
