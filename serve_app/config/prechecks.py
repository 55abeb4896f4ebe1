"""The checks of an application's models that need no torch, before anything is started."""

import logging

from serve_app.config.model_files import check_model_folder
from serve_app.config.models import AppConfig
from serve_app.config.safety import check_safety
from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)


def check_models(config: AppConfig) -> None:
    """Check the files of every model, and that flagged images can be blocked if they should be.

    Raises:
        ConfigError: for the first mistake. With several models, it names the model.
    """
    for name, problem in _problems(config).items():
        raise _named(config, name, problem)


def check_some_model(config: AppConfig) -> None:
    """Check that one model can be started at least, and log the mistakes of the others.

    A folder that disappears must not take the other models down when the application is built
    again. The replicas of its own model fail with the same error.

    Raises:
        ConfigError: the first mistake, if every model has one.
    """
    problems = _problems(config)
    if len(problems) == len(config.ids):
        check_models(config)
    for name, problem in problems.items():
        logger.error(
            "%s It cannot start; the other models are served.", _named(config, name, problem)
        )


def _problems(config: AppConfig) -> dict[str, ConfigError]:
    """Return the first mistake of each model that has one, by the model's id."""
    found = {}
    for one in config.each_model():
        try:
            check_model_folder(one.model)
            check_safety(one)
        except ConfigError as error:
            found[one.model.id] = error
    return found


def _named(config: AppConfig, model: str, problem: ConfigError) -> ConfigError:
    return type(problem)(f"models, {model!r}: {problem}") if config.models else problem
