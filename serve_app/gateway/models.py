"""The models behind this gateway, and how a request finds its own.

Each model has a backend and an `ImageService`, which know no other model. To a request whose key
may use some of the models only, the others are as if they were not here.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import AppConfig
from serve_app.errors import DiffusionServeError, Unavailable
from serve_app.gateway.auth import Principal
from serve_app.gateway.model_names import ModelNames
from serve_app.gateway.requests_log import RequestRecord
from serve_app.gateway.service import ImageService
from serve_app.protocol.backend import GenerationBackend, ModelState


@dataclass(frozen=True)
class ServedModel:
    """One model: what generates its images, and what prepares their requests."""

    config: AppConfig
    """The configuration with this model alone."""
    backend: GenerationBackend
    service: ImageService

    @property
    def id(self) -> str:
        """Name of the model in the API."""
        return self.config.model.id


class ServedModels:
    """The models of one gateway replica, or those that a key may use, the default one first."""

    def __init__(self, config: AppConfig, models: Iterable[ServedModel]) -> None:
        self._config = config
        self._models = {one.id: one for one in models}
        self.names = ModelNames(config, tuple(self._models))

    @classmethod
    def create(
        cls, config: AppConfig, backends: GenerationBackend | Sequence[GenerationBackend]
    ) -> "ServedModels":
        """Make a service for each model.

        Args:
            config: the whole configuration.
            backends: one backend for each model, in the order of the configuration.
        """
        several = backends if isinstance(backends, Sequence) else [backends]
        return cls(
            config,
            (
                ServedModel(one, backend, ImageService(one, backend))
                for one, backend in zip(config.each_model(), several, strict=True)
            ),
        )

    def of(self, principal: Principal) -> "ServedModels":
        """Return the models that the key of a request may use, in the order of its entry.

        Names that this server does not have are left out, so that there may be none.
        """
        if principal.models is None:
            return self
        allowed = (self._models.get(name) for name in principal.models)
        return ServedModels(self._config, (one for one in allowed if one is not None))

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none.

        Raises:
            ModelNotFound: if there is none.
        """
        return self._models[self.names.default]

    @property
    def limits(self) -> LimitsConfig:
        """The largest value of each limit, for what is decided before the model is known."""
        limits = [one.config.engine.limits for one in self]
        return LimitsConfig(
            **{
                name: max(getattr(one, name) for one in limits)
                for name in type(limits[0]).model_fields
            }
        )

    def find(self, name: str) -> ServedModel:
        """Return the model that a name means.

        Raises:
            ModelNotFound: naming the models that are here.
        """
        return self._models[self.names.resolve(name)]

    def choose(self, name: str | None, record: RequestRecord) -> ServedModel:
        """Return the model of a request, and note it in the record.

        On a server with one model, its service checks the name, after the request's other fields.

        Raises:
            ModelNotFound: naming the models that are here.
        """
        single = len(self._config.ids) == 1
        chosen = self.default if name is None or single else self.find(name)
        record.model = chosen.id
        return chosen

    async def check_ready(self) -> None:
        """Raise `Unavailable` or `Overloaded` if no model can serve requests.

        A single model can if a replica can generate. One of several also can while it has no
        replicas because nobody needs one: a request starts it. It is not called here, since that
        would start it. The first model that can serve requests decides, without the others.
        """
        if len(self) == 1:
            await self.default.backend.check_ready()
            return
        checks = [asyncio.create_task(_readiness(one)) for one in self]
        try:
            for check in asyncio.as_completed(checks):
                _, ready = await check
                if ready:
                    return
        finally:
            for task in checks:
                task.cancel()
        states = [task.result()[0] for task in checks]
        each = ", ".join(
            f"{name!r} is {state}" for name, state in zip(self._models, states, strict=True)
        )
        raise Unavailable(f"no model can generate now: {each}; try again later.")


async def _readiness(model: ServedModel) -> tuple[ModelState, bool]:
    """Return the state of one of several models, and whether it can serve requests."""
    state = await model.backend.state()
    if state == "running":
        try:
            await model.backend.check_ready()
        except DiffusionServeError:
            return state, False
    return state, state in ("running", "at_zero")
