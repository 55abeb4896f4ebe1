"""The names by which clients may ask for a model."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from serve_app.config.models import AppConfig
from serve_app.errors import ModelNotFound


class ModelNames:
    """The names of the models, their aliases, and others if any name is accepted."""

    def __init__(self, config: AppConfig, ids: Sequence[str]) -> None:
        """Keep the names of the models with these ids; the others are as if they were not here."""
        aliases = config.gateway.model_aliases.items()
        self._ids = ids
        self._aliases = {alias: model for alias, model in aliases if model in ids}
        self._any = config.gateway.any_model

    @property
    def default(self) -> str:
        """The id of the model of requests that name none.

        Raises:
            ModelNotFound: if there is no model, because the request's key may use none of them.
        """
        if not self._ids:
            raise ModelNotFound(
                "this API key may use no model of this server; the server's operator can correct "
                "'models' of its entry.",
                "model",
            )
        return self._ids[0]

    def check(self, name: str) -> tuple[str, ...]:
        """Return a warning if the name is only accepted as every name is.

        Raises:
            ModelNotFound: naming the models that are here.
        """
        model = self.resolve(name)
        if self._known(name) is not None:
            return ()
        return (f"model is {name[:100]!r}; the model here is {model!r}.",)

    def resolve(self, name: str) -> str:
        """Return the id of the model that a name means.

        An alias without ``*`` goes before one with it. Of several with it that fit, the first one
        counts. A name that is only accepted because every name is means the first model.

        Raises:
            ModelNotFound: naming the models that are here.
        """
        found = self._known(name)
        if found is not None:
            return found
        if self._any or not self._ids:
            return self.default
        here = ", ".join(map(repr, self._ids))
        aliases = f", also as {', '.join(map(repr, self._aliases))}" if self._aliases else ""
        are = "is" if len(self._ids) == 1 else "are"
        raise ModelNotFound(f"no model {name[:100]!r} here; there {are} {here}{aliases}.", "model")

    def _known(self, name: str) -> str | None:
        if name in self._ids:
            return name
        if name in self._aliases:
            return self._aliases[name]
        fitting = (one for alias, one in self._aliases.items() if fnmatchcase(name, alias))
        return next(fitting, None)
