"""What an operator can set. Frozen, typed, units in the names, unknown keys refused.

The only module that reads the environment. Knows no torch and no Ray, so that a wrong
configuration is found before either is started.
"""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
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

from serve_app.errors import ConfigError, ModelLoadError

DEMO_MODEL_DIR = Path(__file__).parent / "demo" / "model"
"""The weights that ship with the package."""

KEYS_VARIABLE = "DIFFUSION_SERVE_KEYS"
"""Of the environment: entries of API keys."""

KEYS_PATH_VARIABLE = "DIFFUSION_SERVE_KEYS_PATH"
"""Of the environment: a file with such entries, where gateway.keys_path names none."""

API_KEY_VARIABLE = "DIFFUSION_SERVE_API_KEY"
"""Of the environment: the key of who asks a server."""

IMPORT_PATH = "serve_app.app:build"
"""By which a Serve config names this application."""

WORK_POLICY = "serve_app.autoscaling.ray_policy:WorkPolicy"
"""What a Serve config names to have replicas scaled by the work that waits."""

SERVE_DELAYS_S = {"upscale_delay_s": 30.0, "downscale_delay_s": 600.0}
"""How long Serve waits before it does what a policy says, where a config does not say."""

Side = Annotated[int, Field(ge=8, le=16_384)]


def is_path(source: str) -> bool:
    """Whether it means a file or folder rather than a repository of the hub."""
    return source.startswith(("/", ".", "~"))


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpeedConfig(_Config):
    """What makes the model faster or smaller; nothing here is on by default."""

    compile: bool = Field(
        False,
        description="Compile the repeated blocks of the denoiser at start-up, for batches of "
        "1, 2, 4 and more of engine.warmup_sizes_px; other sizes run uncompiled.",
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
        description="Hold the weights of the denoiser's linear layers in 8 bits; the arithmetic "
        "keeps to the dtype.",
    )


class ModelConfig(_Config):
    """Which model, from where, and how it is held in memory."""

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
        description="Every .safetensors file below this folder is an adapter as well, called by "
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
        # A switch of adapters would compile anew, and 8-bit layers take none.
        options = {"compile": self.speed.compile, "quantize": self.speed.quantize != "none"}
        for option, wanted in options.items():
            if wanted:
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
        """What ``from_pretrained`` is given: an absolute folder or a repository's name."""
        if self.path is None:
            return str(DEMO_MODEL_DIR) if self.id == "demo" else self.id
        return str(Path(self.path).expanduser().resolve()) if self.is_folder else self.path

    @property
    def is_folder(self) -> bool:
        """Whether the model lies in a folder rather than in a repository of the hub."""
        return self.id == "demo" if self.path is None else is_path(self.path)


class LimitsConfig(_Config):
    """The most that one request may ask for."""

    max_pixels: int = Field(2048 * 2048, ge=64, description="Width times height of one picture.")
    max_side_px: int = Field(
        4096, ge=8, description="Longer side; the position embeddings of a model end somewhere."
    )
    max_image_pixels: int = Field(
        16 * 1024 * 1024,
        ge=64,
        description="Width times height of a picture to start from. While it is read, the gateway "
        "holds 8 bytes for each of them.",
    )
    max_steps: int = Field(100, ge=1)
    max_images: int = Field(10, ge=1, description="Pictures per HTTP request (n).")
    max_loras: int = Field(4, ge=0, description="LoRA adapters at a time, for one picture.")
    max_prompt_chars: int = Field(4_000, ge=1)
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Of a JSON body.")
    max_upload_bytes: int = Field(
        32 * 1024 * 1024, ge=1024, description="Of a body with a picture to start from."
    )
    max_deadline_s: float = Field(
        600.0,
        gt=0,
        description="The longest deadline that a request may name. What is not done so long after "
        "a replica took it in is given up.",
    )


class EngineConfig(_Config):
    """How requests share the device."""

    max_batch_size: int = Field(16, ge=1, description="Requests merged into one denoiser call.")
    max_running: int = Field(
        32, ge=1, description="Requests being painted at once; the others wait their turn."
    )
    scheduling: Literal["on_time", "fifo", "least_slack", "shortest_first"] = Field(
        "on_time", description="Who runs next; 'on_time' meets the most deadlines."
    )
    slo_scale: float = Field(
        3.0,
        gt=0,
        description="The deadline of a request that names none, in multiples of its time alone.",
    )
    max_backlog_s: float = Field(
        30.0,
        gt=0,
        description="Seconds of interactive work, as predicted, that a request may find when it "
        "comes; who would wait longer is told when to come again. Longer queues finish no more "
        "pictures, and people and HTTP clients give up: most after 30 to 60 s.",
    )
    warmup_sizes_px: tuple[tuple[Side, Side], ...] = Field(
        (),
        max_length=64,
        description="(width, height) to measure at start-up, for predictions and for the largest "
        "batch that pays. Other sizes are measured as requests come, and capped by analogy; "
        "without any, max_batch_size is the only cap.",
    )
    profile_path: str | None = Field(
        None,
        description="File that keeps what the start-up found out, so that the next start is quick: "
        "how requests share the pipeline, previews, times. It is used as long as nothing changed: "
        "weights, packages, device, settings.",
    )
    prompt_cache_mib: int = Field(
        128, ge=0, description="Device memory for what text encoders said of prompts."
    )
    limits: LimitsConfig = LimitsConfig()


class GatewayConfig(_Config):
    """What answers HTTP."""

    page: bool = Field(True, description="Serve the page to try the model on, at '/'.")
    keys_path: str | None = Field(
        None,
        description="File with the API keys that are let in; `diffusion-serve key` writes entries "
        f"for it. The environment variable {KEYS_PATH_VARIABLE} names one as well, for containers "
        f"where it is mounted, and {KEYS_VARIABLE} holds such entries itself.",
    )
    max_hold_s: float = Field(
        300.0,
        gt=0,
        description="How long a request waits for a replica that is starting, before it is told "
        "to come again.",
    )
    log_prompts: bool = Field(False, description="Write prompts into the log, and into traces.")
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces of requests, over OTLP/HTTP. Where to, and how, say "
        "OpenTelemetry's own variables of the environment, such as OTEL_EXPORTER_OTLP_ENDPOINT.",
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
        path = self.keys_path or os.environ.get(KEYS_PATH_VARIABLE)
        return Path(path).expanduser() if path else None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it is part of
        return False


def keys_in_environment() -> str | None:
    """Entries of API keys, for containers that get their secrets so."""
    return os.environ.get(KEYS_VARIABLE)


def api_key_in_environment() -> str | None:
    """What to show a server that asks for a key."""
    return os.environ.get(API_KEY_VARIABLE)


_NUMERIC = ("ATEN_", "CUBLAS", "CUDNN", "DNNL_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_")
_PAINTING = ("DIFFUSERS_", "PYTORCH_", "TORCH", *_NUMERIC)


def generation_environment() -> dict[str, str]:
    """What the environment tells the libraries that paint, about kernels, memory and precision."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PAINTING)}


_OF_THE_MACHINE = (
    "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_VISIBLE_DEVICES",
    "KUBERNETES_SERVICE_HOST",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
    "RAY_ADDRESS",
)


def machine_environment() -> dict[str, str]:
    """What the environment says of GPUs, of Kubernetes, and of a Ray cluster to join."""
    return {name: os.environ[name] for name in _OF_THE_MACHINE if name in os.environ}


class AppConfig(_Config):
    """The arguments of `serve_app.app.build`, under ``args`` in a Serve config file."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()

    @model_validator(mode="after")
    def _defaults_keep_to_the_limits(self) -> "AppConfig":
        # Only what is written here; what the model brings is checked when it is loaded.
        steps, limits = self.model.default_steps, self.engine.limits
        if steps is not None and steps > limits.max_steps:
            raise ValueError(
                f"model.default_steps is {steps}, over engine.limits.max_steps, {limits.max_steps}"
            )
        return self


def read_serve_config(path: Path) -> list[AppConfig]:
    """The configuration of each application of ours in a Serve config file.

    Raises:
        ConfigError: if the file cannot be read, or an application's ``args`` are wrong.
    """
    return [parse_app_config(one.get("args", {})) for one in _applications(path)]


def read_autoscaling(path: Path, deployment: str) -> list[dict[str, Any]]:
    """``autoscaling_config`` of that deployment in each application of ours in a Serve config file.

    A fixed ``num_replicas`` is given as bounds. Empty where the file says neither.

    Raises:
        ConfigError: if the file cannot be read, or one of them is no mapping.
    """
    found = []
    for application in _applications(path):
        named = _deployment(path, application, deployment)
        scaling = named.get("autoscaling_config") or {}
        if not isinstance(scaling, dict) or not isinstance(scaling.get("policy") or {}, dict):
            raise ConfigError(f"{path}: autoscaling_config and its policy must be mappings.")
        if not scaling and "num_replicas" in named:
            scaling = dict.fromkeys(("min_replicas", "max_replicas"), named["num_replicas"])
        found.append(scaling)
    return found


def read_num_gpus(path: Path, deployment: str) -> list[float | None]:
    """GPUs that a replica of it asks Ray for, in each application of ours; None where unsaid.

    Raises:
        ConfigError: if the file cannot be read, or one of them is no number.
    """
    found: list[float | None] = []
    for application in _applications(path):
        options = _deployment(path, application, deployment).get("ray_actor_options") or {}
        number = options.get("num_gpus") if isinstance(options, dict) else options
        if not (number is None or (isinstance(number, int | float) and number >= 0)):
            raise ConfigError(
                f"{path}: ray_actor_options.num_gpus must be a number of GPUs; it is {number!r}."
            )
        found.append(number)
    return found


def policy_kwargs(autoscaling: Mapping[str, Any]) -> dict[str, object]:
    """What an ``autoscaling_config`` tells `WORK_POLICY`; nothing if it names another policy.

    Raises:
        ConfigError: if ``policy_kwargs`` are no mapping, or if Serve would wait before it does what
            the policy says.
    """
    policy = autoscaling.get("policy") or {}
    if policy.get("policy_function") != WORK_POLICY:
        return {}
    for name, default_s in SERVE_DELAYS_S.items():
        if autoscaling.get(name, default_s) == 0:
            continue
        said = "" if name in autoscaling else ", Serve's default where it is not set"
        raise ConfigError(
            f"autoscaling_config.{name} is {autoscaling.get(name, default_s)}{said}: Serve would "
            "wait so many seconds before it does what the policy says, which has patience of its "
            "own. Set it to 0."
        )
    given = policy.get("policy_kwargs") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"policy_kwargs must be a mapping; it is {given!r}.")
    return given


def foreign_policy(autoscaling: Mapping[str, Any]) -> str | None:
    """What an ``autoscaling_config`` names instead of `WORK_POLICY`; none if it names nothing."""
    named = (autoscaling.get("policy") or {}).get("policy_function")
    return None if named in (None, WORK_POLICY) else str(named)


def _applications(path: Path) -> list[dict[str, Any]]:
    """Those of ours, as they are written."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    applications = content.get("applications") if isinstance(content, dict) else None
    ours = [
        application
        for application in (applications if isinstance(applications, list) else [])
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH
    ]
    if not ours:
        raise ConfigError(
            f"{path} has no application with import_path {IMPORT_PATH!r}; see configs/ for "
            "examples."
        )
    return ours


def _deployment(path: Path, application: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What ``application`` sets of that deployment; empty if nothing."""
    deployments = application.get("deployments") or []
    if not isinstance(deployments, list) or not all(isinstance(d, dict) for d in deployments):
        raise ConfigError(f"{path}: deployments must be a list of mappings.")
    matching = (one for one in deployments if one.get("name") == name)
    named: dict[str, Any] = next(matching, {})
    return named


def parse_app_config(value: object) -> AppConfig:
    """Validate ``value``; raises `ConfigError` naming each wrong key, its value and the rule."""
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


_WEIGHTS = (".safetensors",)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def find_loras(model: ModelConfig) -> dict[str, str]:
    """``{name: file or repository}``: the adapters that are named, and those in the folder.

    Raises:
        ModelLoadError: if a file or the folder does not exist, or a name is given twice.
    """
    found = dict(model.loras)
    for name, source in found.items():
        path = Path(source).expanduser()
        if is_path(source) and not (path.is_file() and path.suffix == ".safetensors"):
            raise ModelLoadError(f"model.loras: {name!r}: there is no .safetensors file {path}.")
    if model.lora_folder is None:
        return found
    folder = Path(model.lora_folder).expanduser()
    if not folder.is_dir():
        raise ModelLoadError(f"model.lora_folder: there is no folder {folder}.")
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ModelLoadError(
                f"model.lora_folder: {path} is called {name!r}, as one of model.loras is. Rename "
                "one of the two."
            )
        found[name] = str(path)
    return found


def check_model_folder(model: ModelConfig) -> None:
    """Find what would stop a local model from loading, in milliseconds.

    Raises `ModelLoadError` if the folder is missing, is not in the diffusers format, asks for code
    of its own, or holds a component whose weights are pickles only, or if a LoRA adapter is
    missing. A repository of the hub is checked when it is loaded.
    """
    find_loras(model)
    if not model.is_folder:
        return
    folder = Path(model.source)
    if not folder.is_dir():
        raise ModelLoadError(
            f"model {model.id!r}: the folder {folder} does not exist. Set model.path to a folder "
            "in the diffusers format, or to the name of a Hugging Face repository."
        )
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelLoadError(
            f"model {model.id!r}: {folder} has no model_index.json, so it is not in the diffusers "
            "format. Convert a single-file checkpoint with diffusers' from_single_file and "
            "save_pretrained."
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"model {model.id!r}: {index_file} is not JSON: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelLoadError(
            f"model {model.id!r}: {index_file} names no stock pipeline in _class_name; models that "
            "bring code of their own are not loaded."
        )
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value[:1] in ([], [None]):
            continue
        component = folder / name
        if not component.is_dir():
            raise ModelLoadError(
                f"model {model.id!r}: {index_file} names the component {name!r}, but {component} "
                "does not exist. Copy the whole model folder."
            )
        files = [file.name for file in component.iterdir()]
        pickles = sorted(file for file in files if file.endswith(_PICKLES))
        if pickles and not any(file.endswith(_WEIGHTS) for file in files):
            raise ModelLoadError(
                f"model {model.id!r}: {component} has only pickled weights ({', '.join(pickles)}), "
                "which can run code when they are loaded. Convert them to safetensors: load them "
                "where you trust them and call save_pretrained(..., safe_serialization=True)."
            )
