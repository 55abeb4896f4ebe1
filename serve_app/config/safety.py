"""Blocking needs a safety checker: the check before a start, and its error."""

from pathlib import Path

from serve_app.config.model_index import read_model_index
from serve_app.config.models import AppConfig, ModelConfig
from serve_app.errors import ConfigError

SAFETY_CHECKER = "safety_checker"
"""Component name under which diffusers keeps a network that judges images."""


def check_safety(config: AppConfig) -> None:
    """Check that a local model has a safety checker, if flagged images are to be blocked.

    A repository of the hub is checked when it is loaded.

    Raises:
        ConfigError: it has none, so that no image would ever be blocked.
    """
    model = config.model
    if config.gateway.safety != "block":
        return
    if SAFETY_CHECKER in model.components:
        found = model.components[SAFETY_CHECKER] is not None
    elif model.is_single_file:
        found = False  # such files hold none
    elif not model.is_local:
        return
    else:
        index = Path(model.source) / "model_index.json"
        found = SAFETY_CHECKER in read_model_index(model, index)
    if not found:
        raise no_safety_checker(model)


def no_safety_checker(model: ModelConfig) -> ConfigError:
    """Return the error for a model without a safety checker whose images are to be blocked."""
    return ConfigError(
        f"gateway.safety is 'block', but the model {model.id!r} has no safety checker, so no image "
        f"would be blocked. Serve a model whose model_index.json names a {SAFETY_CHECKER}, name "
        f"one in model.components.{SAFETY_CHECKER}, or set gateway.safety to 'flag' or 'off' and "
        "check the images elsewhere."
    )
