"""The speed options of the config: applied when a model is loaded, kept to while it serves.

`speed_up` takes the loaded pipeline to its device. The engine runs its start-up in `compiling`,
calls `compile_batches` there, runs its loop in `compiled`, and `padded` gives its batches sizes
that are compiled. Works with the methods of the objects alone: imports no diffusers, and torchao
only where it is asked for.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from serve_app.config.models import SpeedConfig
from serve_app.engine.batching.batch import BatchSpec, MergeableCall
from serve_app.engine.batching.rendezvous import Job, Rendezvous
from serve_app.engine.scheduling.cost import Size
from serve_app.errors import ConfigError
from serve_app.protocol.params import GenerationParams, probe

_SHAPES = 4096
"""Compiled forms of one block that are kept; torch itself stops at 8. Each is a size of picture,
rows of a batch and a kind of block."""


def speed_up(
    pipeline: Any, denoisers: Mapping[str, nn.Module], speed: SpeedConfig, device: torch.device
) -> None:
    """Move ``pipeline`` to ``device``, with every option applied; changes its networks in place.

    Raises:
        ConfigError: if the model or the machine cannot do what an option says.
    """
    for denoiser in denoisers.values():
        if speed.quantize != "none":
            _quantize(denoiser, speed.quantize, device)
        if speed.attention_backend is not None:
            _set_attention(denoiser, speed.attention_backend)
    if speed.channels_last:
        # Transformers have their convolutions, if any, in the first layer; a VAE is made of them.
        for network in (*denoisers.values(), getattr(pipeline, "vae", None)):
            if network is not None:
                _order_channels_last(network)
    if speed.offload == "model":
        _offload(pipeline, denoisers, device)
    else:
        pipeline.to(device)
    if speed.compile:
        _check_compiler()
        for denoiser in denoisers.values():
            _compile(denoiser)


def _quantize(denoiser: nn.Module, kind: str, device: torch.device) -> None:
    """Layer by layer on the device, which never holds all the weights as they were."""
    try:
        from torchao import quantization
    except ImportError as error:
        raise ConfigError(
            f"model.speed.quantize is {kind!r}, which needs torchao: {error}. Install "
            "'diffusion-serve[quantize]'."
        ) from None
    # Its recommended settings of the compiler are global, and lower the precision of float32.
    config = (
        quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        if kind == "int8"
        else quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    )
    try:
        quantization.quantize_(denoiser, config, device=device)
    except Exception as error:
        raise ConfigError(
            f"model.speed.quantize: torchao cannot make {type(denoiser).__name__} {kind} on "
            f"{device}: {error}"
        ) from error


def _set_attention(denoiser: Any, backend: str) -> None:
    name = type(denoiser).__name__
    if not any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in denoiser.modules()
    ):
        raise ConfigError(
            f"model.speed.attention_backend: the attention of {name} cannot be exchanged, and is "
            "torch's own; leave the option out."
        )
    try:
        denoiser.set_attention_backend(backend)
    except Exception as error:
        raise ConfigError(
            f"model.speed.attention_backend: {name} cannot use {backend!r}: {error}"
        ) from error


def _order_channels_last(network: nn.Module) -> None:
    # Not by network.to(), which fails at the convolutions of videos.
    for weights in network.parameters():
        if weights.ndim == 4:
            weights.data = weights.data.contiguous(memory_format=torch.channels_last)


def _offload(pipeline: Any, denoisers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Keep one of the text encoders and denoisers on the device, and the small rest.

    Not by diffusers' hooks: a pipeline takes them off and puts them on again at its end, under
    the feet of all other requests.
    """
    if device.type == "cpu":
        raise ConfigError(
            "model.speed.offload moves weights between a GPU and the CPU, and this model is on the "
            "CPU: leave the option out, or set model.device to 'cuda'."
        )
    texts = {name: part for name, part in pipeline.components.items() if "text_encoder" in name}
    large = [part for part in {**denoisers, **texts}.values() if isinstance(part, nn.Module)]
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to("cpu" if part in large else device)
    take_turns(large, device)


def take_turns(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Have each network come to ``device`` when it is called, and the one before it leave.

    The first is there from the start: diffusers finds its device where the weights are. Wraps
    ``forward``, for good; the networks must not be called from two threads.
    """
    resident: nn.Module | None = networks[0].to(device)

    def bring(network: nn.Module) -> None:
        nonlocal resident
        if network is resident:
            return
        if resident is not None:
            resident.to("cpu")
        resident = None
        try:
            resident = network.to(device)
        except BaseException:
            network.to("cpu")  # half of it may be there
            raise

    def wrapped(network: nn.Module) -> Callable[..., Any]:
        forward = network.forward

        @functools.wraps(forward)  # pipelines look at the signature
        def come_first(*args: Any, **kwargs: Any) -> Any:
            bring(network)
            return forward(*args, **kwargs)

        return come_first

    for network in networks:
        network.forward = wrapped(network)


def _check_compiler() -> None:
    """The compiler of torch needs one of C++ itself, for the CPU and to start a GPU's kernels."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(
            f"model.speed.compile needs a C++ compiler such as g++, and none is found: {error}"
        ) from None


def _compile(denoiser: Any) -> None:
    """The blocks that repeat, each in place: quick to compile, and most of a transformer."""
    # Where diffusers names none, those that it keeps in one piece on several devices.
    names = denoiser._repeated_blocks or denoiser._no_split_modules or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"model.speed.compile: {type(denoiser).__name__} names no blocks that repeat; leave "
            "the option out."
        )
    for block in blocks:
        block.compile(dynamic=False)


@contextmanager
def compiling(speed: SpeedConfig) -> Iterator[None]:
    """Around everything that may compile. On the engine's thread: the limits belong to a thread."""
    if not speed.compile:
        yield
        return
    with (
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES),
    ):
        yield


@contextmanager
def compiled(speed: SpeedConfig) -> Iterator[None]:
    """Around everything else: what was not compiled runs as it is, and nobody waits for it.

    Holds for the whole process.
    """
    if not speed.compile:
        yield
        return
    with torch.compiler.set_stance("eager_on_recompile"):
        yield


def bucket(count: int) -> int:
    """The size to which a batch of ``count`` is padded: the next power of two."""
    return 1 << (count - 1).bit_length()


def largest_bucket(most: int) -> int:
    """The largest size of a padded batch that is not over ``most``."""
    return 1 << (most.bit_length() - 1)


def padded(calls: Sequence[MergeableCall]) -> list[MergeableCall]:
    """``calls`` and repetitions of one of them, up to a number of rows that is compiled.

    With and without guidance the rows of a call differ; the shortest call is the measure. Merge
    and split these, and drop the outputs after the first ``len(calls)``.
    """
    shortest = min(calls, key=lambda call: call.length)
    count = sum(call.length for call in calls) / shortest.length
    if count.denominator != 1:
        return list(calls)
    return [*calls, *[shortest] * (bucket(int(count)) - int(count))]


def compile_batches(
    generate: Callable[[GenerationParams], object],
    rendezvous: Rendezvous,
    specs: Mapping[str, BatchSpec],
    size: Size,
    most: int,
) -> None:
    """Compile for pictures of ``size``, with and without guidance, in all batches up to ``most``.

    Ends early where memory does. Runs on the thread that owns the pipeline, within `compiling`.
    """
    for guidance_scale in (5.0, 1.0):
        params = replace(probe(size), guidance_scale=guidance_scale)
        job = Job(functools.partial(generate, params))
        warm: set[str] = set()
        try:
            job.start()
            while (call := job.call) is not None:
                if call.site in specs and call.site not in warm:
                    warm.add(call.site)
                    _run_in_batches(
                        rendezvous, specs[call.site], specs[call.site].prepare(call), most
                    )
                job.resume(rendezvous.forward(call))
            if job.error is not None:
                raise job.error
        finally:
            job.kill()


def _run_in_batches(
    rendezvous: Rendezvous, spec: BatchSpec, call: MergeableCall, most: int
) -> None:
    count = 1
    while count <= most:
        try:
            rendezvous.forward(spec.merge([call] * count))
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            return
        count *= 2
