"""The settings of an application: frozen, typed, units in the names, unknown keys rejected."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from serve_app.config.environment import (
    KEYS_PATH_VARIABLE,
    KEYS_VARIABLE,
    keys_path_in_environment,
)
from serve_app.errors import ConfigError

DEMO_MODEL_DIR = Path(__file__).parents[1] / "demo" / "model"
"""The folder of the weights that ship with the package."""

Side = Annotated[int, Field(ge=8, le=16_384)]


def is_path(source: str) -> bool:
    """Return whether ``source`` means a file or folder rather than a repository of the hub."""
    return source.startswith(("/", ".", "~"))


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpeedConfig(_Config):
    """Options that make the model faster or smaller. All are off by default."""

    compile: bool = Field(
        False,
        description="Compile the repeated blocks of the denoiser at start-up, for batches of "
        "1, 2, 4 and more of engine.warmup_sizes_px. Other sizes run uncompiled.",
    )
    channels_last: bool = Field(
        False, description="Keep the weights of convolutions in channels-last order."
    )
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="diffusers' name of an attention kernel, such as 'native' or 'flash'.",
    )
    offload: Literal["none", "model"] = Field(
        "none",
        description="'model': text encoders and denoisers take turns on the GPU, for cards that "
        "do not hold them all.",
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="Hold the weights of the denoiser's linear layers in 8 bits. The arithmetic "
        "keeps to the dtype.",
    )


class ModelConfig(_Config):
    """The model, its source, its precision and its device."""

    id: str = Field("demo", min_length=1, description="Name in the API.")
    path: str | None = Field(
        None,
        description="Folder in the diffusers format (starts with '/', '.' or '~'), or a Hugging "
        "Face repository. Default: the bundled model for 'demo', else the id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the repository.")
    variant: str | None = Field(None, description="Weight variant, such as 'fp16'.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="'auto': bfloat16 on a GPU, float32 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    default_size_px: tuple[Side, Side] | None = Field(
        None, description="(width, height) when a request names none. Default: the model's own."
    )
    default_steps: int | None = Field(
        None, ge=1, description="Denoising steps when a request names none. Default: the model's."
    )
    default_guidance_scale: float | None = Field(None, ge=0)
    call_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Further arguments for every call of the pipeline, such as "
        "max_sequence_length.",
    )
    loras: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters that requests may name: a .safetensors file (starts with '/', "
        "'.' or '~'), or a Hugging Face repository, owner/name or owner/name/file.",
    )
    lora_folder: str | None = Field(
        None,
        description="Every .safetensors file below this folder is an adapter as well. Its name is "
        "its path without the suffix.",
    )
    speed: SpeedConfig = SpeedConfig()

    @field_validator("loras")
    @classmethod
    def _adapters_have_an_owner(cls, loras: dict[str, str]) -> dict[str, str]:
        for name, source in loras.items():
            if not is_path(source) and "/" not in source.strip("/"):
                raise ValueError(
                    f"model.loras.{name} is {source!r}: write a path that starts with '/', '.' or "
                    "'~', or a repository as owner/name"
                )
            if source.count("/") > 1 and not source.endswith(".safetensors"):
                raise ValueError(
                    f"model.loras.{name} is {source!r}: only .safetensors files are loaded"
                )
        return loras

    @model_validator(mode="after")
    def _adapters_fit_the_rest(self) -> "ModelConfig":
        if not (self.loras or self.lora_folder):
            return self
        for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
            given = self.call_kwargs.get(name)
            if isinstance(given, dict) and "scale" in given:
                raise ValueError(
                    f"model.call_kwargs.{name}.scale scales the adapters of all requests: leave it "
                    "out, requests name their scales"
                )
        # A switch of adapters would compile again, and 8-bit layers take no adapters.
        options = {"compile": self.speed.compile, "quantize": self.speed.quantize != "none"}
        for option, enabled in options.items():
            if enabled:
                raise ValueError(
                    f"model.speed.{option} and LoRA adapters exclude each other: set one of them "
                    "only"
                )
        return self

    @model_validator(mode="after")
    def _only_a_gpu_offloads(self) -> "ModelConfig":
        if self.device == "cpu" and self.speed.offload != "none":
            raise ValueError(
                "model.speed.offload moves weights between a GPU and the CPU, and model.device is "
                "'cpu': set one of them otherwise"
            )
        return self

    @property
    def source(self) -> str:
        """The argument of ``from_pretrained``: an absolute folder or a repository's name."""
        if self.path is None:
            return str(DEMO_MODEL_DIR) if self.id == "demo" else self.id
        return str(Path(self.path).expanduser().resolve()) if self.is_folder else self.path

    @property
    def is_folder(self) -> bool:
        """True if the model lies in a folder rather than in a repository of the hub."""
        return self.id == "demo" if self.path is None else is_path(self.path)


class LimitsConfig(_Config):
    """The most that one request may use."""

    max_pixels: int = Field(2048 * 2048, ge=64, description="Width times height of one image.")
    max_side_px: int = Field(
        4096, ge=8, description="Longer side. The position embeddings of a model end somewhere."
    )
    max_image_pixels: int = Field(
        16 * 1024 * 1024,
        ge=64,
        description="Width times height of an input image. While the gateway reads it, it needs "
        "8 bytes for each pixel.",
    )
    max_steps: int = Field(100, ge=1)
    max_images: int = Field(10, ge=1, description="Images per HTTP request (n).")
    max_loras: int = Field(4, ge=0, description="LoRA adapters at a time, for one image.")
    max_prompt_chars: int = Field(4_000, ge=1)
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Size of a JSON body.")
    max_upload_bytes: int = Field(
        32 * 1024 * 1024, ge=1024, description="Size of a body with an input image."
    )
    max_deadline_s: float = Field(
        600.0,
        gt=0,
        description="The longest deadline that a request may name. A replica cancels a request "
        "that is not done so long after its admission.",
    )


class EngineConfig(_Config):
    """The sharing of one device between requests."""

    max_batch_size: int = Field(16, ge=1, description="Requests merged into one denoiser call.")
    max_running: int = Field(
        32, ge=1, description="Requests that run at the same time. The others wait in the queue."
    )
    scheduling: Literal["on_time", "fifo", "least_slack", "shortest_first"] = Field(
        "on_time", description="Order of the requests. 'on_time' meets the most deadlines."
    )
    slo_scale: float = Field(
        3.0,
        gt=0,
        description="The deadline of a request that names none, in multiples of its solo seconds.",
    )
    max_backlog_s: float = Field(
        30.0,
        gt=0,
        description="Predicted seconds of interactive work that a new request may wait for. A "
        "request that would wait longer is rejected with a time to retry. Longer queues finish no "
        "more images, and clients give up: most after 30 to 60 s.",
    )
    warmup_sizes_px: tuple[tuple[Side, Side], ...] = Field(
        (),
        max_length=64,
        description="(width, height) to measure at start-up, for predictions and for the largest "
        "batch that pays. Other sizes are measured as requests come, and capped by analogy. "
        "Without any, max_batch_size is the only cap.",
    )
    profile_path: str | None = Field(
        None,
        description="File that keeps the results of the start-up, so that the next start is quick: "
        "how requests share the pipeline, previews, times. It is used as long as nothing changed: "
        "weights, packages, device, settings.",
    )
    prompt_cache_mib: int = Field(
        128, ge=0, description="Device memory for the outputs of text encoders."
    )
    limits: LimitsConfig = LimitsConfig()


class GatewayConfig(_Config):
    """The HTTP side."""

    page: bool = Field(True, description="Serve the page to try the model on, at '/'.")
    keys_path: str | None = Field(
        None,
        description="File with the API keys that may use the server. `diffusion-serve key` writes "
        f"entries for it. The environment variable {KEYS_PATH_VARIABLE} names such a file as well, "
        f"for containers where it is mounted, and {KEYS_VARIABLE} holds such entries itself.",
    )
    max_hold_s: float = Field(
        300.0,
        gt=0,
        description="Seconds that a request waits for a replica that starts, before the gateway "
        "rejects it with a time to retry.",
    )
    log_prompts: bool = Field(False, description="Write prompts into the log, and into traces.")
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces of requests, over OTLP/HTTP. OpenTelemetry's own "
        "environment variables, such as OTEL_EXPORTER_OTLP_ENDPOINT, set the destination.",
    )

    @model_validator(mode="after")
    def _tracing_is_installed(self) -> "GatewayConfig":
        if self.tracing and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            raise ValueError(
                "gateway.tracing is true, which needs the OTLP exporter of OpenTelemetry: pip "
                "install 'diffusion-serve[tracing]', on every node"
            )
        return self

    @property
    def keys_file(self) -> Path | None:
        """The file of API keys that the config, or else the environment, names."""
        path = self.keys_path or keys_path_in_environment()
        return Path(path).expanduser() if path else None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


class AppConfig(_Config):
    """The arguments of `serve_app.app.build`, under ``args`` in a Serve config file."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()

    @model_validator(mode="after")
    def _defaults_keep_to_the_limits(self) -> "AppConfig":
        # The model's own defaults are checked when it is loaded.
        steps, limits = self.model.default_steps, self.engine.limits
        if steps is not None and steps > limits.max_steps:
            raise ValueError(
                f"model.default_steps is {steps}, over engine.limits.max_steps, {limits.max_steps}"
            )
        return self


def parse_app_config(value: object) -> AppConfig:
    """Validate the arguments of an application.

    Raises:
        ConfigError: naming each wrong key, its value and the rule.
    """
    try:
        return AppConfig.model_validate(value)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(
            "the application's configuration is wrong:\n" + "\n".join(lines)
        ) from None


def _explain(problem: ErrorDetails) -> str:
    *parents, key = [str(part) for part in problem["loc"]] or ["args"]
    where = ".".join([*parents, key])
    if problem["type"] == "value_error":
        return f"  {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] != "extra_forbidden":
        return f"  {where}: {problem['msg']} (given: {problem['input']!r})"
    known: type[BaseModel] = AppConfig
    for parent in parents:
        known = cast(type[BaseModel], known.model_fields[parent].annotation)
    return f"  {where}: unknown key; known are {', '.join(known.model_fields)}"
