"""Measure the speed options: ``python -m tests.benchmarks.speed``.

Each option is compared with the model without options, in turns within one run, so that other load
on the machine affects both. The results are the seconds of a denoiser call for one image and for
eight, the difference of one image, and the weights on the device.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from serve_app.config.models import ModelConfig
from serve_app.config.speed import SpeedConfig
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.speed import compiled, compiling
from serve_app.engine.startup.comparison import psnr_db
from serve_app.engine.timer import wait_for_device
from serve_app.errors import DiffusionServeError
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.engine import hardware

BATCHES = (1, 8)

OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "channels_last": {"speed": {"channels_last": True}},
    "attention_backend: native": {"speed": {"attention_backend": "native"}},
    "attention_backend: _native_cudnn": {"speed": {"attention_backend": "_native_cudnn"}},
    "quantize: int8": {"speed": {"quantize": "int8"}},
    "quantize: fp8": {"speed": {"quantize": "fp8"}},
    "compile": {"speed": {"compile": True}},
    "compile, quantize: int8": {"speed": {"compile": True, "quantize": "int8"}},
    "compile, quantize: fp8": {"speed": {"compile": True, "quantize": "fp8"}},
    "cuda_graphs": {"speed": {"cuda_graphs": True}},
    "compile, cuda_graphs": {"speed": {"compile": True, "cuda_graphs": True}},
    "offload: model": {"speed": {"offload": "model"}},
}
"""Changes of the model's config, by option."""

NEEDS_GPU = (
    "attention_backend: _native_cudnn",
    "cuda_graphs",
    "compile, cuda_graphs",
    "offload: model",
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    option: str
    note: str = ""
    """Reason for which the option is not measured, or empty."""
    call_s: dict[int, float] | None = None
    """Median seconds of a call, by batch size."""
    without_s: dict[int, float] | None = None
    """Median seconds of the model without the option, measured in between, by batch size."""
    ratio: dict[int, float] | None = None
    """Median over the repeats of the ratio of the two, by batch size."""
    largest_difference: float | None = None
    """Largest difference of a pixel in [0, 1] of one image."""
    psnr_db: float | None = None
    """Peak signal-to-noise ratio; 120 if there is no difference."""
    denoiser_mib: float | None = None
    device_mib: float | None = None
    """Weights of all networks on the device while an image is decoded."""


def weight_bytes(networks: Iterable[nn.Module], device: torch.device | None = None) -> int:
    """Return the bytes of weights and buffers, on ``device`` if given; quantized ones as stored."""
    return sum(
        part.nbytes
        for network in networks
        for weights in (*network.parameters(), *network.buffers())
        for part in _plain(weights)
        if device is None or part.device.type == device.type
    )


def _plain(weights: Tensor) -> list[Tensor]:
    """Return the tensors inside a quantized one, or the tensor itself."""
    flatten = getattr(weights, "__tensor_flatten__", None)
    return [weights] if flatten is None else [getattr(weights, name) for name in flatten()[0]]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _denoiser(pipeline: LoadedPipeline) -> nn.Module:
    return next(iter(pipeline.denoisers.values()))


def record_calls(pipeline: LoadedPipeline, params: GenerationParams) -> dict[int, Arguments]:
    """Return the arguments of the pipeline's first denoiser call, by batch size."""
    calls: dict[int, Arguments] = {}
    for batch in BATCHES:

        def keep(module: nn.Module, *arguments: Any, batch: int = batch) -> None:
            calls.setdefault(batch, arguments)

        handle = _denoiser(pipeline).register_forward_pre_hook(keep, with_kwargs=True)
        pipeline.generate(params, images=batch)
        handle.remove()
    return calls


def _seconds(pipeline: LoadedPipeline, arguments: Arguments) -> float:
    args, kwargs = arguments
    started_at = time.perf_counter()
    with torch.no_grad():
        _denoiser(pipeline)(*args, **kwargs)
    wait_for_device()
    return time.perf_counter() - started_at


@dataclass(frozen=True)
class Subject:
    """A loaded and warm model, its recorded calls and its measurements."""

    pipeline: LoadedPipeline
    calls: dict[int, Arguments]
    image: Tensor
    denoiser_mib: float
    device_mib: float

    @classmethod
    def load(cls, config: ModelConfig, params: GenerationParams) -> "Subject":
        pipeline = LoadedPipeline.load(config)
        calls = record_calls(pipeline, replace(params, num_inference_steps=2))
        if pipeline.graphs is not None:
            with pipeline.graphs.mode("capture"), torch.no_grad():
                for args, kwargs in calls.values():
                    _denoiser(pipeline)(*args, **kwargs)
        image = pipeline.generate(params).cpu()
        parts = pipeline.stock.components.values()
        networks = [part for part in parts if isinstance(part, nn.Module)]
        denoiser_mib = weight_bytes([_denoiser(pipeline)]) / 2**20
        device_mib = weight_bytes(networks, pipeline.device) / 2**20
        return cls(pipeline, calls, image, denoiser_mib, device_mib)


def measure(option: str, subject: Subject, baseline: Subject, repeats: int) -> Row:
    """Measure calls in turns, without the first of each, which may allocate."""
    call_s: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    without_s: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for repeat in range(repeats + 1):
        for batch in BATCHES:
            pair = [(subject, call_s), (baseline, without_s)]
            for one, taken in pair if repeat % 2 else reversed(pair):
                taken[batch].append(_seconds(one.pipeline, one.calls[batch]))
    ratios = {
        batch: [a / b for a, b in zip(call_s[batch][1:], without_s[batch][1:], strict=True)]
        for batch in BATCHES
    }
    return Row(
        option,
        call_s={batch: statistics.median(values[1:]) for batch, values in call_s.items()},
        without_s={batch: statistics.median(values[1:]) for batch, values in without_s.items()},
        ratio={batch: statistics.median(values) for batch, values in ratios.items()},
        largest_difference=float((subject.image - baseline.image).abs().max()),
        psnr_db=psnr_db(subject.image, baseline.image),
        denoiser_mib=subject.denoiser_mib,
        device_mib=subject.device_mib,
    )


def show(rows: list[Row]) -> str:
    """Format the table, with one option a line."""
    wide = max(len(row.option) for row in rows)
    head = "".join(f" {f'batch {batch}, ms':>12} {'ratio':>6}" for batch in BATCHES)
    head += f" {'difference':>10} {'PSNR dB':>7} {'denoiser MiB':>12} {'device MiB':>10}"
    lines = [" " * wide + head]
    for row in rows:
        line = f"{row.option:<{wide}}"
        if row.call_s is None or row.ratio is None:
            lines.append(f"{line} not measured: {row.note}")
            continue
        for batch in BATCHES:
            line += f" {1000 * row.call_s[batch]:>12.2f} {row.ratio[batch]:>6.2f}"
        line += f" {row.largest_difference:>10.2g} {row.psnr_db:>7.1f}"
        lines.append(f"{line} {row.denoiser_mib:>12.1f} {row.device_mib:>10.1f}")
    return "\n".join(lines)


def main(
    model: Annotated[str, typer.Option(help="'demo', or a folder in the diffusers format.")] = (
        "demo"
    ),
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Measured repeats of each call.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads of torch on a CPU.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    plain = {"id": "demo", "device": device}
    if model != "demo":
        plain |= {"id": Path(model).name, "path": str(Path(model).absolute())}
    torch.set_num_threads(threads)
    config = ModelConfig.model_validate(plain)
    width, height = LoadedPipeline.load(config).default_size_px
    params = GenerationParams(
        "a red circle on a blue background",
        1,
        width=width,
        height=height,
        num_inference_steps=20,
        guidance_scale=5.0,
    )
    baseline = Subject.load(config, params)
    # The baseline against itself shows the noise of the measurement.
    rows = [measure("none", Subject.load(config, params), baseline, repeats)]
    for option, change in OPTIONS.items():
        if option in NEEDS_GPU and device == "cpu":
            rows.append(Row(option, note="needs a GPU"))
            continue
        speed = SpeedConfig.model_validate(change.get("speed", {}))
        try:
            changed = ModelConfig.model_validate(plain | change)
            with compiling(speed):
                subject = Subject.load(changed, params)
            with compiled(speed):
                rows.append(measure(option, subject, baseline, repeats))
        except DiffusionServeError as error:
            rows.append(Row(option, note=str(error)))
        typer.echo(f"{option}: done", err=True)
    typer.echo(show(rows))
    if output is not None:
        result = {
            "command": "python -m tests.benchmarks.speed " + " ".join(sys.argv[1:]),
            "hardware": hardware(baseline.pipeline.device) | {"torchao": version("torchao")},
            "model": model,
            "dtype": str(baseline.pipeline.dtype),
            "size_px": [width, height],
            "steps": params.num_inference_steps,
            "repeats": repeats,
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
