"""The settings of an application: frozen, typed, units in the names, unknown keys rejected."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from serve_app.config.deployment_names import GENERATOR, generator_names
from serve_app.config.gateway import GatewayConfig
from serve_app.config.limits import LimitsConfig
from serve_app.config.loras import LoraConfig
from serve_app.config.section import Section
from serve_app.config.speed import AccelerationConfig, SpeedConfig
from serve_app.errors import ConfigError

Side = Annotated[int, Field(ge=8, le=16_384)]


class ModelConfig(LoraConfig):
    """The model, its source, its precision and its device."""

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
    speed: SpeedConfig = SpeedConfig()
    acceleration: AccelerationConfig = AccelerationConfig()

    @model_validator(mode="after")
    def _adapters_fit_the_rest(self) -> "ModelConfig":
        speed = self.speed
        if self.lora_source is not None and speed.offload != "none":
            raise ValueError(
                "model.speed.offload moves weights while model.lora_source adds some: set one of "
                "them only, or name the adapters in model.loras"
            )
        # A switch of adapters would compile again, and 8-bit layers take no adapters.
        options = {"compile": speed.compile, "quantize": speed.quantize != "none"}
        self.check_loras_exclude(self.call_kwargs, options)
        return self

    @model_validator(mode="after")
    def _options_for_a_gpu_fit(self) -> "ModelConfig":
        speed = self.speed
        options = {"offload": speed.offload != "none", "cuda_graphs": speed.cuda_graphs}
        for option, enabled in options.items():
            if enabled and self.device == "cpu":
                raise ValueError(
                    f"model.speed.{option} needs a GPU, and model.device is 'cpu': set one of them "
                    "otherwise"
                )
        if all(options.values()):
            raise ValueError(
                "model.speed.cuda_graphs needs weights that stay in place, and model.speed.offload "
                "moves them: set one of them only"
            )
        return self


class EngineConfig(Section):
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
        description="Policy that orders the requests. 'on_time' fills batches, keeps named "
        "deadlines, ends many requests on time, and limits every wait. 'fifo' runs the call that "
        "has waited longest, 'least_slack' the one with the least time to spare, 'shortest_first' "
        "the one with the least remaining work.",
    )
    slo_scale: float = Field(
        3.0,
        gt=0,
        description="Wanted end of a request that sets no deadline, as a multiple of its predicted "
        "time on an idle replica. It only orders requests, and rejects none. The same multiple of "
        "its time in a plain queue is the longest wait under 'on_time'. A smaller value gives more "
        "throughput, a larger one more requests on time.",
    )
    max_backlog_s: float = Field(
        30.0,
        gt=0,
        description="Predicted seconds of interactive work that a new request may wait for. A "
        "request that would wait longer is rejected with status 429 and a time to retry. A longer "
        "queue does not raise throughput, and most clients give up after 30 to 60 s.",
    )
    warmup_sizes_px: (
        Literal["auto"] | Annotated[tuple[tuple[Side, Side], ...], Field(max_length=64)]
    ) = Field(
        "auto",
        description="Sizes, as width and height in pixels, to measure at start-up. The results "
        "give predicted times and the largest batch of each size that fits into memory and still "
        "raises throughput. Other sizes are measured as requests arrive, and their batches are "
        "limited by the nearest measured size. 'auto' is the model's own size on a GPU, and none "
        "on a CPU. Without any size, engine.max_batch_size is the only limit.",
    )
    profile_path: str = Field(
        "auto",
        min_length=1,
        description="File that stores the results of the start-up, so that the next start is "
        "faster: the certification, previews and times. A start ignores the file if weights, "
        "packages, device or settings have changed. 'auto' is a file of its own for each such "
        "combination, in the folder diffusion-serve of HF_HOME. 'none' stores nothing.",
    )
    stuck_after_s: float = Field(
        60.0,
        gt=0,
        description="Least duration, in seconds, after which a network call counts as stuck, if it "
        "is also 20 times as long as predicted. The first call of each shape and the calls of the "
        "start-up may take ten times as long. A stuck replica fails its health check and is "
        "replaced, and other replicas generate its requests.",
    )
    prompt_cache_mib: int = Field(
        128, ge=0, description="Device memory for encoded prompts of earlier requests, in MiB."
    )
    max_loaded_loras: int = Field(
        16,
        ge=1,
        description="Most LoRA adapters of `model.lora_source` in memory at a time. One that was "
        "not used for the longest time makes room for a new one.",
    )
    loaded_loras_mib: int = Field(
        2048,
        ge=1,
        description="Device memory for the LoRA adapters of `model.lora_source`, in MiB.",
    )
    limits: LimitsConfig = LimitsConfig()


class ModelEntry(ModelConfig):
    """One of several models: the keys of `model`, and an engine of its own."""

    engine: EngineConfig | None = Field(
        None, description="Engine of this model. Default: the application's `engine`."
    )

    @property
    def model(self) -> ModelConfig:
        """The same model without the engine."""
        own = ModelConfig.model_fields
        return ModelConfig(**{n: getattr(self, n) for n in self.model_fields_set if n in own})


class AppConfig(Section):
    """The application: the arguments of `serve_app.app.build`, ``args`` in a Serve config file."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()
    models: tuple[ModelEntry, ...] = Field(
        (),
        min_length=1,
        description="Several models in place of `model`. Each entry has the keys of `model`, and "
        "`engine` where its engine differs from the application's. Requests that name no model go "
        "to the first one.",
    )

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the models in the API, the default one first."""
        return tuple(entry.id for entry in self.models) or (self.model.id,)

    @property
    def generators(self) -> tuple[str, ...]:
        """Names of the models' deployments, in the order of `ids`.

        An entry of `models` keeps its deployment when another one joins it or goes.
        """
        return generator_names(self.ids) if self.models else (GENERATOR,)

    def each_model(self) -> "tuple[AppConfig, ...]":
        """Return a configuration with one model for each of them, in their order.

        Of the aliases, and of the names that get links, each has those of its model.
        """
        if not self.models:
            return (self,)
        return tuple(
            AppConfig(
                model=entry.model,
                engine=entry.engine or self.engine,
                gateway=_gateway_of(entry.id, self.gateway),
            )
            for entry in self.models
        )

    @model_validator(mode="after")
    def _models_have_names_of_their_own(self) -> "AppConfig":
        if self.models and "model" in self.model_fields_set:
            raise ValueError(
                "model and models are both set: leave model out, and make it an entry of models"
            )
        names = self.generators
        for index, name in enumerate(names):
            first = names.index(name)
            if first == index:
                continue
            if self.ids[first] == self.ids[index]:
                raise ValueError(
                    f"models has two entries with the id {self.ids[index]!r}: give each its own"
                )
            raise ValueError(
                f"models has the ids {self.ids[first]!r} and {self.ids[index]!r}, and both "
                f"deployments would have the name {name!r}: change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _profiles_have_files_of_their_own(self) -> "AppConfig":
        owners: dict[str, str] = {}
        for entry in self.models:
            path = (entry.engine or self.engine).profile_path
            if path in ("auto", "none"):
                continue
            if path in owners:
                raise ValueError(
                    f"the models {owners[path]!r} and {entry.id!r} share the engine.profile_path "
                    f"{path!r}: each start would overwrite the other's profile. Give each a file "
                    "of its own in the engine of its entry, or leave it 'auto'"
                )
            owners[path] = entry.id
        return self

    @model_validator(mode="after")
    def _aliases_name_a_model(self) -> "AppConfig":
        for alias, name in self.gateway.model_aliases.items():
            if not alias:
                raise ValueError("gateway.model_aliases has an empty name")
            if name not in self.ids:
                known = (
                    f"models has {', '.join(map(repr, self.ids))}"
                    if self.models
                    else f"the model is {self.model.id!r}"
                )
                raise ValueError(f"gateway.model_aliases.{alias} is {name!r}, and {known}")
            if alias != name and alias in self.ids:
                raise ValueError(
                    f"gateway.model_aliases.{alias} is {name!r}, and models has an entry with the "
                    f"id {alias!r}: choose another alias"
                )
        return self

    @model_validator(mode="after")
    def _links_are_for_names_of_a_model(self) -> "AppConfig":
        names = (*self.ids, *self.gateway.model_aliases)
        for name in () if self.gateway.any_model else self.gateway.storage.default_for:
            if not _names_one_of(name, names):
                raise ValueError(
                    f"gateway.storage.default_for has {name!r}, which is no name of "
                    f"{'a' if self.models else 'the'} model: there are "
                    f"{', '.join(map(repr, names))}, and '*' for all"
                )
        return self

    @model_validator(mode="after")
    def _defaults_keep_to_the_limits(self) -> "AppConfig":
        # The model's own defaults are checked when it is loaded.
        for index, model in enumerate(self.models or (self.model,)):
            where = f"models.{index}" if self.models else "model"
            engine = (model.engine if isinstance(model, ModelEntry) else None) or self.engine
            steps, limits = model.default_steps, engine.limits
            if model.lora_source is not None and engine.max_loaded_loras < limits.max_loras:
                raise ValueError(
                    f"engine.max_loaded_loras is {engine.max_loaded_loras}, and a request may name "
                    f"engine.limits.max_loras, {limits.max_loras}: allow at least as many"
                )
            if steps is not None and steps > limits.max_steps:
                raise ValueError(
                    f"{where}.default_steps is {steps}, over engine.limits.max_steps, "
                    f"{limits.max_steps}"
                )
        return self


_Config = TypeVar("_Config", bound=AppConfig)


def _names_one_of(wanted: str, names: Iterable[str]) -> bool:
    """Return whether an entry of ``gateway.storage.default_for`` means one of these names."""
    return wanted == "*" or any(fnmatchcase(wanted, known) for known in names)


def _gateway_of(model: str, gateway: GatewayConfig) -> GatewayConfig:
    """Return the settings of the gateway without what concerns other models.

    The configuration of one model is validated, and may name no other one.
    """
    aliases = {alias: name for alias, name in gateway.model_aliases.items() if name == model}
    wanted = tuple(
        name
        for name in gateway.storage.default_for
        if gateway.any_model or _names_one_of(name, (model, *aliases))
    )
    storage = gateway.storage.model_copy(update={"default_for": wanted})
    return gateway.model_copy(update={"model_aliases": aliases, "storage": storage})


def parse_app_config(value: object) -> AppConfig:
    """Validate the arguments of an application.

    Raises:
        ConfigError: naming each wrong key, its value and the rule.
    """
    return parse_as(AppConfig, value)


def parse_as(kind: type[_Config], value: object) -> _Config:
    """Validate arguments as `parse_app_config`, also those of a kind with more keys."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = [_explain(problem, kind) for problem in error.errors()]
        raise ConfigError(
            "the application's configuration is wrong:\n" + "\n".join(lines)
        ) from None


def _explain(problem: ErrorDetails, known: type[BaseModel]) -> str:
    *parents, key = problem["loc"] or ("args",)
    where = ".".join(map(str, (*parents, key)))
    if problem["type"] == "value_error":
        entry = f"models.{key}: " if parents == ["models"] else ""
        return f"  {entry}{problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] != "extra_forbidden":
        return f"  {where}: {problem['msg']} (given: {problem['input']!r})"
    for parent in parents:
        if isinstance(parent, str):  # else the index of an entry
            known = _section(known.model_fields[parent].annotation)
    return f"  {where}: unknown key; known are {', '.join(known.model_fields)}"


def _section(annotation: Any) -> type[BaseModel]:
    """Return the section in a field's type: itself, or one that may be absent or repeated."""
    found = (annotation, *get_args(annotation))
    return next(one for one in found if isinstance(one, type) and issubclass(one, BaseModel))
