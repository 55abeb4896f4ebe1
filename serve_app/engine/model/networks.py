"""The networks of a stock pipeline: its denoisers, its parking sites and its shared state."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from serve_app.config.model_index import DENOISERS


def networks_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the components that are networks, by name."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }


def denoisers_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of the denoising loop, by name."""
    networks = networks_of(pipeline)
    return {name: networks[name] for name in DENOISERS if name in networks}


def find_sites(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the sites where requests yield: every network, and every block inside the VAE.

    Decoding a large image takes longer than a step; one of its blocks usually does not.
    """
    sites: dict[str, nn.Module] = {}
    for name, network in networks_of(pipeline).items():
        halves = ("encoder", "decoder") if hasattr(network, "decode") else ()
        parts = {half: getattr(network, half, None) for half in halves}
        if not any(isinstance(part, nn.Module) for part in parts.values()):
            sites[name] = network
            continue
        for half, part in parts.items():
            if isinstance(part, nn.Module):
                for path, block in _blocks(part):
                    sites[f"{name}.{half}.{path}"] = block
    return sites


def _blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children that have children; a list yields its own items instead."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            for path, block in _blocks(child):
                yield f"{name}.{path}", block
        elif next(child.children(), None) is not None:
            yield name, child


class NetworkState:
    """Dtypes and attention processors of the networks, as they were loaded.

    Some families change the shared networks during a call and restore them at its end. PAG replaces
    the attention while it denoises. Conversions of a VAE concern only the copy of their request.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._networks: dict[str, Any] = dict(networks_of(pipeline))
        self._dtypes: dict[str, torch.dtype] = {}
        self._attention: dict[str, dict[str, object]] = {}
        for name, network in self._networks.items():
            if isinstance(dtype := getattr(network, "dtype", None), torch.dtype):
                self._dtypes[name] = dtype
            if hasattr(network, "attn_processors"):
                self._attention[name] = dict(network.attn_processors)

    def restore(self) -> None:
        """Undo the changes of a call that ended early or overlapped with another."""
        for name, dtype in self._dtypes.items():
            network = self._networks[name]
            if network.dtype != dtype:
                nn.Module.to(network, dtype)  # diffusers' own method warns
        for name, processors in self._attention.items():
            network = self._networks[name]
            if network.attn_processors != processors:
                network.set_attn_processor(dict(processors))
