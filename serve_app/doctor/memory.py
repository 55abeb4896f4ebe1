"""Checks of memory: whether the weights and Ray's object store fit."""

import shutil
from pathlib import Path

import psutil

from serve_app.config.models import ModelConfig
from serve_app.doctor import weights
from serve_app.doctor.gpus import Place
from serve_app.doctor.report import Finding, failed, gib, ok, warning

_ROOM = 0.8
"""Share of the free memory for weights; the rest is for running requests and decoding."""


def check_memory(
    check: str,
    model: ModelConfig,
    parts: list[weights.Component],
    memory: tuple[int, int] | None,
    on_gpu: bool,
) -> Finding:
    """Compare the weights with the memory. If they fit, the model starts; batches may be small."""
    needed = weights.needed_bytes(parts, model, on_gpu)
    found = f"{model.id}'s weights take {gib(needed)}"
    if memory is None:
        return warning(check, f"{found}; the available memory is unknown", "Compare them yourself.")
    total, free = memory
    found += f", {gib(free)} of {gib(total)} are free"
    if needed > total:
        return failed(check, found, f"They cannot fit. {_smaller(model, parts, total, on_gpu)}")
    if needed > free:
        return failed(
            check,
            found,
            "Other processes use the missing memory: end them. "
            + ("`nvidia-smi` lists them." if on_gpu else "`top -o %MEM` lists them."),
        )
    if needed > _ROOM * free:
        return warning(
            check,
            found,
            f"Little is left for images: keep engine.max_batch_size and limits.max_pixels low. "
            f"{_smaller(model, parts, int(_ROOM * free), on_gpu)}",
        )
    return ok(check, found)


def _smaller(
    model: ModelConfig, parts: list[weights.Component], limit_bytes: int, on_gpu: bool
) -> str:
    """Name the changes of the configuration that make the weights fit into ``limit_bytes``."""
    if not on_gpu:
        return "Take a machine with more memory, raise the container's limit, or a smaller model."
    options = []
    changes: tuple[dict[str, str], ...] = (
        {},  # only the dtype
        {"offload": "model"},
        {"quantize": "int8"},
        {"offload": "model", "quantize": "int8"},
    )
    for speed in changes:
        if "quantize" in speed and any(part.quantized for part in parts):
            continue  # they are small already, and torchao does not take them
        other = model.model_copy(
            update={
                "dtype": "bfloat16" if model.dtype == "float32" else model.dtype,
                "speed": model.speed.model_copy(update=speed),
            }
        )
        if other == model:
            continue
        needed = weights.needed_bytes(parts, other, on_gpu)
        if needed <= limit_bytes:
            names = [f"model.speed.{name}: {value}" for name, value in speed.items()]
            if other.dtype != model.dtype:
                names.insert(0, f"model.dtype: {other.dtype}")
            options.append(f"{' and '.join(names)} ({gib(needed)})")
    larger = "a GPU with more memory"
    return f"Take {larger}, or set " + ", or ".join(options) + "." if options else f"Take {larger}."


def check_shared_memory(
    memory_bytes: int, place: Place, folder: Path = Path("/dev/shm")
) -> Finding:
    """Check the room for Ray's object store, sized as Ray 2.60's `resolve_object_store_memory`."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    store = int(min(0.3 * memory_bytes, 200e9, max(10e9, 0.95 * free)))
    found = f"{folder} has {gib(free)}, Ray's object store needs {gib(store)}"
    if free >= store:
        return ok("shared memory", found)
    if place.kubernetes:
        advice = (
            "KubeRay mounts it in Ray's pods. In other pods mount a volume there:\n"
            "  volumes: [{name: shm, emptyDir: {medium: Memory}}]\n"
            "  volumeMounts: [{name: shm, mountPath: /dev/shm}]"
        )
    elif place.container:
        advice = (
            f"Start the container with `docker run --shm-size={-(-store * 11 // 10 // 2**30)}g`."
        )
    else:
        advice = "`sudo mount -o remount,size=50% /dev/shm`, or delete files there."
    return warning("shared memory", f"{found}: it will use the disk instead", advice)


_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of both cgroup versions: limit, use, and the part of the use that is freeable cache."""


def read_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return (total, free) bytes of the machine, or of the container's share of it."""
    memory = psutil.virtual_memory()
    for limit_file, use_file, stat_file, cached in _CGROUP_FILES:
        limit_path = cgroup / limit_file
        if limit_path.is_file() and (text := limit_path.read_text().strip()).isdecimal():
            limit = int(text)
            lines = (cgroup / stat_file).read_text().splitlines()
            stat = dict(line.split() for line in lines)
            used = int((cgroup / use_file).read_text()) - int(stat.get(cached, 0))
            return min(memory.total, limit), min(memory.available, max(limit - used, 0))
    return memory.total, memory.available
