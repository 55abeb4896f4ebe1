"""Every environment variable that this package reads.

No other module reads the environment. The variables that libraries read themselves, such as
``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``HF_HOME``, are theirs and are not listed here.
"""

import os

KEYS_VARIABLE = "DIFFUSION_SERVE_KEYS"
"""API key entries of the server, as YAML, in addition to those of a file."""

KEYS_PATH_VARIABLE = "DIFFUSION_SERVE_KEYS_PATH"
"""Path of a file of API key entries. ``gateway.keys_path`` takes precedence."""

API_KEY_VARIABLE = "DIFFUSION_SERVE_API_KEY"
"""API key that ``diffusion-serve top`` sends, unless ``--key`` is given."""

PROXY_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Import path of the middlewares of Serve's proxies, for every process of Ray.

``diffusion-serve serve`` sets it to ``serve_app.gateway.proxy:middlewares`` unless it is set.
"""

PROXY_CALLBACK = "serve_app.gateway.proxy:middlewares"
"""The middlewares of Serve's proxies: `serve_app.gateway.proxy` says what they are for."""

ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF"
"""Settings of torch's memory allocator, which torch reads when it is imported.

The GPU image and ``diffusion-serve serve`` set it to ``expandable_segments:True``. The older name
``PYTORCH_CUDA_ALLOC_CONF`` takes precedence in torch.
"""

ALLOCATOR_SETTINGS = "expandable_segments:True"
"""Let freed memory serve calls of any size: batches of many sizes leave pieces otherwise."""

OLDER_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Older names of the same variable."""

DASHBOARD_VARIABLE = "RAY_DASHBOARD_STARTUP_TIMEOUT_S"
"""Seconds in which Ray's dashboard must start, without which Ray does not start.

``diffusion-serve serve`` sets it to 300 unless it is set: a busy laptop needs more than Ray's 60.
"""

DASHBOARD_WITHIN_S = "300"

MACHINE_VARIABLES = {
    "CUDA_MPS_PIPE_DIRECTORY": "Folder of a CUDA MPS daemon that shares the GPU.",
    "CUDA_VISIBLE_DEVICES": "GPUs that a process may use. Empty or -1 hides all of them.",
    "KUBERNETES_SERVICE_HOST": "Address of the API server. Set in every pod of Kubernetes.",
    "NVIDIA_DRIVER_CAPABILITIES": "Parts of the driver that a container gets.",
    "NVIDIA_VISIBLE_DEVICES": "GPUs that a container gets.",
    "RAY_ADDRESS": "Running Ray cluster to join, instead of a new one on this machine.",
}
"""Variables about GPUs, Kubernetes and a Ray cluster, with their meanings."""

_NUMERIC_PREFIXES = (
    "ATEN_",
    "CUBLAS",
    "CUDNN",
    "DNNL_",
    "MKL_",
    "NVIDIA_TF32",
    "OMP_",
    "ONEDNN_",
)
GENERATION_PREFIXES = ("DIFFUSERS_", "PYTORCH_", "TORCH", *_NUMERIC_PREFIXES)
"""Prefixes of variables of libraries that change the speed or the result of a generation."""


def keys_in_environment() -> str | None:
    """Return the API key entries of the environment, for containers with secrets in variables."""
    return os.environ.get(KEYS_VARIABLE)


def keys_path_in_environment() -> str | None:
    """Return the path of the file of API keys that the environment names."""
    return os.environ.get(KEYS_PATH_VARIABLE)


def api_key_in_environment() -> str | None:
    """Return the API key that a client sends to a server."""
    return os.environ.get(API_KEY_VARIABLE)


def set_defaults_of_processes() -> None:
    """Set what the processes that this one starts read from the environment, unless it is set."""
    os.environ.setdefault(PROXY_CALLBACK_VARIABLE, PROXY_CALLBACK)
    os.environ.setdefault(DASHBOARD_VARIABLE, DASHBOARD_WITHIN_S)
    if not any(name in os.environ for name in OLDER_ALLOCATOR_VARIABLES):
        os.environ.setdefault(ALLOCATOR_VARIABLE, ALLOCATOR_SETTINGS)


def generation_environment() -> dict[str, str]:
    """Return the variables that change kernels, memory or precision of a generation."""
    return {
        name: os.environ[name]
        for name in sorted(os.environ)
        if name.startswith(GENERATION_PREFIXES)
    }


def machine_environment() -> dict[str, str]:
    """Return the variables about GPUs, Kubernetes and a Ray cluster to join."""
    return {name: os.environ[name] for name in MACHINE_VARIABLES if name in os.environ}
