"""LoRA adapters: loaded once, switched between calls.

The active adapters are a property of the shared networks. So only requests with the same adapters
at the same scales may share a call; see `AdapterSet`.
"""

import logging
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from serve_app.config.source import is_path
from serve_app.engine.model.weights import name_keys
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import AdapterSet

if TYPE_CHECKING:
    from serve_app.engine.model.lora_coverage import LoraCoverage


logger = logging.getLogger(__name__)


class Adapters:
    """The adapters in the networks of one pipeline; used by the thread that runs them.

    Attributes:
        names: names of all adapters.
        partial: for each adapter that fits only in part, the share of it that is used.
    """

    def __init__(
        self,
        pipeline: Any,
        networks: Collection[nn.Module],
        loras: Mapping[str, str],
        allow_partial: bool = False,
    ) -> None:
        """Load ``loras`` into the pipeline's networks, and switch all of them off.

        Raises:
            ModelLoadError: an adapter cannot be loaded or does not fit; the message names it.
        """
        self.names = tuple(loras)
        self.partial: dict[str, str] = {}
        self._keys = {name: f"lora_{index}" for index, name in enumerate(loras)}
        self._layers: list[Any] = []
        self._active: AdapterSet = ()
        if not loras:
            return
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelLoadError(
                f"model.loras: {type(pipeline).__name__} takes no LoRA adapters. Remove them."
            )
        # diffusers warns of each adapter that does not change the text encoder.
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
        # These import peft, which is slow and rarely needed.
        from serve_app.engine.model.lora_coverage import cover, expected_tensors, wrong_shapes

        for name, source in loras.items():
            expected: dict[str, Tensor] = {}
            try:
                expected = expected_tensors(pipeline, _located(source))
                with warnings.catch_warnings(action="ignore"):  # for each adapter after the first
                    pipeline.load_lora_weights(
                        **_located(source), adapter_name=self._keys[name], use_safetensors=True
                    )
            except Exception as error:
                shapes = name_keys(wrong_shapes(pipeline, expected))
                reason = f"it was trained for another model: {shapes}" if shapes else error
                raise ModelLoadError(
                    f"model.loras: {name!r} cannot be loaded from {source}: "
                    f"{type(error).__name__}: {reason}"
                ) from error
            coverage = cover(pipeline, expected, self._keys[name])
            what = f"model.loras: {name!r} ({source})"
            share = _used_share(what, type(pipeline).__name__, coverage, allow_partial)
            if share:
                self.partial[name] = share
        changed = [
            name
            for name in ("_transformer_norm_layers", "_overwritten_params")
            for network in networks
            if getattr(network, name, None)
        ]
        if changed:
            raise ModelLoadError(
                "model.loras: an adapter changes the model itself, even for requests without it "
                "(a control LoRA of Flux does). Serve it as a separate model."
            )
        from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import and rarely needed

        for network in networks:
            for layer in network.modules():
                if isinstance(layer, BaseTunerLayer):
                    self._layers.append(layer)
                    # The file may have another dtype than the model. Packed weights have bytes.
                    dtype = layer.weight.dtype
                    dtype = dtype if dtype.is_floating_point else pipeline.dtype
                    for part in layer.adapter_layer_names:
                        getattr(layer, part).to(dtype).requires_grad_(False)
        self._set(())

    @property
    def layer_count(self) -> int:
        """Number of layers that have adapters."""
        return len(self._layers)

    @property
    def active(self) -> AdapterSet:
        """Adapters that the next call uses, with their scales."""
        return self._active

    def switch(self, wanted: AdapterSet) -> bool:
        """Activate exactly these adapters; return True if others were active.

        Costs a few microseconds per layer that has adapters.
        """
        if wanted == self._active:
            return False
        self._set(wanted)
        return True

    def _set(self, wanted: AdapterSet) -> None:
        keys = [self._keys[name] for name, _ in wanted]
        for layer in self._layers:
            # Not by set_adapter, which visits the gradients of every weight: ten times slower.
            layer._active_adapter = keys
            for key, (_, scale) in zip(keys, wanted, strict=True):
                layer.set_scale(key, scale)
        self._active = wanted


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
