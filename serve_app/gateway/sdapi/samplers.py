"""Names of samplers and schedulers, as clients know them, for this server's noise schedulers."""

from serve_app.errors import InvalidRequest
from serve_app.gateway.errors import MOST_SHOWN
from serve_app.protocol.params import ModelInfo

AUTOMATIC = "Automatic"
"""The model's own noise scheduler, and its own spacing of the noise levels."""

SAMPLERS: dict[str, str] = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm++": "DPM++ 2M",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "ddpm": "DDPM",
}
"""Samplers by the names of noise schedulers."""

ALIASES: dict[str, tuple[str, ...]] = {
    "euler": ("k_euler",),
    "euler_a": ("k_euler_a", "k_euler_ancestral"),
    "heun": ("k_heun",),
    "dpm++": ("k_dpmpp_2m",),
}
"""Further names of samplers."""

SPACINGS: dict[str, str] = {"karras": "Karras"}
"""Schedulers by the endings of noise schedulers, as in ``dpm++_karras``."""

_OWN_SPACINGS = ("normal", "simple", "uniform")
"""Schedulers that say no more than the default. Clients send them without being asked."""


def sampler_names(model: ModelInfo) -> dict[str, str]:
    """Return the samplers that a model offers, with their noise schedulers."""
    return {SAMPLERS[name]: name for name in model.noise_schedulers if name in SAMPLERS}


def spacing_names(model: ModelInfo) -> dict[str, str]:
    """Return the spacings that a model offers with at least one sampler, by their endings."""
    return {
        ending: name
        for ending, name in SPACINGS.items()
        if any(offered.endswith(f"_{ending}") for offered in model.noise_schedulers)
    }


def sampler_of(noise_scheduler: str | None) -> tuple[str, str]:
    """Return the sampler and the scheduler of a noise scheduler."""
    if noise_scheduler is None:
        return AUTOMATIC, AUTOMATIC
    base, _, ending = noise_scheduler.partition("_")
    if ending in SPACINGS:
        return SAMPLERS[base], SPACINGS[ending]
    return SAMPLERS[noise_scheduler], AUTOMATIC


def noise_scheduler_of(
    sampler: str | None, spacing: str | None, model: ModelInfo
) -> tuple[str | None, list[str]]:
    """Return the noise scheduler of a sampler and a scheduler, and warnings.

    Both names may be in any case. The sampler may end in that of the scheduler, as clients wrote it
    once: ``DPM++ 2M Karras``. ``None`` is the model's own noise scheduler.

    Raises:
        InvalidRequest: naming what the model offers.
    """
    name = (sampler or "").strip().lower()
    ending = (spacing or "").strip().lower()
    for of_name in SPACINGS:
        if name.endswith(f" {of_name}"):
            name, ending = name.removesuffix(f" {of_name}"), of_name
    warnings = []
    if ending in _OWN_SPACINGS:
        warnings.append(f"scheduler {ending!r} has no effect here: the model's own is used.")
        ending = ""
    if ending == AUTOMATIC.lower():
        ending = ""
    base = _base(name, sampler, model)
    if not ending:
        return base, warnings
    found = f"{base}_{ending}"
    if base is None or ending not in SPACINGS or found not in model.noise_schedulers:
        offered = [
            f"{SPACINGS[ending]} with {SAMPLERS[base]}"
            for base in SAMPLERS
            for ending in SPACINGS
            if f"{base}_{ending}" in model.noise_schedulers
        ]
        raise InvalidRequest(
            f"scheduler {(spacing or ending)[:MOST_SHOWN]!r} is not offered with the sampler "
            f"{(sampler or AUTOMATIC)[:MOST_SHOWN]!r}; there are "
            f"{', '.join([AUTOMATIC, *offered])}.",
            "scheduler",
        )
    return found, warnings


def _base(name: str, given: str | None, model: ModelInfo) -> str | None:
    if name in ("", AUTOMATIC.lower()):
        return None
    for sampler, noise_scheduler in sampler_names(model).items():
        if name in (sampler.lower(), noise_scheduler, *ALIASES.get(noise_scheduler, ())):
            return noise_scheduler
    offered = ", ".join([AUTOMATIC, *sampler_names(model)])
    raise InvalidRequest(
        f"no sampler {(given or '')[:MOST_SHOWN]!r} here; there are {offered}.", "sampler_name"
    )
