"""Loading of one LoRA file into the networks of a pipeline, and the checks of what it changed."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from serve_app.config.source import is_path
from serve_app.engine.device import is_out_of_memory
from serve_app.engine.model.networks import networks_of
from serve_app.engine.model.weights import name_keys
from serve_app.errors import ModelLoadError

if TYPE_CHECKING:
    from serve_app.engine.model.lora_coverage import LoraCoverage

logger = logging.getLogger(__name__)


def load_lora(pipeline: Any, what: str, source: str, key: str, allow_partial: bool) -> str:
    """Load a file as the adapter ``key``; return the used share, if it fits only in part.

    Its parts have the dtype of the layers, and no gradients. ``what`` names it in messages. A file
    that would change the model's own weights is rejected before it does.

    Raises:
        ModelLoadError: it cannot be loaded or does not fit. The networks may have layers of it.
    """
    # diffusers warns of each adapter that does not change the text encoder.
    logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
    # These import peft, which is slow and rarely needed.
    from serve_app.engine.model.lora_coverage import (
        changes_of_the_model,
        cover,
        expected_tensors,
        wrong_shapes,
    )

    expected: Mapping[str, Tensor] = {}
    try:
        expected = expected_tensors(pipeline, _located(source))
        if changed := changes_of_the_model(pipeline, expected):
            raise _changes_the_model(what, changed)
        pipeline.load_lora_weights(**_located(source), adapter_name=key, use_safetensors=True)
    except Exception as error:
        if isinstance(error, ModelLoadError) or is_out_of_memory(error):
            raise
        shapes = name_keys(wrong_shapes(pipeline, expected))
        reason = f"it was trained for another model: {shapes}" if shapes else error
        raise ModelLoadError(
            f"{what} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    coverage = cover(pipeline, expected, key)
    share = _used_share(what, type(pipeline).__name__, coverage, allow_partial)
    changed = [
        name
        for name in ("_transformer_norm_layers", "_overwritten_params")
        for network in networks_of(pipeline).values()
        if getattr(network, name, None)
    ]
    if changed:
        raise _changes_the_model(what, changed)
    for _, _, layer in lora_layers(pipeline):
        # The file may have another dtype than the model. Packed weights have bytes.
        dtype = layer.weight.dtype
        dtype = dtype if dtype.is_floating_point else pipeline.dtype
        for part in layer.adapter_layer_names:
            getattr(layer, part).to(dtype).requires_grad_(False)
    return share


def _changes_the_model(what: str, changed: Sequence[str]) -> ModelLoadError:
    return ModelLoadError(
        f"{what} changes the model itself, even for requests without it (a control LoRA of Flux "
        f"does), or was trained for another model: {name_keys(changed)}. Serve it as a separate "
        "model."
    )


def lora_layers(pipeline: Any) -> list[tuple[str, str, Any]]:
    """Return the layers with adapters: the component's name, the path in it and the layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import and rarely needed

    return [
        (name, path, layer)
        for name, network in networks_of(pipeline).items()
        for path, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]


def _used_share(what: str, pipeline: str, coverage: "LoraCoverage", allow_partial: bool) -> str:
    """Return the used share of an adapter that fits only in part, or an empty text.

    Raises:
        ModelLoadError: the adapter fits not at all, is incomplete, or may not be partial.
    """
    remedy = f"Use an adapter that was trained for this {pipeline}"
    count = len(coverage.used) + len(coverage.unused)
    if not coverage.used:
        raise ModelLoadError(
            f"{what} would change nothing: none of its {count} tensors fits the model. Its keys "
            f"are {name_keys(coverage.unused) or '(none)'}. Keys that fit begin with "
            f"{' or '.join(f'{part}.' for part in coverage.parts)}. {remedy}."
        )
    if coverage.unfilled:
        raise ModelLoadError(
            f"{what} is incomplete: {len(coverage.unfilled)} tensors of the layers that it changes "
            f"are missing: {name_keys(coverage.unfilled)}. Copy or download the file again."
        )
    if not coverage.unused:
        return ""
    share = f"{len(coverage.used)} of its {count} tensors are used"
    if not allow_partial:
        raise ModelLoadError(
            f"{what} fits the model only in part: {share}. No layer takes "
            f"{name_keys(coverage.unused)}. {remedy}, or set model.partial_loras to true."
        )
    logger.warning("%s fits only in part: %s", what, share)
    return share


def _located(source: str) -> dict[str, str]:
    """Return diffusers' arguments for a source: a folder or repository, and maybe a file."""
    if is_path(source):
        # Not resolved: in the hub's cache only the link has the name; its target is a hash.
        path = Path(source).expanduser().absolute()
        where, file = str(path.parent), path.name
    else:
        owner, name, *rest = source.split("/", 2)
        where, file = f"{owner}/{name}", "".join(rest)
    return {"pretrained_model_name_or_path_or_dict": where} | (
        {"weight_name": file} if file else {}
    )
