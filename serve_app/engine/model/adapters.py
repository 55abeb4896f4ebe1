"""LoRA adapters: loaded once, switched between calls.

Which of them act is a property of the shared networks, so that only requests with the same adapters
at the same scales may share a call; see `AdapterSet`.
"""

import logging
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from serve_app.config.models import is_path
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import AdapterSet


class Adapters:
    """The adapters in the networks of one pipeline. Belongs to the thread that runs them."""

    def __init__(self, pipeline: Any, networks: Collection[nn.Module], loras: Mapping[str, str]):
        """Load ``loras`` into the pipeline's networks, and switch all of them off.

        Raises:
            ModelLoadError: naming the adapter that cannot be loaded.
        """
        self.names = tuple(loras)
        self._keys = {name: f"lora_{index}" for index, name in enumerate(loras)}
        self._layers: list[Any] = []
        self._active: AdapterSet = ()
        if not loras:
            return
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelLoadError(f"model.loras: {type(pipeline).__name__} takes no LoRA adapters.")
        # That an adapter leaves a text encoder alone is nothing to warn of.
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
        for name, source in loras.items():
            try:
                with warnings.catch_warnings(action="ignore"):  # of a second adapter, each time
                    pipeline.load_lora_weights(
                        **_located(source), adapter_name=self._keys[name], use_safetensors=True
                    )
            except Exception as error:
                raise ModelLoadError(
                    f"model.loras: {name!r} cannot be loaded from {source}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        changed = [
            name
            for name in ("_transformer_norm_layers", "_overwritten_params")
            for network in networks
            if getattr(network, name, None)
        ]
        if changed:
            raise ModelLoadError(
                "model.loras: an adapter changes the model itself, for requests without it too "
                "(a control LoRA of Flux does): serve it as a model of its own."
            )
        from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import, and rarely needed

        for network in networks:
            for layer in network.modules():
                if isinstance(layer, BaseTunerLayer):
                    self._layers.append(layer)
                    for part in layer.adapter_layer_names:
                        # A file may be of another dtype than the model.
                        getattr(layer, part).to(layer.weight.dtype).requires_grad_(False)
        self._set(())

    def switch(self, wanted: AdapterSet) -> bool:
        """Let these act, and no others; whether others did before.

        Costs a few microseconds for each layer that has any.
        """
        if wanted == self._active:
            return False
        self._set(wanted)
        return True

    def _set(self, wanted: AdapterSet) -> None:
        keys = [self._keys[name] for name, _ in wanted]
        for layer in self._layers:
            # Not set_adapter, which looks at the gradients of every weight: ten times slower.
            layer._active_adapter = keys
            for key, (_, scale) in zip(keys, wanted, strict=True):
                layer.set_scale(key, scale)
        self._active = wanted


def _located(source: str) -> dict[str, str]:
    """Where diffusers finds it: a folder or a repository, and a file in there if one is named."""
    if is_path(source):
        # Not resolved: in the cache of the hub a link has the name, and its target a number.
        path = Path(source).expanduser().absolute()
        where, file = str(path.parent), path.name
    else:
        owner, name, *rest = source.split("/", 2)
        where, file = f"{owner}/{name}", "".join(rest)
    return {"pretrained_model_name_or_path_or_dict": where} | (
        {"weight_name": file} if file else {}
    )
