"""Starts of a tiny pipeline, with a profile or without."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.startup.certification import Certificate
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.noise_scheduler_trials import SchedulerTrials
from serve_app.engine.startup.warmup import warm_up
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.tiny_pipelines import FAMILIES

TINY = DEMO.model_copy(update={"default_size_px": (32, 32)})
SIZES = ((64, 32), (32, 64))
REUSED = "certification reused, and caps of 2 of 2 sizes"
NEW = "certification and caps are new"


def tiny(model: ModelConfig = TINY) -> LoadedPipeline:
    """Return a new tiny pipeline; its weights are always the same."""
    return LoadedPipeline(FAMILIES["stable-diffusion"](), model)


def config(path: Path, **changes: Any) -> EngineConfig:
    """Return an engine config with a profile at ``path``."""
    return EngineConfig(
        scheduling="fifo",
        profile_path=str(path),
        **{"max_batch_size": 4, "warmup_sizes_px": SIZES} | changes,
    )


def requests() -> list[GenerationParams]:
    """Return three requests that differ in prompt and seed."""
    return [
        GenerationParams(f"a {color} circle", seed, width=32, height=32, num_inference_steps=4)
        for seed, color in enumerate(("red", "green", "blue"))
    ]


@dataclass(frozen=True)
class Start:
    """Results of a warm-up."""

    certificate: Certificate
    cost: CostModel
    reuse: str
    trials: SchedulerTrials


def start(pipeline: LoadedPipeline, engine_config: EngineConfig) -> Start:
    """Warm up the pipeline as an engine does."""
    cost, clock = CostModel(engine_config.max_batch_size), ColdStart()
    rendezvous = Rendezvous(pipeline.sites)
    try:
        with torch.no_grad():
            certificate, _, trials = warm_up(
                pipeline, rendezvous, engine_config, TINY.speed, cost, clock
            )
    finally:
        rendezvous.close()
    return Start(certificate, cost, clock.reuse, trials)


def reported_reuse(messages: list[str]) -> str:
    """Return what the last start reused, from its line in the log."""
    *_, line = [message for message in messages if "ready after" in message]
    return line.rpartition("; ")[2]


@contextmanager
def called(network: nn.Module) -> Iterator[list[torch.Size]]:
    """Record the input shapes of the network's first layer.

    The hook is global: a hook on the network itself would change its fingerprint.
    """
    shapes: list[torch.Size] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is network.conv_in:
            shapes.append(args[0].shape)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield shapes
    finally:
        handle.remove()
