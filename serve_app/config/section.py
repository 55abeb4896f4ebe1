"""The base of all sections of a config."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a config: frozen, and unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")
