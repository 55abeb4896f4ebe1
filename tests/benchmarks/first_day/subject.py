"""The models of a first day, with random weights of the published sizes, and what runs on them."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.runs import Runs
from serve_app.engine.timer import wait_for_device
from serve_app.errors import Unavailable
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.first_day.day import Day
from tests.benchmarks.ways import PROMPTS
from tests.full_size import MODELS
from tests.tiny_pipelines import FAMILIES

TINY = {"sd15": "stable-diffusion", "sdxl": "sdxl", "flux": "flux"}
"""Families that stand for the models in a rehearsal."""

TINY_SIDE = {512: 32, 1024: 64}
"""Sides of a rehearsal."""


@dataclass(frozen=True)
class Target:
    """A model at one size, and how much of it is measured."""

    model: str
    side: int
    """Width and height in pixels."""
    batches: tuple[int, ...]
    """Batch sizes of single denoiser calls."""
    waiting: tuple[int, ...]
    """Numbers of requests that arrive at once."""
    steps: int
    """Denoising steps of an image."""
    alone: int
    """Images that the stock pipeline generates one at a time."""
    efficiency_steps: int
    """Denoising steps of the requests whose efficiency is measured."""

    @property
    def name(self) -> str:
        return f"{self.model} at {self.side}x{self.side}"


@dataclass
class Subject:
    """A loaded model at one size, and its engine.

    Attributes:
        built_s: seconds that building the weights took.
        profile: file in which the engine's start keeps its results.
        alone: images of the stock pipeline, by seed.
    """

    target: Target
    pipeline: LoadedPipeline
    model: ModelConfig
    built_s: float
    rehearsal: bool
    profile: Path
    alone: dict[int, torch.Tensor] = field(default_factory=dict)
    _engine: Engine | None = None

    @property
    def side(self) -> int:
        return TINY_SIDE[self.target.side] if self.rehearsal else self.target.side

    @property
    def batches(self) -> tuple[int, ...]:
        return self.target.batches[:2] if self.rehearsal else self.target.batches

    @property
    def waiting(self) -> tuple[int, ...]:
        return (1, 2) if self.rehearsal else self.target.waiting

    @property
    def steps(self) -> int:
        return 3 if self.rehearsal else self.target.steps

    def params(self, seed: int, steps: int | None = None) -> GenerationParams:
        """Return the request with this seed, with a prompt of its own."""
        return GenerationParams(
            PROMPTS[seed % len(PROMPTS)],
            seed,
            width=self.side,
            height=self.side,
            num_inference_steps=steps or self.steps,
            guidance_scale=5.0,
        )

    def start_engine(self) -> Engine:
        """Start an engine: first come first served, and without rejections."""
        config = {
            "scheduling": "fifo",
            "max_batch_size": max(*self.batches, *self.waiting),
            "max_running": 64,
            "max_backlog_s": 1e6,
            "warmup_sizes_px": [(self.side, self.side)],
            "profile_path": str(self.profile),
        }
        return Engine(self.pipeline, self.model, EngineConfig.model_validate(config))

    @property
    def engine(self) -> Engine:
        """The engine of this model, started at its first use.

        It stays open, because another start would certify anew.
        """
        if self._engine is None:
            self._engine = self.start_engine()
        return self._engine

    @property
    def specs(self) -> dict[str, BatchSpec]:
        """Where the batch is in the denoiser's arguments; empty unless certified as batched."""
        return self.engine.certificate.specs

    @contextmanager
    def runs(self) -> Iterator[Runs]:
        """Make the networks park, and yield runs beside the idle engine."""
        rendezvous = Rendezvous(self.pipeline.sites)
        try:
            with torch.no_grad():
                yield Runs(self.pipeline, rendezvous)
        finally:
            rendezvous.close()

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close(drain=False)
            self._engine = None

    @property
    def broken(self) -> bool:
        """True if the engine has stopped."""
        try:
            if self._engine is not None:
                self._engine.check()
        except Unavailable:
            return True
        return False


class Subjects:
    """One loaded model at a time: a section that needs another one replaces it."""

    def __init__(self, day: Day, folder: Path) -> None:
        """Build for the day's device; ``folder`` gets the profiles of the starts."""
        self._day = day
        self._folder = folder
        self._subject: Subject | None = None
        self._built_s = 0.0

    def get(self, target: Target) -> Subject:
        """Return the model of ``target``, built now unless it is loaded.

        Another size of a model is built anew as well: text encoders get hooks at their first call,
        which a start takes for another model.
        """
        if self._subject is not None and self._subject.target == target:
            return self._subject
        self.release()
        started_at = time.perf_counter()
        stock = self.build(target.model)
        wait_for_device()
        self._built_s = time.perf_counter() - started_at
        self._subject = self.subject(target, stock, self._model(target))
        return self._subject

    def subject(self, target: Target, stock: DiffusionPipeline, model: ModelConfig) -> Subject:
        """Return a subject for this pipeline. Its profile is that of the target."""
        return Subject(
            target,
            LoadedPipeline(stock, model),
            model,
            self._built_s,
            self._day.rehearsal,
            self._folder / f"{target.model}-{target.side}.json",
        )

    def twin(self, target: Target) -> Subject:
        """Return the same model, built anew as another process would load it."""
        return self.subject(target, self.build(target.model), self._model(target))

    def _model(self, target: Target) -> ModelConfig:
        side = TINY_SIDE[target.side] if self._day.rehearsal else target.side
        device = self._day.device.type
        return ModelConfig.model_validate(
            {"id": target.model, "device": device, "default_size_px": (side, side)}
        )

    def build(self, model: str) -> DiffusionPipeline:
        """Build a pipeline of its own."""
        if self._day.rehearsal:
            return FAMILIES[TINY[model]]().to(self._day.device, self._day.dtype)
        return MODELS[model](self._day.device, self._day.dtype)

    def after_failure(self) -> None:
        """Free the memory of what failed; drop the model if its engine has stopped."""
        if self._subject is not None and self._subject.broken:
            self.release()
        self._free()

    def release(self) -> None:
        """Free the memory of the loaded model."""
        if self._subject is not None:
            self._subject.close()
        self._subject = None
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self._day.device.type == "cuda":
            torch.cuda.empty_cache()
