"""LoRA adapters: loaded once, switched between calls.

The active adapters are a property of the shared networks. So only requests with the same adapters
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
    """The adapters in the networks of one pipeline; used by the thread that runs them."""

    def __init__(self, pipeline: Any, networks: Collection[nn.Module], loras: Mapping[str, str]):
        """Load ``loras`` into the pipeline's networks, and switch all of them off.

        Raises:
            ModelLoadError: an adapter cannot be loaded; the message names it.
        """
        self.names = tuple(loras)
        self._keys = {name: f"lora_{index}" for index, name in enumerate(loras)}
        self._layers: list[Any] = []
        self._active: AdapterSet = ()
        if not loras:
            return
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelLoadError(
                f"model.loras: {type(pipeline).__name__} takes no LoRA adapters. Remove them."
            )
        # diffusers warns of each adapter that does not change the text encoder.
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
        for name, source in loras.items():
            try:
                with warnings.catch_warnings(action="ignore"):  # for each adapter after the first
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
                "model.loras: an adapter changes the model itself, even for requests without it "
                "(a control LoRA of Flux does). Serve it as a separate model."
            )
        from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import and rarely needed

        for network in networks:
            for layer in network.modules():
                if isinstance(layer, BaseTunerLayer):
                    self._layers.append(layer)
                    for part in layer.adapter_layer_names:
                        # The file may have another dtype than the model.
                        getattr(layer, part).to(layer.weight.dtype).requires_grad_(False)
        self._set(())

    @property
    def layer_count(self) -> int:
        """Number of layers that have adapters."""
        return len(self._layers)

    def switch(self, wanted: AdapterSet) -> bool:
        """Activate exactly these adapters; return True if others were active.

        Costs a few microseconds per layer that has adapters.
        """
        if wanted == self._active:
            return False
        self._set(wanted)
        return True

    def _set(self, wanted: AdapterSet) -> None:
        keys = [self._keys[name] for name, _ in wanted]
        for layer in self._layers:
            # Not by set_adapter, which visits the gradients of every weight: ten times slower.
            layer._active_adapter = keys
            for key, (_, scale) in zip(keys, wanted, strict=True):
                layer.set_scale(key, scale)
        self._active = wanted


def _located(source: str) -> dict[str, str]:
    """Return diffusers' arguments for a source: a folder or repository, and maybe a file."""
    if is_path(source):
        # Not resolved: in the hub's cache only the link has the name; its target is a hash.
        path = Path(source).expanduser().absolute()
        where, file = str(path.parent), path.name
    else:
        owner, name, *rest = source.split("/", 2)
        where, file = f"{owner}/{name}", "".join(rest)
    return {"pretrained_model_name_or_path_or_dict": where} | (
        {"weight_name": file} if file else {}
    )
