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

Safety = Literal["flag", "block", "off"]
"""Treatment of images that a model's safety checker flags."""


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
        "1, 2, 4, … images of each size in engine.warmup_sizes_px. Without any size, the model's "
        "default size is compiled. Other sizes run uncompiled. Needs a C++ compiler.",
    )
    channels_last: bool = Field(
        False,
        description="Keep the weights of convolutions in the denoiser and the VAE in "
        "channels-last order.",
    )
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="Attention kernel by its name in diffusers, such as 'native' or 'flash'. "
        "Default: the kernel that diffusers chooses. Not for UNets.",
    )
    offload: Literal["none", "model"] = Field(
        "none",
        description="'model': text encoders and denoisers take turns on the GPU, for GPUs that "
        "cannot hold all networks at once.",
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="Store the weights of the denoiser's linear layers in 8 bits. Calculations "
        "use model.dtype. Needs the package torchao.",
    )


class ModelConfig(_Config):
    """The model, its source, its precision and its device."""

    id: str = Field("demo", min_length=1, description="Name of the model in the API.")
    path: str | None = Field(
        None,
        description="Folder in the diffusers format (starts with '/', '.' or '~'), or a "
        "repository on the Hugging Face hub. Default: the bundled model if model.id is 'demo', "
        "otherwise the repository that model.id names.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of the repository. Default: its main branch."
    )
    variant: str | None = Field(
        None,
        min_length=1,
        description="Variant of the weight files, such as 'fp16'. "
        "Default: the files without a variant.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Floating-point type of the weights and the calculations. 'auto' is bfloat16 "
        "on a GPU and float32 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of the model. 'auto' is a GPU if the replica has one."
    )
    default_size_px: tuple[Side, Side] | None = Field(
        None,
        description="Width and height, in pixels, of requests that set no size. Default: the "
        "model's own.",
    )
    default_steps: int | None = Field(
        None,
        ge=1,
        description="Denoising steps of requests that set none, at most engine.limits.max_steps. "
        "Default: the pipeline's.",
    )
    default_guidance_scale: float | None = Field(
        None,
        ge=0,
        description="Guidance scale of requests that set none. Default: the pipeline's.",
    )
    call_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Additional arguments of every pipeline call, by name, such as "
        "`max_sequence_length`. Default: none.",
    )
    loras: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters that requests may use, by name. Each source is a .safetensors "
        "file (starts with '/', '.' or '~') or a repository on the Hugging Face hub "
        "(owner/name or owner/name/file).",
    )
    lora_folder: str | None = Field(
        None,
        description="Folder of further LoRA adapters: every .safetensors file below it. An "
        "adapter's name is its path in the folder without the suffix.",
    )
    partial_loras: bool = Field(
        False,
        description="Also load adapters of which only a part fits the model. `/v1/models` names "
        "them.",
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
        4096,
        ge=8,
        description="Width or height of one image, in pixels. Position embeddings limit the side "
        "that a model supports.",
    )
    max_image_pixels: int = Field(
        16 * 1024 * 1024,
        ge=64,
        description="Width times height of an input image. The gateway needs 8 bytes for each of "
        "its pixels while it reads the image.",
    )
    max_steps: int = Field(100, ge=1, description="Denoising steps of one image.")
    max_images: int = Field(10, ge=1, description="Images of one HTTP request (`n`).")
    max_loras: int = Field(4, ge=0, description="LoRA adapters of one image.")
    max_prompt_chars: int = Field(
        4_000, ge=1, description="Characters of a prompt or a negative prompt."
    )
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Bytes of a JSON body.")
    max_upload_bytes: int = Field(
        32 * 1024 * 1024, ge=1024, description="Bytes of a body with an input image."
    )
    max_deadline_s: float = Field(
        600.0,
        gt=0,
        description="Longest deadline that a request may set, in seconds. A request that is not "
        "done this long after a replica admitted it is cancelled and ends with status 504.",
    )


class EngineConfig(_Config):
    """The engine: how requests share one device, and which limits they have."""

    max_batch_size: int = Field(
        16, ge=1, description="Largest number of images in one denoiser call."
    )
    max_running: int = Field(
        32,
        ge=1,
        description="Largest number of requests that run at the same time. The others wait in the "
        "queue.",
    )
    scheduling: Literal["on_time", "fifo", "least_slack", "shortest_first"] = Field(
        "on_time",
        description="Policy that orders the requests. 'on_time' meets the most deadlines. 'fifo' "
        "runs the call that has waited longest, 'least_slack' the one with the least time to "
        "spare, 'shortest_first' the one with the least remaining work.",
    )
    slo_scale: float = Field(
        3.0,
        gt=0,
        description="Deadline of a request that sets none, as a multiple of its predicted time on "
        "an idle replica. It only orders requests, and rejects none.",
    )
    max_backlog_s: float = Field(
        30.0,
        gt=0,
        description="Predicted seconds of interactive work that a new request may wait for. A "
        "request that would wait longer is rejected with status 429 and a time to retry. A longer "
        "queue does not raise throughput, and most clients give up after 30 to 60 s.",
    )
    warmup_sizes_px: tuple[tuple[Side, Side], ...] = Field(
        (),
        max_length=64,
        description="Sizes, as width and height in pixels, to measure at start-up. The results "
        "give predicted times and the largest batch of each size that still raises throughput. "
        "Other sizes are measured as requests arrive, and their batches are limited by the nearest "
        "measured size. Without any size, engine.max_batch_size is the only limit.",
    )
    profile_path: str | None = Field(
        None,
        description="File that stores the results of the start-up, so that the next start is "
        "faster: the certification, previews and times. A start ignores the file if weights, "
        "packages, device or settings have changed.",
    )
    prompt_cache_mib: int = Field(
        128, ge=0, description="Device memory for encoded prompts of earlier requests, in MiB."
    )
    limits: LimitsConfig = LimitsConfig()


class GatewayConfig(_Config):
    """The gateway: the page, API keys, waits, logs and traces."""

    page: bool = Field(True, description="Serve a web page at '/' to try the model.")
    keys_path: str | None = Field(
        None,
        description="File of API keys, with entries from `diffusion-serve key`. Without keys, "
        f"every client is admitted. Default: the file that {KEYS_PATH_VARIABLE} names. The "
        f"environment variable {KEYS_VARIABLE} may hold further entries.",
    )
    max_hold_s: float = Field(
        300.0,
        gt=0,
        description="Longest time, in seconds, that a request waits in the gateway for a starting "
        "replica. After it the gateway rejects the request with a time to retry.",
    )
    safety: Safety = Field(
        "flag",
        description="Treatment of images that the model's safety checker flags. 'flag': the "
        "image is returned as generated, and the response names it. 'block': the request fails "
        "with status 400, and no previews are sent; needs a model with a safety checker. 'off': no "
        "image is checked.",
    )
    log_prompts: bool = Field(False, description="Write prompts into the log and into traces.")
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces of requests over OTLP/HTTP. OpenTelemetry's own "
        "environment variables, such as OTEL_EXPORTER_OTLP_ENDPOINT, set the destination. Needs "
        "the extra 'tracing'.",
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
    """The application: the arguments of `serve_app.app.build`, ``args`` in a Serve config file."""

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
