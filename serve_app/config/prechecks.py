"""The checks of an application's models that need no torch, before anything is started."""

import logging
from collections.abc import Sequence

from serve_app.config.model_files import check_model_folder
from serve_app.config.models import AppConfig
from serve_app.config.safety import check_safety
from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)


def check_models(config: AppConfig) -> None:
    """Check the files of every model, and that flagged images can be blocked if they should be.

    Raises:
        ConfigError: the first mistake of each model that has one.
    """
    _raise_all(_problems(config))


def check_some_model(config: AppConfig) -> None:
    """Check that one model can be started at least, and log the mistakes of the others.

    A folder that disappears must not take the other models down when the application is built
    again. The replicas of its own model fail with the same error.

    Raises:
        ConfigError: the first mistake of each model, if every model has one.
    """
    problems = _problems(config)
    if len(problems) == len(config.ids):
        _raise_all(problems)
    for problem in problems:
        logger.error("%s It cannot start; the other models are served.", problem)


def _problems(config: AppConfig) -> list[ConfigError]:
    """Return the first mistake of each model that has one. Of several models, it names its own."""
    found = []
    for one in config.each_model():
        try:
            check_model_folder(one.model)
            check_safety(one)
        except ConfigError as error:
            name = f"model {one.model.id!r}"
            named = name in str(error) or not config.models
            found.append(error if named else type(error)(f"{name}: {error}"))
    return found


def _raise_all(problems: Sequence[ConfigError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} models are wrong:{lines}")
