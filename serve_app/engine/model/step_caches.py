"""Caches of diffusers inside a denoiser, for comparison with extrapolated calls.

Such a cache keeps one state for each network, so requests cannot share the network. It hooks the
modules, too. So it gets a copy of the denoiser's modules with the same weights, and the engine's
network is never changed. ``diffusion-serve tune`` uses this while no engine runs.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, float32, nn

from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams

CacheConfig: TypeAlias = FirstBlockCacheConfig | TaylorSeerCacheConfig


def first_block_cache(threshold: float) -> CacheConfig:
    """Return a cache that skips all other blocks while the first one's change is small."""
    return FirstBlockCacheConfig(threshold=threshold)


def taylor_seer(interval: int) -> CacheConfig:
    """Return a cache that computes a call in each ``interval``, and predicts the others.

    It is the lite mode, in which a predicted call runs no block. The default mode predicts only the
    attention and computes the rest of each block, so its predicted calls still cost much.
    """
    return TaylorSeerCacheConfig(
        cache_interval=interval, taylor_factors_dtype=float32, use_lite_mode=True
    )


class CachedPipeline:
    """A pipeline with a cache in its denoiser: one request at a time, without an engine."""

    def __init__(self, pipeline: LoadedPipeline, denoiser: nn.Module, counts: "_Counts") -> None:
        """Use `with_cache` instead."""
        self._counts = counts
        (name,) = pipeline.denoisers
        self._pipeline = copy.copy(pipeline)
        self._pipeline.timesteps_on_cpu = False
        self._pipeline.pipelines = {
            task: copy.copy(one) for task, one in pipeline.pipelines.items()
        }
        for one in self._pipeline.pipelines.values():
            vars(one)[name] = denoiser  # not by setattr, which writes to the shared config

    def generate(self, params: GenerationParams) -> tuple[Tensor, int]:
        """Return the image ``[3, height, width]``, and how many calls ran all blocks.

        ``params`` must be resolved.
        """
        self._counts.clear()
        image = self._pipeline.generate(params)[0]
        # The first block runs in every call, the others only in those that are computed.
        return image, min(self._counts.values(), default=0)


_Counts = dict[str, int]
"""Runs of each block, by its path."""


def with_cache(pipeline: LoadedPipeline, config: CacheConfig) -> CachedPipeline | None:
    """Return a copy of the pipeline with the cache; ``None`` if its denoiser does not support it.

    No engine may use the pipeline meanwhile: the copy would get the engine's ``forward``.
    """
    if len(pipeline.denoisers) != 1:
        return None
    (original,) = pipeline.denoisers.values()
    call = cast(Any, inspect.unwrap(type(pipeline.stock).__call__))
    # A cache finds its state by a context, which only some pipelines set.
    if not isinstance(original, CacheMixin) or "cache_context" not in call.__code__.co_names:
        return None
    if hasattr(original, "_hf_hook"):  # offloaded: a copy of the hook would copy other networks
        return None
    lite = isinstance(config, TaylorSeerCacheConfig)
    if lite and not isinstance(getattr(original, "proj_out", None), nn.Module):
        return None
    weights = (*original.parameters(), *original.buffers())
    denoiser = copy.deepcopy(original, {id(tensor): tensor for tensor in weights})
    counts: _Counts = {}
    for name, blocks in denoiser.named_children():
        # All lists, whatever their names: one that no cache skips has no fewer runs.
        if isinstance(blocks, nn.ModuleList):
            for index, block in enumerate(blocks):
                # Before the cache's hooks, so that they call it only when they compute.
                vars(block)["forward"] = _counted(block.forward, f"{name}.{index}", counts)
    try:
        denoiser.enable_cache(config)
    except (ValueError, IndexError):  # diffusers does not know the blocks, or there is only one
        return None
    return CachedPipeline(pipeline, denoiser, counts)


def _counted(forward: Callable[..., Any], path: str, counts: _Counts) -> Callable[..., Any]:
    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[path] = counts.get(path, 0) + 1
        return forward(*args, **kwargs)

    return counted
