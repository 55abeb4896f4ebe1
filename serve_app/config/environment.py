"""Every environment variable that this package reads.

No other module reads the environment. The variables that libraries read themselves, such as
``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``HF_HOME``, are theirs and are not listed here.
"""

import os

KEYS_VARIABLE = "DIFFUSION_SERVE_KEYS"
"""The variable that holds API key entries."""

KEYS_PATH_VARIABLE = "DIFFUSION_SERVE_KEYS_PATH"
"""The variable that names a file of API key entries. ``gateway.keys_path`` goes before it."""

API_KEY_VARIABLE = "DIFFUSION_SERVE_API_KEY"
"""The variable that holds the API key of a client of a server."""

PROXY_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""The variable by which Ray's processes learn the middlewares of Serve's proxies."""

_MACHINE_VARIABLES = (
    "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_VISIBLE_DEVICES",
    "KUBERNETES_SERVICE_HOST",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
    "RAY_ADDRESS",
)

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
_GENERATION_PREFIXES = ("DIFFUSERS_", "PYTORCH_", "TORCH", *_NUMERIC_PREFIXES)


def keys_in_environment() -> str | None:
    """Return the API key entries of the environment, for containers that get their secrets so."""
    return os.environ.get(KEYS_VARIABLE)


def keys_path_in_environment() -> str | None:
    """Return the path of the file of API keys that the environment names."""
    return os.environ.get(KEYS_PATH_VARIABLE)


def api_key_in_environment() -> str | None:
    """Return the API key that a client sends to a server."""
    return os.environ.get(API_KEY_VARIABLE)


def generation_environment() -> dict[str, str]:
    """Return the variables that change kernels, memory or precision of a generation."""
    return {
        name: os.environ[name]
        for name in sorted(os.environ)
        if name.startswith(_GENERATION_PREFIXES)
    }


def machine_environment() -> dict[str, str]:
    """Return the variables about GPUs, Kubernetes and a Ray cluster to join."""
    return {name: os.environ[name] for name in _MACHINE_VARIABLES if name in os.environ}
