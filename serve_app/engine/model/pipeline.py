"""The loaded pipeline: everything that the engine needs to know of it, and one call of it.

Pipelines are used as they are. Each request calls ``__call__`` on a shallow copy that shares the
weights and has its own noise scheduler, guiders, call state and modules of the VAE.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.config.gateway import Safety
from serve_app.config.model_files import find_loras
from serve_app.config.model_index import DENOISERS
from serve_app.config.models import ModelConfig
from serve_app.engine.model import inspection
from serve_app.engine.model.adapters import Adapters
from serve_app.engine.model.call_hooks import (
    LatentsCallback,
    SchedulerCallback,
    StepCallback,
    cache_prompts,
    keep_timesteps_on_cpu,
    known_device,
    report_latents,
    report_steps,
)
from serve_app.engine.model.fingerprint import Fingerprint, of_component
from serve_app.engine.model.finite import mark_infinity
from serve_app.engine.model.graphs import CudaCapture, Graphs
from serve_app.engine.model.linear_unipc import use_linear_unipc
from serve_app.engine.model.loader import load_stock
from serve_app.engine.model.module_copies import ModuleCopies
from serve_app.engine.model.networks import (
    NetworkState,
    denoisers_of,
    find_sites,
    networks_of,
)
from serve_app.engine.model.noise_schedulers import (
    compatible_noise_schedulers,
    fewest_steps,
    new_noise_scheduler,
)
from serve_app.engine.model.prompt_cache import PromptCache
from serve_app.engine.model.safety import SafetyCheck
from serve_app.engine.model.tasks import default_strengths, own_image_task, pipelines_by_task
from serve_app.engine.model.unused_fields import unused_fields
from serve_app.errors import ModelLoadError
from serve_app.protocol.fitting import fitted
from serve_app.protocol.params import GenerationParams, Task
from serve_app.protocol.safety import SafetyVerdict


class LoadedPipeline:
    """A stock pipeline on its device, with its properties.

    Attributes:
        stock: the diffusers pipeline, as loaded.
        pipelines: the diffusers pipeline of each task, all on the same networks.
        tasks: tasks of these pipelines. Requests of a start are for the first one.
        own_image_task: the task for which `stock` itself takes an image; ``None`` without one.
        safety: the safety checker, which is no longer part of these pipelines.
        graphs: CUDA graphs of the denoisers; ``None`` without the option.
        acceleration: thresholds of extrapolated calls, read when a request starts.
        timesteps_on_cpu: True if noise schedulers keep their timesteps on the CPU, where looking
            at them does not wait for the device. Only for calls through a `Rendezvous`, which
            copies them to the device.
    """

    graphs: Graphs | None = None

    def __init__(
        self, pipeline: DiffusionPipeline, config: ModelConfig, safety: Safety = "flag"
    ) -> None:
        """Take over a pipeline that is already on its device.

        Raises:
            ModelLoadError: it has no denoiser or no prompt, it lacks an argument of
                ``config.call_kwargs``, or an adapter cannot be loaded.
            ConfigError: flagged images are to be blocked, and it has no safety checker.
        """
        self.safety = SafetyCheck.take_from(pipeline, config, safety)
        self.stock = pipeline
        self._config = config
        self.acceleration = config.acceleration
        self.class_name = type(pipeline).__name__
        networks = networks_of(pipeline)
        self.adapters = Adapters(pipeline, find_loras(config), config.partial_loras)
        self.pipelines = pipelines_by_task(pipeline)
        self.tasks: tuple[Task, ...] = tuple(self.pipelines)
        self.own_image_task = own_image_task(pipeline)
        self._classes = {
            task: known_device(type(one), one._execution_device)
            for task, one in self.pipelines.items()
        }
        self.default_strengths = default_strengths(self.pipelines)
        self.device = torch.device(pipeline.device)
        self.dtype: torch.dtype = pipeline.dtype
        self.timesteps_on_cpu = False
        for network in networks.values():
            network.eval()  # loading does this; a pipeline built in memory may still drop out
        self._state = NetworkState(pipeline)
        self.denoisers = denoisers_of(pipeline)
        self._check_call()
        if config.speed.cuda_graphs:
            self.graphs = Graphs(
                self.denoisers, self.device, lambda: self.adapters.active, CudaCapture()
            )
        self.sites = {**find_sites(pipeline), **self.safety.sites}
        self._vaes = {
            name: ModuleCopies(network)
            for name, network in networks.items()
            if name not in self.sites
        }
        self._stateful = inspection.stateful_components(pipeline)
        self.size_multiple = inspection.size_multiple(pipeline)
        self.longest_side_px = inspection.longest_side(pipeline)
        self.default_size_px = config.default_size_px or inspection.default_size(pipeline)
        self.default_steps = config.default_steps or inspection.default_steps(pipeline)
        self.noise_schedulers = compatible_noise_schedulers(pipeline)
        self.fewest_steps = {name: fewest_steps(name, pipeline) for name in self.noise_schedulers}
        self._tokenizer = inspection.longest_tokenizer(pipeline, config.call_kwargs)
        self._output_checked = False
        self._true_cfg = inspection.guided_by_true_cfg(pipeline)
        self._scale_name = "true_cfg_scale" if self._true_cfg else "guidance_scale"
        self.takes_negative_prompt = inspection.takes_negative_prompt(pipeline, config.call_kwargs)

    @classmethod
    def load(cls, config: ModelConfig, safety: Safety = "flag") -> "LoadedPipeline":
        """Load weights (safetensors only, no code of the model's own) and move them to the device.

        Raises:
            ModelLoadError: the model cannot be loaded or served; the message says why.
            ConfigError: the device, a speed option or ``safety`` cannot be used.
        """
        return cls(load_stock(config), config, safety)

    def _check_call(self) -> None:
        parameters = inspection.call_parameters(self.stock)
        if not self.denoisers or "prompt" not in parameters:
            raise ModelLoadError(
                f"{self.class_name} is not a text-to-image pipeline that can be served: it needs a "
                f"prompt and one of the components {', '.join(DENOISERS)}."
            )
        if unknown := sorted(self._config.call_kwargs.keys() - parameters.keys()):
            raise ModelLoadError(
                f"model.call_kwargs: {self.class_name} takes no argument {', '.join(unknown)}. It "
                f"takes {', '.join(name for name in parameters if name != 'self')}."
            )

    def require_image(self) -> None:
        """Leave out text-to-image: the pipeline's call fails without an image."""
        self.pipelines.pop("text-to-image", None)
        self.tasks = tuple(self.pipelines)

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of everything in the pipeline that certificates and costs need.

        The safety checker is not part of it: it sees images only after the pipeline's call. It
        covers the pipeline's class and config, each component as it is in memory with its
        adapters, and the model's config. Takes as long as reading the weights from memory once.
        """
        others = {"id", "device", "acceleration", "lora_source"}
        model = self._config.model_dump(mode="json", exclude=others)
        module = type(self.stock).__module__
        return {
            "pipeline": f"{module}.{self.class_name} {dict(self.stock.config)!r}",
            **{
                f"component {name}": of_component(component)
                for name, component in self.stock.components.items()
            },
            **{f"model.{name}": repr(value) for name, value in model.items()},
            "adapters": repr(self.adapters.names),
        }

    def read_prompt(self, params: GenerationParams) -> tuple[int, tuple[str, ...]]:
        """Return the number of tokens that the model reads of the prompt, and warnings.

        The number is 0 if unknown. A warning names each prompt that the model cuts off, and each
        field without effect.
        """
        configured = dict(self._config.call_kwargs)
        if self._config.default_guidance_scale is not None:
            configured[self._scale_name] = self._config.default_guidance_scale
        unused = unused_fields(params, self.pipelines[params.task], self._scale_name, configured)
        tokenizer, limit = self._tokenizer
        if tokenizer is None:
            return 0, unused
        counts = {
            # Without ``verbose=False``, the tokenizer warns on stderr as well.
            name: len(tokenizer(getattr(params, name) or "", verbose=False).input_ids)
            for name in ("prompt", "negative_prompt")
        }
        warnings = tuple(
            f"{name} has {tokens} tokens; the model reads {limit} of them."
            for name, tokens in counts.items()
            if tokens > limit
        )
        return min(counts["prompt"], limit), (*warnings, *unused)

    def check_input_images(self, params: GenerationParams) -> None:
        """Check the input images of a resolved request as the pipeline's call would.

        Changes nothing, and may run on any thread.

        Raises:
            InvalidRequest: the pipeline does not take one of them.
        """
        if params.image is not None:
            images = (params.image, *params.more_images)
            inspection.check_input_images(self.pipelines[params.task], images)

    def generate(
        self,
        params: GenerationParams,
        on_step: StepCallback | None = None,
        images: int = 1,
        on_latents: LatentsCallback | None = None,
        prompt_cache: PromptCache | None = None,
        on_noise_scheduler: SchedulerCallback | None = None,
        prompts: Sequence[str] = (),
    ) -> Tensor:
        """Run the stock pipeline from beginning to end: ``[images, 3, height, width]`` in [0, 1].

        The images are not checked: see `generate_checked`. ``params`` must be resolved. The first
        latents are drawn on the CPU, so that a seed gives the same image on every device. Changes
        nothing that another request can see. The image has pixels of NaN if the model failed;
        `FiniteCheck` finds them. ``prompts`` makes one image for each of them instead.
        """
        hooks = on_latents, prompt_cache, on_noise_scheduler
        return self._run(params, on_step, images, *hooks, prompts)[0]

    def generate_checked(
        self,
        params: GenerationParams,
        on_step: StepCallback | None = None,
        on_latents: LatentsCallback | None = None,
        prompt_cache: PromptCache | None = None,
        on_noise_scheduler: SchedulerCallback | None = None,
    ) -> tuple[Tensor, SafetyVerdict | None]:
        """Generate one image ``[3, height, width]`` as `generate` does, and have it checked.

        Raises:
            ModelLoadError: the pipeline has a safety checker of its own that did not report.
        """
        hooks = on_latents, prompt_cache, on_noise_scheduler
        images, reported = self._run(params, on_step, 1, *hooks)
        return images[0], self.safety.judge(images[0], reported)

    def _run(
        self,
        params: GenerationParams,
        on_step: StepCallback | None,
        images: int,
        on_latents: LatentsCallback | None,
        prompt_cache: PromptCache | None,
        on_noise_scheduler: SchedulerCallback | None = None,
        prompts: Sequence[str] = (),
    ) -> tuple[Tensor, bool | None]:
        """Return the images, and whether the pipeline itself flagged one.

        Raises:
            ModelLoadError: the first output has another form, or a checker did not report.
        """
        pipeline = self._copy_for_call(params)
        report_steps(pipeline, on_step)
        if on_noise_scheduler is not None:
            on_noise_scheduler(pipeline.scheduler)
        if on_latents is not None:
            report_latents(pipeline.scheduler, on_latents)
        if prompt_cache is not None and hasattr(pipeline, "encode_prompt"):
            cache_prompts(pipeline, prompt_cache, self.adapters.keys(params.lora))
        self.adapters.switch(params.lora)
        # Some networks draw from torch's own generator. Requests that take turns would draw from it
        # in any order, so the certification has them run one after another.
        torch.manual_seed(params.seed)
        arguments = self._arguments(pipeline, params, images)
        if prompts:
            arguments |= _batch_of(prompts, arguments)
        try:
            output = pipeline(**arguments)
        except BaseException:
            self.restore_networks()
            raise
        finally:
            for name, copies in self._vaes.items():
                copies.release(getattr(pipeline, name))
        # The image of a video is its first frame.
        pixels: Tensor = output.frames[:, 0] if hasattr(output, "frames") else output.images
        reported = self.safety.read_report(output)
        if not self._output_checked:
            inspection.check_side_results(self.class_name, output)
            inspection.check_pixels(self.class_name, pixels)
            self._output_checked = True
        return pixels, reported

    def _copy_for_call(self, params: GenerationParams) -> DiffusionPipeline:
        """Return a copy that shares the networks and has its own stateful components."""
        pipeline = copy.copy(self.pipelines[params.task])
        pipeline.__class__ = self._classes[params.task]
        for name in self._stateful:
            # Not by setattr, which writes to the config that all copies share. Not by from_config
            # either: pipelines correct old configs when they are built.
            vars(pipeline)[name] = copy.deepcopy(getattr(pipeline, name))
        for name, copies in self._vaes.items():
            vae = copies.new()
            mark_infinity(vae)  # in the copy: in the original it would hide what the copy keeps
            vars(pipeline)[name] = vae
        if params.noise_scheduler is not None:
            vars(pipeline)["scheduler"] = new_noise_scheduler(params.noise_scheduler, pipeline)
        use_linear_unipc(pipeline.scheduler)
        if self.timesteps_on_cpu:
            keep_timesteps_on_cpu(pipeline.scheduler)
        return pipeline

    def _arguments(
        self, pipeline: DiffusionPipeline, params: GenerationParams, images: int
    ) -> dict[str, Any]:
        """Return the arguments of the call: those of the config, overridden by the request's."""
        parameters = inspection.call_parameters(pipeline)
        guidance = params.guidance_scale
        if guidance is None:
            guidance = self._config.default_guidance_scale
        negative_prompt = params.negative_prompt
        if self._true_cfg and guidance is not None and negative_prompt is None:
            negative_prompt = " "  # without one, these families ignore the scale
        requested: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "width": params.width,
            "height": params.height,
            "num_inference_steps": params.num_inference_steps,
            self._scale_name: guidance,
        }
        if params.image is not None:
            assert params.width is not None
            assert params.height is not None
            size = params.width, params.height
            requested["strength"] = params.strength
            image = fitted(params.image, "RGB", size)
            requested["image"] = [image, *params.more_images] if params.more_images else image
            if params.mask_image is not None:
                requested["mask_image"] = fitted(params.mask_image, "L", size)
        prompt: str | list[str] = params.prompt
        if "num_images_per_prompt" in parameters:
            requested["num_images_per_prompt"] = images
        else:
            prompt = [params.prompt] * images
        given = {name: value for name, value in requested.items() if value is not None}
        # A task's pipeline may lack some parameters of the text-to-image pipeline. Some pipelines
        # write into the dicts that they get, so no two requests may get the same one.
        arguments = {**copy.deepcopy(self._config.call_kwargs), **given}
        return dict(  # raises if the config sets one of these three
            prompt=prompt,
            generator=torch.Generator("cpu").manual_seed(params.seed),
            output_type="pt",
            **{name: value for name, value in arguments.items() if name in parameters},
        )

    def restore_networks(self) -> None:
        """Undo the changes to shared networks by a call that ended early or overlapped another."""
        self._state.restore()


def _batch_of(prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that change for a batch of several prompts."""
    changed: dict[str, Any] = {"prompt": list(prompts)}
    if isinstance(negative_prompt := arguments.get("negative_prompt"), str):
        changed["negative_prompt"] = [negative_prompt] * len(prompts)
    return changed
