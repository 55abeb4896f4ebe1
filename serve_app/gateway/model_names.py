"""The names by which clients may ask for the model."""

from fnmatch import fnmatchcase

from serve_app.config.models import AppConfig
from serve_app.errors import ModelNotFound


class ModelNames:
    """The served model's own name, its aliases, and others if any name is accepted."""

    def __init__(self, config: AppConfig) -> None:
        self._own = config.model.id
        self._aliases = tuple(config.gateway.model_aliases)
        self._any = config.gateway.any_model

    def check(self, name: str) -> tuple[str, ...]:
        """Return a warning if the name is only accepted as every name is.

        Raises:
            ModelNotFound: naming the model that is here.
        """
        if name == self._own or any(fnmatchcase(name, alias) for alias in self._aliases):
            return ()
        shown = name[:100]
        if self._any:
            return (f"model is {shown!r}; the model here is {self._own!r}.",)
        aliases = f", also as {', '.join(map(repr, self._aliases))}" if self._aliases else ""
        raise ModelNotFound(f"no model {shown!r} here; there is {self._own!r}{aliases}.", "model")
