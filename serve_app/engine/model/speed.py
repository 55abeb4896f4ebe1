"""The speed options of the config: applied at load time, and followed while the model serves.

`speed_up` moves the loaded pipeline to its device. The engine runs its start-up in `compiling`,
calls `compile_batches` there, and runs its loop in `compiled`; `padded` brings its batches to
compiled sizes. This module imports no diffusers, and torchao only if the config needs it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from serve_app.config.speed import SpeedConfig
from serve_app.engine.batching.batch import BatchSpec, MergeableCall, prepare
from serve_app.engine.batching.rendezvous import Job, Rendezvous
from serve_app.engine.device import is_out_of_memory
from serve_app.errors import ConfigError
from serve_app.protocol.params import GenerationParams

_SHAPES = 4096
"""Limit of compiled graphs per block; torch's own is 8.

Each combination of image size, batch rows and kind of block needs one."""


def speed_up(
    pipeline: Any, denoisers: Mapping[str, nn.Module], speed: SpeedConfig, device: torch.device
) -> None:
    """Apply every option and move ``pipeline`` to ``device``; changes its networks in place.

    Raises:
        ConfigError: the model or the machine does not support an option.
    """
    if speed.cuda_graphs and device.type == "cpu":
        raise ConfigError(
            "model.speed.cuda_graphs needs a GPU, but this model is on the CPU. Leave the option "
            "out, or set model.device to 'cuda'."
        )
    for denoiser in denoisers.values():
        if speed.quantize != "none":
            _quantize(denoiser, speed.quantize, device)
        if speed.attention_backend is not None:
            _set_attention(denoiser, speed.attention_backend)
    if speed.channels_last:
        # A transformer has convolutions in the first layer at most; a VAE consists of them.
        for network in (*denoisers.values(), getattr(pipeline, "vae", None)):
            if network is not None:
                _order_channels_last(network)
    if speed.compile:  # before offloading, which runs code around a network
        check_compiler(device)
        for denoiser in denoisers.values():
            _compile(denoiser)
    if speed.offload == "model":
        _offload(pipeline, denoisers, device)
    else:
        pipeline.to(device)


def _quantize(denoiser: nn.Module, kind: str, device: torch.device) -> None:
    """Quantize layer by layer, so that the device never holds all original weights."""
    if (method := getattr(denoiser, "quantization_method", None)) is not None:
        raise ConfigError(
            f"model.speed.quantize is {kind!r}, and the weights of {type(denoiser).__name__} are "
            f"already quantized ({getattr(method, 'value', method)}). Leave the option out."
        )
    try:
        from torchao import quantization
    except ImportError as error:
        raise ConfigError(
            f"model.speed.quantize is {kind!r}, which needs torchao: {error}. Install "
            "'diffusion-serve[quantize]'."
        ) from None
    # torchao's compiler settings are global and lower the precision of float32.
    config = (
        quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        if kind == "int8"
        else quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    )
    try:
        quantization.quantize_(denoiser, config, device=device)
    except Exception as error:
        raise ConfigError(
            f"model.speed.quantize: torchao cannot convert {type(denoiser).__name__} to {kind} on "
            f"{device}: {error}"
        ) from error


def _set_attention(denoiser: Any, backend: str) -> None:
    name = type(denoiser).__name__
    if not any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in denoiser.modules()
    ):
        raise ConfigError(
            f"model.speed.attention_backend: the attention of {name} cannot be exchanged: it is "
            "always torch's own. Leave the option out."
        )
    try:
        denoiser.set_attention_backend(backend)
    except Exception as error:
        raise ConfigError(
            f"model.speed.attention_backend: {name} cannot use {backend!r}: {error}"
        ) from error


def _order_channels_last(network: nn.Module) -> None:
    # Not by network.to(), which fails for the convolutions of videos.
    for weights in network.parameters():
        if weights.ndim == 4:
            weights.data = weights.data.contiguous(memory_format=torch.channels_last)


def _offload(pipeline: Any, denoisers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Keep on the device one text encoder or denoiser at a time, and all small components.

    diffusers' own hooks do not fit: a pipeline removes and adds them again at its end, while other
    requests still run.
    """
    if device.type == "cpu":
        raise ConfigError(
            "model.speed.offload moves weights between a GPU and the CPU, but this model is on the "
            "CPU. Leave the option out, or set model.device to 'cuda'."
        )
    texts = {name: part for name, part in pipeline.components.items() if "text_encoder" in name}
    large = [part for part in {**denoisers, **texts}.values() if isinstance(part, nn.Module)]
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to("cpu" if part in large else device)
    take_turns(large, device)


def take_turns(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Make each network move to ``device`` when it is called, and the previous one leave.

    The first network starts there, because diffusers reads its device from the weights. Wraps
    ``forward`` permanently; the networks must not be called from two threads.
    """
    resident: nn.Module | None = networks[0].to(device)

    def move_in(network: nn.Module) -> None:
        nonlocal resident
        if network is resident:
            return
        if resident is not None:
            resident.to("cpu")
        resident = None
        try:
            resident = network.to(device)
        except BaseException:
            network.to("cpu")  # part of it may have moved
            raise

    def wrapped(network: nn.Module) -> Callable[..., Any]:
        forward = network.forward

        @functools.wraps(forward)  # pipelines inspect the signature
        def move_and_run(*args: Any, **kwargs: Any) -> Any:
            move_in(network)
            return forward(*args, **kwargs)

        return move_and_run

    for network in networks:
        network.forward = wrapped(network)


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` unless torch finds what it needs to compile for ``device``.

    Kernels for a CPU are C++, and so are those for parts of a GPU's network that run on the CPU.
    Triton compiles the kernels of a GPU by itself, but loads them with a module in C.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(
            f"model.speed.compile needs a C++ compiler such as g++, but none was found: {error}"
        ) from None
    if device.type == "cpu":
        return
    try:
        # Builds the module, or finds it in triton's cache, as the first call would.
        _ = import_module("triton.runtime").driver.active.utils
    except Exception as error:
        raise ConfigError(
            "model.speed.compile needs triton, a C compiler such as gcc, and Python's header files "
            f"(on Debian: python3-dev) on a GPU: {type(error).__name__}: {error}"
        ) from error


def _compile(denoiser: Any) -> None:
    """Compile a UNet as a whole, and the repeated blocks of any other network.

    The blocks are most of a transformer, and quick to compile. A UNet also has convolutions: with
    only its blocks compiled it is no faster, and with each of its parts compiled it is slower.
    """
    if hasattr(denoiser, "up_blocks"):
        denoiser.forward = torch.compile(denoiser.forward, dynamic=False)
        return
    # Without a list of repeated blocks, use those that diffusers never splits across devices.
    names = denoiser._repeated_blocks or denoiser._no_split_modules or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"model.speed.compile: {type(denoiser).__name__} names no repeated blocks. Leave the "
            "option out."
        )
    for block in blocks:
        block.compile(dynamic=False)


@contextmanager
def compiling(speed: SpeedConfig) -> Iterator[None]:
    """Allow compilation. Use it on the engine's thread: torch's limits belong to a thread."""
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
    """Run shapes that are not compiled without compiling them, so no request waits for that.

    Applies to the whole process.
    """
    if not speed.compile:
        yield
        return
    with torch.compiler.set_stance("eager_on_recompile"):
        yield


def bucket(count: int) -> int:
    """Return the padded size of a batch of ``count``: the next power of two."""
    return 1 << (count - 1).bit_length()


def largest_bucket(most: int) -> int:
    """Return the largest padded batch size that does not exceed ``most``."""
    return 1 << (most.bit_length() - 1)


def padded(calls: Sequence[MergeableCall]) -> list[MergeableCall]:
    """Return ``calls`` and copies of the shortest one, up to a compiled number of rows.

    Calls with and without guidance differ in rows, so the shortest call is the unit. Merge and
    split the result, and drop the outputs after the first ``len(calls)``.
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
    request: GenerationParams,
    most: int,
) -> None:
    """Compile for ``request``, with and without guidance, in all batches up to ``most``.

    Prompts are padded to `padded_lengths`. Stops at the batch size at which memory runs out. Runs
    on the thread that owns the pipeline, within `compiling`.
    """
    for guidance_scale in (5.0, 1.0):
        params = replace(request, guidance_scale=guidance_scale)
        job = Job(functools.partial(generate, params))
        warm: set[str] = set()
        try:
            job.start()
            while (call := job.call) is not None:
                if call.site in specs and call.site not in warm:
                    warm.add(call.site)
                    if (single := prepare(specs, call)) is not None:
                        for length in padded_lengths(specs[call.site], single):
                            _run_in_batches(rendezvous, specs[call.site], single, length, most)
                job.resume(rendezvous.forward(call))
            if job.error is not None:
                raise job.error
        finally:
            job.kill()


def padded_lengths(spec: BatchSpec, call: MergeableCall) -> tuple[int | None, ...]:
    """Return the lengths, in tokens, of the prompts to compile for: the first two buckets.

    Longer prompts are rare, and run uncompiled. ``(None,)`` if prompts are not padded.
    """
    first = spec.bucket([call])
    return (None,) if first is None else (first, 2 * first)


def _run_in_batches(
    rendezvous: Rendezvous, spec: BatchSpec, call: MergeableCall, length: int | None, most: int
) -> None:
    count = 1
    while count <= most:
        try:
            rendezvous.forward(spec.merge([call] * count, length))
        except Exception as error:
            if count == 1 or not is_out_of_memory(error):
                raise
            return
        count *= 2
