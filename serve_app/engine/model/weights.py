"""Comparison of the weights in a model's files with the weights that its networks need.

diffusers and transformers only log that a weight is missing, and then continue with random values
or none. What they return about each network is compared here instead.
"""

import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders import single_file_model, single_file_utils
from torch import Tensor, nn
from transformers import PreTrainedModel

from serve_app.config.models import ModelConfig
from serve_app.config.safetensors_header import read_header
from serve_app.errors import ModelLoadError

logger = logging.getLogger(__name__)

_NAMED_KEYS = 5
"""Most keys in a message. Usually the first ones show what is wrong."""

_recording = threading.Lock()


@dataclass(frozen=True)
class WeightsReport:
    """The difference between the files of one network and the network.

    Attributes:
        component: name of the component's folder, with its class.
        needed: number of tensors that the network needs.
        missing: keys of tensors that no file has.
        mismatched: keys of tensors of another shape, each with both shapes.
        unexpected: keys in the files that the network does not use.
    """

    component: str
    needed: int
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]


@contextmanager
def record_weights() -> Iterator[list[WeightsReport]]:
    """Collect a report of each network that is read inside the context.

    Pipelines do not pass on the option ``output_loading_info`` of their networks, so
    ``from_pretrained`` of both libraries sets it meanwhile. Networks of a single file pass
    through one function of diffusers, which its two modules of such files import.
    """
    reports: list[WeightsReport] = []
    bases = (ModelMixin, PreTrainedModel)
    with _recording:
        fill = single_file_utils.load_model_dict_into_meta
        originals = [vars(base)["from_pretrained"] for base in bases]
        for base, original in zip(bases, originals, strict=True):
            base.from_pretrained = classmethod(_reporting(original.__func__, reports))
        for module in (single_file_utils, single_file_model):
            module.load_model_dict_into_meta = _reporting_fill(fill, reports)
        try:
            yield reports
        finally:
            for base, original in zip(bases, originals, strict=True):
                base.from_pretrained = original
            for module in (single_file_utils, single_file_model):
                module.load_model_dict_into_meta = fill


def _reporting_fill(fill: Callable[..., Any], reports: list[WeightsReport]) -> Callable[..., Any]:
    def load_model_dict_into_meta(
        network: nn.Module, tensors: dict[str, Tensor], **options: Any
    ) -> Any:
        # Before it reads: it refuses a wrong shape, and leaves missing weights without data.
        needed = network.state_dict()
        shapes = {
            key: (tuple(getattr(tensor, "quant_shape", tensor.shape)), tuple(needed[key].shape))
            for key, tensor in tensors.items()
            if key in needed
        }
        info = {
            "missing_keys": needed.keys() - tensors.keys(),
            "unexpected_keys": tensors.keys() - needed.keys(),
            "mismatched_keys": [(key, *two) for key, two in shapes.items() if two[0] != two[1]],
        }
        reports.append(_report(type(network).__name__, network, info, check_meta=False))
        return fill(network, tensors, **options)

    return load_model_dict_into_meta


def _reporting(read: Callable[..., Any], reports: list[WeightsReport]) -> Callable[..., Any]:
    def from_pretrained(cls: type, source: object, *args: Any, **kwargs: Any) -> Any:
        # The libraries refuse a wrong shape with reference to their log. The report names the key.
        # Quantized weights have shapes of their own, which diffusers would take for wrong ones.
        options = kwargs | {
            "output_loading_info": True,
            "ignore_mismatched_sizes": not _is_quantized(cls, source, kwargs),
            "use_safetensors": True,
        }
        name = f"{Path(str(source)).name} ({cls.__name__})"
        try:
            network, info = read(cls, source, *args, **options)
        except NotImplementedError:
            # A tensor that was not read cannot be moved to a device. On the CPU, nothing is moved.
            network, info = read(cls, source, *args, **(options | {"device_map": None}))
            reports.append(_report(name, network, info, check_meta=True))
            raise
        except Exception as error:
            check_files(Path(str(source)), error)
            raise
        # With a device map, even the device may be that of tensors without data.
        reports.append(_report(name, network, info, kwargs.get("device_map") is None))
        return (network, info) if kwargs.get("output_loading_info") else network

    return from_pretrained


def _is_quantized(cls: Any, source: object, options: dict[str, Any]) -> bool:
    """Return whether a network of diffusers has quantized weights in its files."""
    if not issubclass(cls, ModelMixin):
        return False
    names = ("subfolder", "revision", "local_files_only")
    found = {name: options[name] for name in names if options.get(name) is not None}
    return cls.load_config(source, **found).get("quantization_config") is not None


def _report(
    component: str, network: nn.Module, info: dict[str, Any], check_meta: bool
) -> WeightsReport:
    tensors = network.state_dict()
    mismatched = {key: (found, needed) for key, found, needed in info["mismatched_keys"]}
    missing = set(info["missing_keys"])
    if isinstance(network, ModelMixin):  # transformers has lists of keys that may be missing
        buffers = dict(network.named_buffers())
        missing = {key for key in missing if key not in buffers or not _is_computed(buffers, key)}
    if check_meta:
        # An index of several files may name a tensor that its file does not have.
        missing |= {key for key, tensor in tensors.items() if tensor.is_meta}
    return WeightsReport(
        component,
        needed=len(tensors),
        missing=tuple(sorted(missing - mismatched.keys())),
        mismatched=tuple(
            f"{key} is {list(found)}, needed is {list(needed)}"
            for key, (found, needed) in sorted(mismatched.items())
        ),
        unexpected=tuple(sorted(info["unexpected_keys"])),
    )


def _is_computed(buffers: dict[str, Tensor], key: str) -> bool:
    """Return True if a network computes this buffer itself, as a table of positions.

    Statistics of a norm, or of latents, are learned. Without a file they are all zero or all one.
    """
    buffer = buffers[key]
    if key.endswith("num_batches_tracked"):
        return True  # only training reads it
    return not buffer.is_meta and bool((buffer != buffer.flatten()[0]).any())


def check_files(folder: Path, error: Exception) -> None:
    """Reject files of a component that are not whole, after ``error`` ended its reading.

    Files of a folder were checked before; those of a repository came only now.

    Raises:
        ModelLoadError: a file is not in the safetensors format or was cut short.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            read_header(file)
        except ModelLoadError as problem:
            raise problem from error


def check_weights(model: ModelConfig, reports: Collection[WeightsReport]) -> None:
    """Reject networks whose files do not have all their weights, and log what is left over.

    Raises:
        ModelLoadError: a weight is missing, or has another shape.
    """
    problems = [
        f"{report.component}: {len(keys)} of {report.needed} tensors {what}: {name_keys(keys)}"
        for report in reports
        for keys, what in (
            (report.missing, "are missing in the files"),
            (report.mismatched, "have another shape than config.json asks for"),
        )
        if keys
    ]
    if problems:
        raise ModelLoadError(
            f"model {model.id!r}: the weights in {model.source} do not fit the model. "
            f"{'. '.join(problems)}. Copy or download these components again, with the "
            "config.json that belongs to them."
        )
    for report in reports:
        if report.unexpected:
            logger.warning(
                "model %s: %s does not use %d tensors in its files: %s",
                model.id,
                report.component,
                len(report.unexpected),
                name_keys(report.unexpected),
            )


def name_keys(keys: Collection[str]) -> str:
    """Return the first keys, and the number of the others."""
    ordered = sorted(keys, key=lambda key: [int(p) if p.isdigit() else p for p in _split(key)])
    named = ", ".join(ordered[:_NAMED_KEYS])
    others = len(ordered) - _NAMED_KEYS
    return f"{named} and {others} more" if others > 0 else named


def _split(key: str) -> list[str]:
    """Split digits from text, so that layer 2 comes before layer 10."""
    return re.split(r"(\d+)", key)
