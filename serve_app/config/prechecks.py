"""The checks of an application's models that need no torch, before anything is started."""

from serve_app.config.model_files import check_model_folder
from serve_app.config.models import AppConfig
from serve_app.config.safety import check_safety
from serve_app.errors import ConfigError


def check_models(config: AppConfig) -> None:
    """Check the files of every model, and that flagged images can be blocked if they should be.

    Raises:
        ConfigError: for the first mistake. With several models, it names the model.
    """
    for one in config.each_model():
        try:
            check_model_folder(one.model)
            check_safety(one)
        except ConfigError as error:
            if not config.models:
                raise
            raise type(error)(f"models, {one.model.id!r}: {error}") from None
