"""``diffusion-serve serve``: from a config file, or from a model alone, to a running server.

Everything that can be wrong is checked before Ray is imported. Ray's own ``serve run`` then runs
the config in this process, so that Ctrl-C and SIGTERM end it as they end ``serve run``.
"""

import socket
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from serve_app.cli.check import check_serve_file
from serve_app.config.deployment_names import GENERATOR
from serve_app.config.environment import machine_environment, set_defaults_of_processes
from serve_app.config.model_files import find_model
from serve_app.config.models import ModelConfig
from serve_app.config.serve_file import (
    IMPORT_PATH,
    SERVE_DELAYS_S,
    WORK_POLICY,
    read_generators,
    read_serve_file,
)
from serve_app.errors import ConfigError

LOCAL_HOST = "127.0.0.1"
DEFAULT_PORT = 8000

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Serve config file, such as configs/demo.yaml.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to serve without a config file: 'demo', a folder, a .safetensors file, or "
            "a repository on the Hugging Face hub. Default without CONFIG: 'demo'."
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            help="With --model: the device. 'auto' is a GPU; only the demo model runs on the CPU "
            "if there is none. Default: 'auto'."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="With --model: the floating-point type. Default: 'auto'."),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --model: most replicas under load, each with its own GPU. Default: 1.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 listens on all addresses.")
    ] = LOCAL_HOST,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65_535, help="Port. Default: the config's, otherwise 8000."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the config and exit. Nothing starts.")
    ] = False,
) -> None:
    """Run a server until Ctrl-C.

    Without a config file it serves one model, and prints the config that it made to stdout.
    """
    try:
        if config is None:
            content = make_config(
                find_model(model or "demo"), device or "auto", dtype or "auto", max_replicas or 1
            )
        elif model or device or dtype or max_replicas:
            raise ConfigError(
                "--model, --device, --dtype and --max-replicas cannot be used with a config file. "
                f"Leave them out, and set model and deployments in {config}."
            )
        else:
            content = read_serve_file(config)
        http_options = content.get("http_options") or {}
        if not isinstance(http_options, dict):
            raise ConfigError(f"{config}: http_options must be a mapping; it is {http_options!r}.")
        port = port or http_options.get("port", DEFAULT_PORT)
        content["http_options"] = http_options | {"host": host, "port": port}
        with tempfile.TemporaryDirectory(prefix="diffusion-serve-") as folder:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            path = Path(folder) / "serve.yaml"
            path.write_text(text, encoding="utf-8")
            for warning in check_serve_file(path, config or "the config"):
                typer.echo(f"warning: {warning}", err=True)
            if config is None or print_config:
                typer.echo(text, nl=False)
            if print_config:
                return
            check_gpus(path)
            check_port(host, port)
            typer.echo(f"starting on http://{host}:{port}; Ctrl-C ends it", err=True)
            _run(path)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def make_config(
    model: ModelConfig, device: Device, dtype: Dtype, max_replicas: int
) -> dict[str, Any]:
    """Return the content of a Serve config file that serves one model.

    Raises:
        ConfigError: if ``device`` is 'auto' and this machine has no GPU for the model.
    """
    if device == "auto":
        device = _choose_device(model)
    settings = model.model_dump(exclude_unset=True, exclude_none=True) | {"device": device}
    if dtype != "auto":
        settings["dtype"] = dtype
    generator: dict[str, Any] = {
        "name": GENERATOR,
        "ray_actor_options": {"num_gpus": 0 if device == "cpu" else 1, "num_cpus": 1},
    }
    if max_replicas > 1:
        generator["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": max_replicas,
            **dict.fromkeys(SERVE_DELAYS_S, 0),
            "metrics_interval_s": 1,
            "look_back_period_s": 3,
            "policy": {"policy_function": WORK_POLICY},
        }
    return {
        "http_options": {"host": LOCAL_HOST, "port": DEFAULT_PORT},
        "applications": [
            {
                "name": "diffusion-serve",
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {"model": settings},
                "deployments": [generator],
            }
        ],
    }


def check_gpus(path: Path) -> None:
    """Raise `ConfigError` if a replica requests a GPU that this machine does not have."""
    for generator in read_generators(path):
        wanted = 1 if generator.num_gpus is None else generator.num_gpus
        if wanted > 0 and not _joins_a_cluster() and count_gpus() == 0:
            raise ConfigError(
                f"the deployment {generator.deployment} requests {wanted:g} GPU. {_NO_GPU}"
            )


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` if another process listens on the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another --host or "
                "--port."
            ) from None


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that processes on this machine may use."""
    import pynvml

    visible = machine_environment().get("CUDA_VISIBLE_DEVICES")
    named = None if visible is None else [one for one in visible.split(",") if one.strip()]
    if named is not None and (not named or named[0].strip() == "-1"):
        return 0
    try:
        pynvml.nvmlInit()
        try:
            number: int = pynvml.nvmlDeviceGetCount()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0
    return number if named is None else min(number, len(named))


_NO_GPU = (
    "This machine has no usable NVIDIA GPU: run `diffusion-serve doctor` for the reason. To use "
    "the GPUs of a running Ray cluster, set RAY_ADDRESS=auto. To run on the CPU, use --device cpu "
    "with --model, or set model.device to cpu and ray_actor_options.num_gpus to 0 in a config file."
)


def _choose_device(model: ModelConfig) -> Device:
    """Return 'cuda' where there is a GPU, else 'cpu' for the demo model only.

    A full-size model on a CPU needs minutes for each image: the operator must choose that.
    """
    if _joins_a_cluster() or count_gpus() > 0:
        return "cuda"
    if model.id == "demo":
        typer.echo("no GPU on this machine: the demo model runs on the CPU", err=True)
        return "cpu"
    raise ConfigError(f"--device is auto, which means a GPU. {_NO_GPU}")


def _joins_a_cluster() -> bool:
    return machine_environment().get("RAY_ADDRESS", "local") not in ("", "local")


def _run(path: Path) -> None:
    """Run a Serve config file in this process until a signal ends it."""
    set_defaults_of_processes()
    from ray.serve.scripts import run

    run.main([str(path)], standalone_mode=False)
