"""The one importer of diffusers: loads a stock pipeline and paints one request with it.

Pipelines are used as they are. Each request calls ``__call__`` on a shallow copy that shares the
networks and has its own noise scheduler, guiders and call state. What differs between families is
read off the loaded objects (signatures and configs), never off their names.
"""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from serve_app.config.model_files import check_model_folder, find_loras
from serve_app.config.models import ModelConfig
from serve_app.engine.batching.rendezvous import Site
from serve_app.engine.model.adapters import Adapters
from serve_app.engine.model.fingerprint import Fingerprint, of_component
from serve_app.engine.model.prompt_cache import NotCacheable, PromptCache, content_key
from serve_app.engine.model.speed import speed_up
from serve_app.errors import ConfigError, ModelLoadError
from serve_app.protocol.params import AdapterSet, GenerationParams, Task, fitted

StepCallback = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each denoising step."""

LatentsCallback = Callable[[Tensor], None]
"""Called in each denoising step, before it counts as done, with the clean latents as the noise
scheduler predicts them, or with the noisy ones where it does not."""

DENOISERS = ("unet", "transformer", "transformer_2")
"""Component names under which diffusers keeps the network of the denoising loop."""


def resolve_device(wanted: str) -> torch.device:
    """The device to run on. Raises `ConfigError` if a GPU is wanted and torch cannot use one."""
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        built_for = torch.version.cuda
        raise ConfigError(
            "a GPU is asked for, but torch cannot use one. "
            + (
                f"This torch {torch.__version__} has no CUDA in it: install a CUDA build."
                if built_for is None
                else f"This torch {torch.__version__} needs CUDA {built_for}: look at nvidia-smi "
                "for the driver, and start a container with --gpus all."
            )
        )
    return torch.device("cuda" if wanted != "cpu" and usable else "cpu")


def _resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def _quiet_libraries() -> None:
    """No bars on stderr for each file, and no advice to install what is not needed."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


NOISE_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
"""What a request may ask for, where the model's own noise scheduler can be exchanged for it."""


class _StepBar:
    """Stands in for a pipeline's progress bar: every family advances one, once per step."""

    def __init__(self, on_step: StepCallback, iterable: Iterable[Any] | None, total: int) -> None:
        self._on_step = on_step
        self._iterable = iterable
        self._total = total
        self._done = 0

    def __enter__(self) -> "_StepBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        self._on_step(self._done, self._total)


def _watch(noise_scheduler: Any, on_latents: LatentsCallback) -> None:
    """Let ``on_latents`` see what each step of this noise scheduler makes."""
    step = noise_scheduler.step

    @functools.wraps(step)  # pipelines look at the signature
    def watched(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = step(*args, return_dict=True, **kwargs)
        clean = getattr(output, "pred_original_sample", None)
        on_latents(output.prev_sample if clean is None else clean)
        return output if return_dict else output.to_tuple()

    vars(noise_scheduler)["step"] = watched


def _remember_prompts(
    pipeline: DiffusionPipeline, cache: PromptCache, adapters: AdapterSet
) -> None:
    """Let equal calls of ``encode_prompt`` get what the first of them returned.

    With the same adapters, for they may change the text encoders too.
    """
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        try:
            key = (type(pipeline), content_key((adapters, args, kwargs)))
        except NotCacheable:  # tensors or pictures among them
            return encode(*args, **kwargs)
        return cache.get(key, lambda: encode(*args, **kwargs))

    vars(pipeline)["encode_prompt"] = encode_prompt


def _pipelines_of(pipeline: DiffusionPipeline) -> dict[Task, DiffusionPipeline]:
    """The pipeline and those of its family for other tasks, on the same networks."""
    found: dict[Task, DiffusionPipeline] = {"text-to-image": pipeline}
    makers: dict[Task, Any] = {
        "image-to-image": diffusers.AutoPipelineForImage2Image,
        "inpainting": diffusers.AutoPipelineForInpainting,
    }
    for task, maker in makers.items():
        with contextlib.suppress(ValueError):  # diffusers has none for this family
            found[task] = maker.from_pipe(pipeline)
    return found


def _denoisers_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    parts = {name: pipeline.components.get(name) for name in DENOISERS}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children with children of their own; those of a list in its place."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            for path, block in _blocks(child):
                yield f"{name}.{path}", block
        elif next(child.children(), None) is not None:
            yield name, child


def _default_strengths(pipelines: dict[Task, DiffusionPipeline]) -> dict[Task, float]:
    found: dict[Task, float] = {}
    for task, pipeline in pipelines.items():
        parameter = inspect.signature(type(pipeline).__call__).parameters.get("strength")
        if parameter is not None and isinstance(parameter.default, int | float):
            found[task] = float(parameter.default)
    return found


def _fewest_steps(noise_scheduler: Any) -> int:
    """That it can be set to: those that begin with several evaluations raise for fewer."""
    for steps in range(1, 10):
        with contextlib.suppress(ValueError):
            noise_scheduler.set_timesteps(steps)
            return steps
    return 1  # it needs more than a number of steps, which its pipeline knows


def _read(config: ModelConfig, device: torch.device) -> DiffusionPipeline:
    """The pipeline with its weights, which lie on ``device`` where they could be read to it."""

    def read(**placement: str) -> DiffusionPipeline:
        return DiffusionPipeline.from_pretrained(
            config.source,
            revision=config.revision,
            variant=config.variant,
            dtype=_resolve_dtype(config.dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=Path(config.source).is_dir(),
            **placement,
        )

    # Not where that would hold on the GPU what is not to stay there: offloading keeps most networks
    # elsewhere, and 8-bit weights are made layer by layer so that the others never are there.
    speed = config.speed
    if device.type == "cpu" or speed.offload != "none" or speed.quantize != "none":
        return read()
    try:
        pipeline = read(device_map=device.type)
    except NotImplementedError:  # diffusers refuses, before it reads, for pipelines in two parts
        return read()
    _forget_placement(pipeline)
    return pipeline


def _forget_placement(pipeline: DiffusionPipeline) -> None:
    """Leave a pipeline that was read with one device for a ``device_map`` as if it had been moved.

    For a single device diffusers 0.42 gives each weight its place as it is read from the file
    (`load_model_dict_into_meta`), as transformers 5 does, instead of making the network on the CPU
    first. accelerate then puts no hooks on it (`dispatch_model` without ``force_hooks``), but notes
    of the map stay: with one, the pipeline loads adapters in another way and is not to be moved.
    """
    pipeline.hf_device_map = None
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            vars(part).pop("hf_device_map", None)


class LoadedPipeline:
    """A stock pipeline on its device, with what the engine needs to know of it."""

    def __init__(self, pipeline: DiffusionPipeline, config: ModelConfig) -> None:
        """Take over a pipeline that is already on its device.

        Raises:
            ModelLoadError: if it has no denoiser to meet at, does not know an argument of
                ``config.call_kwargs``, or an adapter cannot be loaded.
        """
        self._pipeline = pipeline
        self._config = config
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        self.class_name = type(pipeline).__name__
        components = pipeline.components
        networks: dict[str, Any] = {
            name: component
            for name, component in components.items()
            if isinstance(component, nn.Module)
        }
        self.adapters = Adapters(pipeline, networks.values(), find_loras(config))
        self._by_task = _pipelines_of(pipeline)
        self.tasks = tuple(self._by_task)
        self.default_strengths = _default_strengths(self._by_task)
        self.device = torch.device(pipeline.device)
        self.dtype: torch.dtype = pipeline.dtype
        for network in networks.values():
            network.eval()  # loading does it; a pipeline that was built in memory may drop out
        self._dtypes = {
            name: network.dtype
            for name, network in networks.items()
            if isinstance(getattr(network, "dtype", None), torch.dtype)
        }
        self._attention = {
            name: dict(network.attn_processors)
            for name, network in networks.items()
            if hasattr(network, "attn_processors")
        }
        self.denoisers = _denoisers_of(pipeline)
        if not self.denoisers or "prompt" not in self._parameters:
            raise ModelLoadError(
                f"{self.class_name} is not a text-to-image pipeline that can be served: it needs a "
                f"prompt and one of the components {', '.join(DENOISERS)}."
            )
        if unknown := sorted(config.call_kwargs.keys() - self._parameters.keys()):
            raise ModelLoadError(
                f"model.call_kwargs: {self.class_name} takes no argument {', '.join(unknown)}. It "
                f"takes {', '.join(name for name in self._parameters if name != 'self')}."
            )
        self.sites = self._find_sites(networks)
        # Tokenizers and the like hold no state of a call; everything else but networks may.
        self._stateful = [
            name
            for name, component in components.items()
            if component is not None
            and not isinstance(component, nn.Module)
            and not type(component).__module__.startswith("transformers.")
        ]
        self.size_multiple = self._find_size_multiple()
        self.default_size_px = config.default_size_px or self._find_default_size()
        steps = config.default_steps or self._default("num_inference_steps")
        self.default_steps: int = steps if isinstance(steps, int) else 50
        compatible = getattr(pipeline.scheduler, "compatibles", [])
        self.noise_schedulers = tuple(
            name for name, kind in NOISE_SCHEDULERS.items() if kind in compatible
        )
        self.fewest_steps = {
            name: _fewest_steps(NOISE_SCHEDULERS[name].from_config(pipeline.scheduler.config))
            for name in self.noise_schedulers
        }
        self._tokenizer = self._find_tokenizer()
        self.takes_negative_prompt = self._heeds_negative_prompt()

    def fingerprint(self) -> Fingerprint:
        """What certificates and times depend on, of the pipeline: its class and config, each of its
        components as it is in memory, adapters included, and how the model is configured.

        Takes as long as reading the weights from memory once.
        """
        pipeline = self._pipeline
        model = self._config.model_dump(mode="json", exclude={"id", "device"})
        return {
            "pipeline": f"{type(pipeline).__module__}.{self.class_name} {dict(pipeline.config)!r}",
            **{
                f"component {name}": of_component(part)
                for name, part in pipeline.components.items()
            },
            **{f"model.{name}": repr(value) for name, value in model.items()},
            "adapters": repr(self.adapters.names),
        }

    @classmethod
    def load(cls, config: ModelConfig) -> "LoadedPipeline":
        """Load weights (safetensors only, no code of the model's own) and move them to the device.

        Raises:
            ModelLoadError: saying what is wrong with the model.
            ConfigError: if the device or a speed option cannot be used.
        """
        check_model_folder(config)
        device = resolve_device(config.device)
        _quiet_libraries()
        try:
            pipeline = _read(config, device)
        except Exception as error:
            raise ModelLoadError(
                f"model {config.id!r} cannot be loaded from {config.source}: "
                f"{type(error).__name__}: {error}"
            ) from error
        speed_up(pipeline, _denoisers_of(pipeline), config.speed, device)
        return cls(pipeline, config)

    def _find_sites(self, networks: dict[str, nn.Module]) -> dict[str, Site]:
        """Where requests give way to each other: every network, and within the VAE every block.

        Decoding a large picture takes longer than a step; its blocks do not, as a rule.
        """
        sites: dict[str, Site] = {}
        for name, network in networks.items():
            halves = ("encoder", "decoder") if hasattr(network, "decode") else ()
            parts = {half: getattr(network, half, None) for half in halves}
            if not any(isinstance(part, nn.Module) for part in parts.values()):
                sites[name] = Site(network, network)
                continue
            for half, part in parts.items():
                if isinstance(part, nn.Module):
                    for path, block in _blocks(part):
                        sites[f"{name}.{half}.{path}"] = Site(block, network)
        return sites

    def _default(self, name: str) -> object:
        parameter = self._parameters.get(name)
        return None if parameter is None else parameter.default

    def _find_size_multiple(self) -> int:
        """The step in pixels that every stock check accepts: a latent cell times the patch."""
        pipeline = self._pipeline
        cell = int(getattr(pipeline, "vae_scale_factor", 8))
        factors = [8, cell]  # the checks of the oldest families know nothing but 8
        for denoiser in self.denoisers.values():
            patch = getattr(denoiser.config, "patch_size", None)
            patch = patch[-1] if isinstance(patch, list | tuple) else patch
            factors.append(cell * (patch or 1))
        image_processor = getattr(pipeline, "image_processor", None)
        if image_processor is not None:
            factors.append(image_processor.config.vae_scale_factor)
        return math.lcm(*factors)

    def _find_default_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the pipeline itself would take."""
        named = self._default("width"), self._default("height")
        if isinstance(named[0], int) and isinstance(named[1], int):
            return named[0], named[1]
        denoiser = next(iter(self.denoisers.values()))
        cells = getattr(self._pipeline, "default_sample_size", None) or getattr(
            denoiser.config, "sample_size", None
        )
        cell = int(getattr(self._pipeline, "vae_scale_factor", 8))
        if isinstance(cells, list | tuple):
            return int(cells[-1]) * cell, int(cells[-2]) * cell
        side = int(cells) * cell if cells else 1024
        return side, side

    def _has_true_guidance(self) -> bool:
        """Whether classifier-free guidance is set by ``true_cfg_scale``.

        Families that name it so use it together with a negative prompt only, and keep
        ``guidance_scale`` for a guidance that was distilled into the denoiser, if it was.
        """
        return "true_cfg_scale" in self._parameters and not any(
            getattr(denoiser.config, "guidance_embeds", False)
            for denoiser in self.denoisers.values()
        )

    def _heeds_negative_prompt(self) -> bool:
        if "negative_prompt" not in self._parameters:
            return False
        if "true_cfg_scale" not in self._parameters or self._has_true_guidance():
            return True
        scale = self._config.call_kwargs.get("true_cfg_scale", self._default("true_cfg_scale"))
        return isinstance(scale, int | float) and scale > 1

    def _find_tokenizer(self) -> tuple[Any, int]:
        """The tokenizer that reads most of a prompt, and how many tokens; (None, 0) if unknown."""
        sequence = self._config.call_kwargs.get(
            "max_sequence_length", self._default("max_sequence_length")
        )
        longest = sequence if isinstance(sequence, int) else 10_000
        limits = [
            (min(component.model_max_length, longest), name)
            for name, component in self._pipeline.components.items()
            if hasattr(component, "model_max_length")
        ]
        limit, name = max(limits, default=(0, ""))
        return (self._pipeline.components[name], limit) if 0 < limit < 10_000 else (None, 0)

    def read_prompt(self, params: GenerationParams) -> tuple[int, tuple[str, ...]]:
        """How many tokens of the prompt the model reads, 0 if unknown; and what it leaves out."""
        tokenizer, limit = self._tokenizer
        if tokenizer is None:
            return 0, ()
        counts = {
            # Of a tokenizer that warns, too, on stderr.
            name: len(tokenizer(getattr(params, name) or "", verbose=False).input_ids)
            for name in ("prompt", "negative_prompt")
        }
        warnings = tuple(
            f"{name} has {tokens} tokens; the model reads {limit} of them."
            for name, tokens in counts.items()
            if tokens > limit
        )
        return min(counts["prompt"], limit), warnings

    def generate(
        self,
        params: GenerationParams,
        on_step: StepCallback | None = None,
        images: int = 1,
        on_latents: LatentsCallback | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> Tensor:
        """Run the stock pipeline from beginning to end: ``[images, 3, height, width]`` in [0, 1].

        ``params`` must be resolved. Draws the first latents on the CPU, so that a seed paints the
        same picture on every device. Mutates nothing that another request can see.
        """
        pipeline = copy.copy(self._by_task[params.task])
        parameters = inspect.signature(type(pipeline).__call__).parameters
        for name in self._stateful:
            # Not through setattr, which writes to the config that all copies share. Not through
            # from_config either: pipelines mend old configs when they are built.
            vars(pipeline)[name] = copy.deepcopy(getattr(pipeline, name))
        if params.noise_scheduler is not None:
            kind = NOISE_SCHEDULERS[params.noise_scheduler]
            vars(pipeline)["scheduler"] = kind.from_config(pipeline.scheduler.config)

        def progress_bar(iterable: Any = None, total: int | None = None) -> _StepBar:
            length = len(iterable) if total is None else total
            return _StepBar(on_step or (lambda done, total: None), iterable, length)

        vars(pipeline)["progress_bar"] = progress_bar
        if on_latents is not None:
            _watch(pipeline.scheduler, on_latents)
        if prompt_cache is not None and hasattr(pipeline, "encode_prompt"):
            _remember_prompts(pipeline, prompt_cache, params.lora)
        self.adapters.switch(params.lora)
        guidance = params.guidance_scale
        if guidance is None:
            guidance = self._config.default_guidance_scale
        negative_prompt = params.negative_prompt
        if self._has_true_guidance() and guidance is not None and negative_prompt is None:
            negative_prompt = " "  # without one, these families ignore the scale
        wanted: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "width": params.width,
            "height": params.height,
            "num_inference_steps": params.num_inference_steps,
            "true_cfg_scale" if self._has_true_guidance() else "guidance_scale": guidance,
        }
        if params.image is not None:
            assert params.width is not None
            assert params.height is not None
            size = params.width, params.height
            wanted["strength"] = params.strength
            wanted["image"] = fitted(params.image, "RGB", size)
            if params.mask_image is not None:
                wanted["mask_image"] = fitted(params.mask_image, "L", size)
        if "num_images_per_prompt" in parameters:
            wanted["num_images_per_prompt"] = images
            prompt: str | list[str] = params.prompt
        else:
            prompt = [params.prompt] * images
        arguments = {
            name: value
            for name, value in wanted.items()
            if value is not None and name in parameters
        }
        kwargs = self._config.call_kwargs  # which this task's pipeline may not all know
        try:
            output = pipeline(
                prompt=prompt,
                generator=torch.Generator("cpu").manual_seed(params.seed),
                output_type="pt",
                **({key: value for key, value in kwargs.items() if key in parameters} | arguments),
            )
        except BaseException:
            self.restore_networks()
            raise
        # Of a video, the first frame.
        pixels: Tensor = output.frames[:, 0] if hasattr(output, "frames") else output.images
        return pixels

    def restore_networks(self) -> None:
        """Undo what a call that was cut short, or crossed by another, left behind.

        Some families change the shared networks during a call and mend them at its end: the VAE is
        widened to float32 while it decodes, the attention is another one while PAG denoises.
        """
        for name, dtype in self._dtypes.items():
            network = self._pipeline.components[name]
            if network.dtype != dtype:
                nn.Module.to(network, dtype)  # diffusers' own warns
        for name, processors in self._attention.items():
            network = self._pipeline.components[name]
            if network.attn_processors != processors:
                network.set_attn_processor(dict(processors))
