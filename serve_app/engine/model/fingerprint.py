"""Fingerprint of everything that the outcome of a start-up depends on; quick to compute.

A certificate of an earlier start is valid if the same weights meet the same code on the same kind
of device. So the fingerprint covers what will run: the weights in memory, not their files, and all
installed packages, not a list of known ones. A part that cannot be determined gets a unique value,
which never matches.
"""

import hashlib
import json
import logging
import platform
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serve_app import __version__
from serve_app.config.environment import generation_environment

logger = logging.getLogger(__name__)

Fingerprint = dict[str, str]
"""Digests of what may change, by name; equal values mean no change."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by size in bytes. Signed: CUDA has no unsigned `torch.hash_tensor`."""

_OWN_PACKAGE = "diffusion_serve-"
"""Prefix of the dist-info folder of this program's own package."""


def of_code() -> Fingerprint:
    """Return the fingerprint of this engine's source and of all installed packages.

    A package counts with its RECORD, which lists a digest of each file. Its version is not enough:
    a package installed from a repository keeps its version for weeks.
    """
    root = Path(__file__).parents[2]
    sources = sorted(
        file for folder in ("engine", "protocol") for file in (root / folder).rglob("*.py")
    )
    source = _digest(*(part for file in sources for part in _named_content(file)))
    found = {"diffusion-serve": f"{__version__} {source}"}
    for folder in dict.fromkeys(sys.path):
        for info in sorted(Path(folder or ".").glob("*.dist-info")):
            if not info.name.startswith(_OWN_PACKAGE):
                package, _, version = info.name.removesuffix(".dist-info").partition("-")
                found.setdefault(f"package {package}", f"{version} {_record(info)}")
    return found


def _record(info: Path) -> str:
    record, url = info / "RECORD", info / "direct_url.json"
    if not record.is_file() or (url.is_file() and '"editable": true' in url.read_text()):
        return _unique()  # the files of an editable package may change in place
    return _digest(record.read_bytes())


def of_machine(device: torch.device) -> Fingerprint:
    """Return the fingerprint of the device and of torch's settings."""
    found = {
        "python": sys.version,
        "torch build": f"{torch.version.git_version} CUDA {torch.version.cuda}",
        "processor": f"{platform.machine()} {_processor()}",
        "threads": str(torch.get_num_threads()),
        "environment": repr(generation_environment()),
        "precision": f"{torch.get_float32_matmul_precision()}, "
        f"cudnn allow_tf32={torch.backends.cudnn.allow_tf32} "
        f"benchmark={torch.backends.cudnn.benchmark} "
        f"deterministic={torch.are_deterministic_algorithms_enabled()}",
        "device": device.type,
    }
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        gpu = torch.cuda.get_device_properties(device)
        found["device"] = (
            f"{gpu.name}, {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} processors, "
            f"{gpu.total_memory} bytes"
        )
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = driver.read_text() if driver.is_file() else ""
    return found


def _processor() -> str:
    """Return the CPU's name and instruction set: other kernels round differently."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line for line in lines if line.startswith("model name")), "")
    return f"{name.partition(': ')[2]} {torch.backends.cpu.get_cpu_capability()}"


def of_component(component: Any) -> str:
    """Return the digest of a component: its config, and the layers and weights of a network.

    It covers hooks on a network, but not methods that were replaced in memory.
    """
    try:
        return _digest(*_parts(component))
    except Exception:
        name = type(component).__name__
        logger.warning("%s has no fingerprint and counts as changed", name, exc_info=True)
        return _unique()


def _parts(component: Any) -> Iterator[bytes]:
    yield f"{type(component).__module__}.{type(component).__qualname__}".encode()
    config = getattr(component, "config", None)
    if config is None:
        yield repr(component).encode()
    else:
        content = config if isinstance(config, dict) else config.to_dict()
        yield json.dumps(content, sort_keys=True, default=repr).encode()
    if (tokenizer := getattr(component, "backend_tokenizer", None)) is not None:
        # Without the settings of its last call.
        content = json.loads(tokenizer.to_str()) | {"padding": None, "truncation": None}
        yield json.dumps(content).encode()
    if isinstance(component, nn.Module):
        yield _layers(component).encode()
        yield from _weights(component)


def _layers(network: nn.Module) -> str:
    """Describe the layers in order; unique if hooks run other code between them."""
    if any(layer._forward_pre_hooks or layer._forward_hooks for layer in network.modules()):
        return _unique()
    return repr(network)


def _weights(network: nn.Module) -> Iterator[bytes]:
    for name, tensor in network.state_dict().items():
        if not isinstance(tensor, Tensor):  # extra state of a layer
            yield f"{name} {tensor!r}".encode()
            continue
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        yield from _content(tensor)


def _content(tensor: Tensor) -> Iterator[bytes]:
    """Yield the exclusive or of the bits of each row, computed on the tensor's device.

    This takes as long as reading the weights from memory once. It misses an exchange of two numbers
    within a row, and equal changes to an even number of them. Training does not cause either.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # 8-bit weights consist of several tensors
        names, context = tensor.__tensor_flatten__()
        yield repr(context).encode()
        for name in names:
            yield from _content(getattr(tensor, name))
        return
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    if bits.ndim > 1 and bits.numel():
        bits = row_digests(bits.flatten(1))
    yield bits.cpu().numpy().tobytes()


def row_digests(rows: Tensor) -> Tensor:
    """Return the exclusive or over each row of ``[rows, integers]``, as ``[rows]``."""
    if rows.shape[1] * rows.element_size() % 8 == 0:
        rows = rows.view(torch.int64)  # eight bytes at a time; CUDA widens smaller types first
    if rows.device.type == "cpu":  # NumPy is many times faster there
        return torch.from_numpy(np.bitwise_xor.reduce(rows.numpy(), axis=1))
    return torch.hash_tensor(rows, dim=1).view(torch.int64)


def _named_content(file: Path) -> tuple[bytes, bytes]:
    return file.name.encode(), file.read_bytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # separates the parts
        digest.update(part)
    return digest.hexdigest()


def _unique() -> str:
    """Return a value that never matches another."""
    return uuid.uuid4().hex
