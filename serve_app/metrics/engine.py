"""Metrics of an engine, which is one generator replica."""

from typing import Literal

from prometheus_client import Counter, Enum, Gauge, Histogram, Info

from serve_app.metrics.registry import ENGINE

STEPS_S = (0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Buckets for the duration of a denoiser call."""

ENGINE_REQUESTS = Gauge(
    "diffusion_serve_engine_requests",
    "Requests in the engine: queued for a slot, parked between two calls, or running in one.",
    ["model", "state"],
    registry=ENGINE,
)

BACKLOG = Gauge(
    "diffusion_serve_backlog_seconds",
    "Predicted time to finish all accepted work of a priority.",
    ["model", "priority"],
    registry=ENGINE,
)

ARRIVING = Gauge(
    "diffusion_serve_arriving_work_ratio",
    "Solo seconds of interactive work that arrive per second, over the last 30 s.",
    ["model"],
    registry=ENGINE,
)

THROUGHPUT = Gauge(
    "diffusion_serve_throughput_ratio",
    "Solo seconds of work done per busy second; over 1 through batching.",
    ["model"],
    registry=ENGINE,
)

UTILIZATION = Gauge(
    "diffusion_serve_utilization_ratio",
    "Share of the last 30 s with interactive work.",
    ["model"],
    registry=ENGINE,
)

REJECTIONS = Counter(
    "diffusion_serve_rejections_total",
    "Rejected images, by the limit that they would have exceeded.",
    ["model", "reason"],
    registry=ENGINE,
)

FORECAST_ERROR = Histogram(
    "diffusion_serve_forecast_error_ratio",
    "Error of the predicted duration of a finished request, as a share of its duration.",
    ["model"],
    buckets=(0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0),
    registry=ENGINE,
)

DEADLINES = Counter(
    "diffusion_serve_deadlines_total",
    "Generated interactive images that met or missed their deadline.",
    ["model", "outcome", "set_by"],
    registry=ENGINE,
)

CANCELLATION = Histogram(
    "diffusion_serve_cancellation_seconds",
    "Time from the cancellation of a request until its slot is free.",
    ["model"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    registry=ENGINE,
)

STEPS = Counter(
    "diffusion_serve_steps_total",
    "Denoiser calls per image: a call for a batch of four counts four.",
    ["model", "size"],
    registry=ENGINE,
)

EXTRAPOLATED = Counter(
    "diffusion_serve_extrapolated_calls_total",
    "Denoiser calls of finished images that were extrapolated from earlier ones.",
    ["model"],
    registry=ENGINE,
)

STEP = Histogram(
    "diffusion_serve_step_seconds",
    "Device time of one denoiser call, for a batch of any size.",
    ["model", "size"],
    buckets=STEPS_S,
    registry=ENGINE,
)

BATCH_SIZE = Histogram(
    "diffusion_serve_batch_size",
    "Images in one denoiser call.",
    ["model"],
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
    registry=ENGINE,
)

DEVICE = Counter(
    "diffusion_serve_device_seconds_total",
    "Device time of network calls, by activity.",
    ["model", "activity"],
    registry=ENGINE,
)

STALL = Histogram(
    "diffusion_serve_engine_stall_seconds",
    "Gaps of over 0.1 s between two network calls while there are requests.",
    ["model"],
    buckets=(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
    registry=ENGINE,
)

STUCK = Gauge(
    "diffusion_serve_stuck_ratio",
    "Duration of the running network call, as a share of what the watchdog allows: at 1, the "
    "replica is replaced.",
    ["model"],
    registry=ENGINE,
)

IMAGES = Counter(
    "diffusion_serve_images_total",
    "Generated images.",
    ["model", "size"],
    registry=ENGINE,
)

IMAGES_FLAGGED = Counter(
    "diffusion_serve_images_flagged_total",
    "Generated images that the safety checker flagged, whether returned or blocked.",
    ["model"],
    registry=ENGINE,
)

PIXELS = Counter(
    "diffusion_serve_pixels_total",
    "Pixels of the generated images.",
    ["model"],
    registry=ENGINE,
)

PREVIEWS = Counter(
    "diffusion_serve_previews_total",
    "Generated previews.",
    ["model"],
    registry=ENGINE,
)

LORA_SWITCHES = Counter(
    "diffusion_serve_lora_switches_total",
    "Changes of the active LoRA adapters between two calls.",
    ["model"],
    registry=ENGINE,
)

LORA_HITS = Counter(
    "diffusion_serve_lora_hits_total",
    "LoRA adapters on demand that a request found in memory.",
    ["model"],
    registry=ENGINE,
)

LoraResult = Literal["loaded", "not_found", "invalid", "failed"]
"""``invalid``: the file cannot be used for the model. ``failed``: it could not be read."""

LORA_LOADS = Counter(
    "diffusion_serve_lora_loads_total",
    "Loads of LoRA adapters on demand, by result.",
    ["model", "result"],
    registry=ENGINE,
)

LORA_LOAD_SECONDS = Histogram(
    "diffusion_serve_lora_load_seconds",
    "Duration of a load of a LoRA adapter on demand, from its source into memory.",
    ["model"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=ENGINE,
)

LORA_EVICTIONS = Counter(
    "diffusion_serve_lora_evictions_total",
    "LoRA adapters on demand that were removed from memory to make room.",
    ["model"],
    registry=ENGINE,
)

LORAS_LOADED = Gauge(
    "diffusion_serve_loras_loaded",
    "LoRA adapters on demand in memory.",
    ["model"],
    registry=ENGINE,
)

LORA_BYTES = Gauge(
    "diffusion_serve_lora_bytes",
    "Memory of the LoRA adapters on demand, including those that are being loaded.",
    ["model"],
    registry=ENGINE,
)

OUT_OF_MEMORY = Counter(
    "diffusion_serve_out_of_memory_total",
    "Network calls that ran out of device memory; most are retried.",
    ["model"],
    registry=ENGINE,
)

Memory = Literal["used", "reserved", "free", "total"]
"""Memory used by torch, reserved by torch for later, and of the device by all processes."""

DEVICE_MEMORY = Gauge(
    "diffusion_serve_device_memory_bytes",
    "GPU memory, by kind.",
    ["model", "kind"],
    registry=ENGINE,
)

SHARING = Enum(
    "diffusion_serve_sharing",
    "How requests share the pipeline, as certified at start-up. Not set if `max_running` is 1.",
    ["model"],
    states=["batched", "interleaved", "sequential"],
    registry=ENGINE,
)

SHARING_LIMITED = Gauge(
    "diffusion_serve_sharing_limited",
    "1 if only prompts of the same length share denoiser calls, else 0. Set if batched.",
    ["model"],
    registry=ENGINE,
)

SHARING_DIFFERENCE = Gauge(
    "diffusion_serve_sharing_difference",
    "Largest pixel difference, in [0, 1], between batched and sequential at start-up.",
    ["model"],
    registry=ENGINE,
)

COLD_START = Gauge(
    "diffusion_serve_cold_start_seconds",
    "Duration of the engine's last start, by phase; the phases add up to the total.",
    ["model", "phase"],
    registry=ENGINE,
)

ENGINE_INFO = Info(
    "diffusion_serve_engine",
    "Version, host and device of a generator replica.",
    ["model", "version", "node", "device", "gpu"],
    registry=ENGINE,
)
