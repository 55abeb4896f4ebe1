"""A generation backend without a model, and the configuration of the gateway before it."""

import asyncio
from collections.abc import AsyncGenerator

from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import AppConfig, EngineConfig, ModelConfig
from serve_app.errors import DiffusionServeError, Overloaded, Unavailable
from serve_app.protocol.backend import GenerationEvent, ModelState
from serve_app.protocol.events import DenoiserCalls, GenerationTimings, Progress, Queued
from serve_app.protocol.images import EncodedImage, Encoding, PartialImage
from serve_app.protocol.loras import LoraStatus
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext

LIMITS = LimitsConfig(
    max_pixels=128 * 128,
    max_steps=50,
    max_images=4,
    max_image_pixels=1_000_000,
    max_body_bytes=2_000,
    max_upload_bytes=200_000,
    max_deadline_s=30.0,
)
CONFIG = AppConfig(model=ModelConfig(id="demo"), engine=EngineConfig(limits=LIMITS))
INFO = ModelInfo(
    id="demo",
    pipeline="SomePipeline",
    dtype="float32",
    device="cpu",
    default_width=64,
    default_height=64,
    size_multiple=8,
    default_steps=20,
    default_acceleration="none",
    low_quality_acceleration="none",
    takes_negative_prompt=True,
    tasks=("text-to-image", "image-to-image", "inpainting"),
    max_input_images=1,
    default_strengths={"image-to-image": 0.5, "inpainting": 1.0},
    noise_schedulers=("euler", "ddim"),
    unavailable_noise_schedulers={
        "euler": {"image-to-image": "it adds too much noise"},
        "pndm": dict.fromkeys(
            ("text-to-image", "image-to-image", "inpainting"), "it gives values that are not finite"
        ),
    },
    fewest_steps={"euler": 1, "ddim": 1},
    loras=("pixel", "ink"),
    partial_loras={"ink": "2 of its 4 tensors are used"},
    loras_on_demand=False,
    sharing="batched",
    sharing_difference=1e-6,
    sharing_psnr_db=130.0,
    sharing_note="",
    limits=LIMITS,
    safety="flag",
    safety_checker=False,
)


class FakeBackend:
    """A generation backend that returns plain red images at once and records its calls."""

    def __init__(self) -> None:
        self.received: list[GenerationParams] = []
        self.contexts: list[RequestContext] = []
        self.info = INFO
        """Description of the model."""
        self.described_for: list[float | None] = []
        """Deadlines given to `describe`."""
        self.error: Exception | None = None
        self.error_in_the_middle: Exception | None = None
        self.ready = True
        self.not_ready: DiffusionServeError = Unavailable("no replica is ready yet")
        """What a replica answers that is not ready."""
        self.answering = asyncio.Event()
        """Until it is set, no replica says whether it is ready."""
        self.answering.set()
        self.replicas: ModelState = "running"
        """State of its replicas."""
        self.known: ModelInfo | None = None
        self.adapters: tuple[LoraStatus, ...] = ()
        """LoRA adapters of its replicas."""
        self.overloaded = False
        self.timings = GenerationTimings(0.25, 0.0625, 1.0, 0.125)
        """Reported timings."""
        self.file_s = 0.5
        """Reported duration of encoding the file."""
        self.size_px: tuple[int, int] | None = None
        """Size of the images; ``None`` for the requested one."""
        self.cancelled = 0
        self.slow_seed: int | None = None
        """Seed of the request that never ends."""
        self.accepting = asyncio.Event()
        self.accepting.set()

    async def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncGenerator[GenerationEvent, None]:
        self.received.append(params)
        self.contexts.append(context)
        assert params.width is not None
        assert params.height is not None
        try:
            await self.accepting.wait()
            if params.seed == self.slow_seed:
                yield Queued(0, 1.5)
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            yield Queued(0, 1.5)
            image = Image.new("RGB", self.size_px or (params.width, params.height), "red")
            for index, step in enumerate(params.preview_steps):
                if progress:
                    yield Progress(step, params.steps_to_run, 0.5)
                yield PartialImage(index, encoding.encode(image))
            if self.error_in_the_middle is not None:
                raise self.error_in_the_middle
            data = encoding.encode(image)
            yield EncodedImage(
                data,
                params.seed,
                *image.size,
                ("a warning",),
                7,
                self.timings,
                calls=DenoiserCalls(8, 12),
                age_s=sum(self.timings) + self.file_s,
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        self.described_for.append(deadline_s)
        await self.check_ready()
        if self.overloaded:
            raise Overloaded("too many requests are waiting")
        self.known = self.info
        return self.info

    async def check_ready(self) -> None:
        await self.answering.wait()
        if not self.ready:
            raise self.not_ready

    async def loras(self) -> tuple[LoraStatus, ...]:
        return self.adapters

    async def state(self) -> ModelState:
        return self.replicas
