"""Every error that a user can meet, with its HTTP status and its code.

::

    DiffusionServeError                 500  internal_error
    ├── InvalidRequest                  400  invalid_value       names the field
    │   ├── ContentPolicyViolation      400  content_policy_violation
    │   ├── ModelNotFound               404  model_not_found
    │   ├── LoraNotFound                404  lora_not_found
    │   ├── InvalidLora                 400  invalid_lora        its file, or for another model
    │   ├── ImageNotFound               404  image_not_found     its link has expired, or never was
    │   ├── BodyTooLarge                413  body_too_large
    │   ├── UnsupportedEncoding         415  unsupported_encoding
    │   ├── BodyTooSlow                 408  body_too_slow
    │   ├── CrossSite                   403  cross_site          sent by another web site's page
    │   └── InvalidKey                  401  invalid_api_key
    ├── RateLimited                     429  rate_limit_exceeded one key's limit; try again later
    ├── Overloaded                      429  overloaded          every key's; try again later
    ├── Unavailable                     503  unavailable         try again later
    │   ├── StorageAway                 503  storage_unavailable only requests for links
    │   └── LoraSourceAway              503  lora_source_unavailable
    ├── DeadlineExceeded                504  deadline_exceeded
    ├── Cancelled                       499  cancelled           the client went away
    ├── GenerationFailed                500  generation_failed   only this request
    │   └── NotFinite                   500  generation_failed   its values are NaN or infinite
    └── ConfigError                     500  config_error        raised at start, never by a request
        └── ModelLoadError              500  model_load_error

The gateway maps these to responses at one place; the command line prints them and exits with 2.
"""

from typing import ClassVar


class DiffusionServeError(Exception):
    """An internal error of the server.

    All other errors derive from this class. ``param`` names the field of the request that is wrong,
    if there is one. ``retry_after_s`` is the time after which a retry may succeed, if a retry makes
    sense. `serve_app.gateway.retry_after` passes it on to the client.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self, message: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, param, retry_after_s)  # in ``args``, to survive pickling
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InvalidRequest(DiffusionServeError):
    """A field of the request has a value that this server does not accept. The error names it."""

    status = 400
    code = "invalid_value"
    type = "invalid_request_error"


class ContentPolicyViolation(InvalidRequest):
    """The safety checker flagged a generated image, and the configuration blocks such images."""

    code = "content_policy_violation"


class ModelNotFound(InvalidRequest):
    """The request names a model that this server does not serve, or that its key may not use."""

    status = 404
    code = "model_not_found"


class LoraNotFound(InvalidRequest):
    """The request names a LoRA adapter that this server does not have."""

    status = 404
    code = "lora_not_found"


class InvalidLora(InvalidRequest):
    """The request names a LoRA adapter whose file cannot be used, or was made for another model."""

    code = "invalid_lora"


class ImageNotFound(InvalidRequest):
    """There is no stored image of this name: its link has expired, or there was none."""

    status = 404
    code = "image_not_found"


class BodyTooLarge(InvalidRequest):
    """The body of the request is longer than the limit in the configuration."""

    status = 413
    code = "body_too_large"


class UnsupportedEncoding(InvalidRequest):
    """The body of the request is compressed, as its header Content-Encoding says."""

    status = 415
    code = "unsupported_encoding"


class BodyTooSlow(InvalidRequest):
    """The body of the request did not arrive in time."""

    status = 408
    code = "body_too_slow"


class CrossSite(InvalidRequest):
    """A page of another web site sent the request, and no Bearer key."""

    status = 403
    code = "cross_site"


class InvalidKey(InvalidRequest):
    """The server has API keys, and the request has none or an unknown one."""

    status = 401
    code = "invalid_api_key"


class RateLimited(DiffusionServeError):
    """The API key has reached its limit of requests per minute or at a time."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class Overloaded(DiffusionServeError):
    """The waiting work of all clients leaves no time for this request.

    ``work_s`` is the work of this request, in seconds, by which the next retry is delayed. It is 0
    if the request reached no engine, which could have estimated it.
    """

    status = 429
    code = "overloaded"
    type = "rate_limit_error"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        work_s: float = 0.0,
    ) -> None:
        super().__init__(message, param, retry_after_s)
        self.args = (message, param, retry_after_s, work_s)
        self.work_s = work_s


class DeadlineExceeded(DiffusionServeError):
    """The image was not done within the longest deadline of the server."""

    status = 504
    code = "deadline_exceeded"


class Unavailable(DiffusionServeError):
    """No replica can take the request now: none is ready, or the engine is closing."""

    status = 503
    code = "unavailable"


class StorageAway(Unavailable):
    """The storage of images takes or returns none now."""

    code = "storage_unavailable"


class LoraSourceAway(Unavailable):
    """The place of the LoRA adapters does not answer now."""

    code = "lora_source_unavailable"


class Cancelled(DiffusionServeError):
    """The request was cancelled before its image was done."""

    status = 499
    code = "cancelled"


class GenerationFailed(DiffusionServeError):
    """The pipeline raised an exception while it generated this image. Others are not affected."""

    code = "generation_failed"


class NotFinite(GenerationFailed):
    """The model's output has values that are NaN or infinite, so there is no image.

    Clients receive this message, because it names settings only. A retry would fail again.
    """


class ConfigError(DiffusionServeError):
    """A setting, file or argument is wrong, or cannot work on this machine. Raised at start."""

    code = "config_error"


class ModelLoadError(ConfigError):
    """The model in the configuration cannot be loaded."""

    code = "model_load_error"
