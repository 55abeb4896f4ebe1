"""Every parameter of OpenAI's client is honoured, gets a warning, or is a documented error.

The client is the installed one, over HTTP. A new version with a parameter or a value that
docs/guide/openai.md does not list fails here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import openai
import pytest
from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import AppConfig, EngineConfig, ModelConfig
from serve_app.protocol.images import Encoding
from serve_app.protocol.params import ModelInfo
from tests.fakes.backend import INFO, FakeBackend
from tests.gateway.openai_client import COLORS, Api, Outcome, png, send, send_json, served
from tests.gateway.openai_parameters import Method, Row, documented_rows, parameters_of

LIMITS = LimitsConfig(max_pixels=1024 * 1536, max_images=4)
"""Some of OpenAI's sizes fit, and some do not."""

SIZES = {"within": ("48x32", "1024x1024"), "beyond": ("63x64", "4096x4096", "1792x1024")}


class Backend(FakeBackend):
    """A backend whose model generates images of OpenAI's sizes."""

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        return replace(await super().describe(deadline_s), limits=LIMITS)


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    config = AppConfig(model=ModelConfig(id=INFO.id), engine=EngineConfig(limits=LIMITS))
    with served(config, Backend()) as found:
        yield found


@dataclass(frozen=True)
class Sample:
    """A value of a parameter, and what goes with it."""

    value: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    streams: tuple[bool, ...] = (False, True)


def _samples(*values: Any, **others: Any) -> list[Sample]:
    return [Sample(value, others) for value in values]


def _only(stream: bool, *values: Any, **others: Any) -> list[Sample]:
    return [Sample(value, others, (stream,)) for value in values]


KINDS: dict[tuple[str, str], list[Sample]] = {
    ("frame_count", "number"): _samples(2, 16),
    ("frame_duration_ms", "number"): _samples(200),
    ("image", "file"): _samples(png()),
    ("image", "list of one file"): _samples([png()]),
    ("image", "list of two files"): _samples([png(), png()], [png()] * 16),
    ("markup", "file"): _samples(png("transparent")),
    ("mask", "file"): _samples(png("transparent")),
    ("model", "name of the model"): _samples(INFO.id),
    ("model", "another name"): _samples("gpt-image-9"),
    ("n", "number"): _samples(1) + _only(False, 2, 4),
    ("n", "too large number"): _only(False, 5, 10),
    ("n", "over 1 with `stream`"): _only(True, 2),
    ("output_compression", "number for JPEG or WebP"): _samples(0, 60, 100, output_format="jpeg")
    + _samples(0, 60, 100, output_format="webp"),
    ("output_compression", "100 for PNG"): _samples(100) + _samples(100, output_format="png"),
    ("output_compression", "less for PNG"): _samples(0, 99, output_format="png"),
    ("partial_images", "0"): _samples(0),
    ("partial_images", "1 to 3 with `stream`"): _only(True, 1, 2, 3),
    ("partial_images", "1 to 3 without `stream`"): _only(False, 1, 2, 3),
    ("prompt", "text"): _samples("a cat", "Straße 東京 \N{DOG}"),
    ("prompt", "too long text"): _samples("x" * (LIMITS.max_prompt_chars + 1)),
    ("safety_identifier", "text"): _samples("user-1234"),
    ("size", "size within the limits"): _samples(*SIZES["within"]),
    ("size", "another size"): _samples(*SIZES["beyond"]),
    ("svg", "object"): _samples({"model": "gpt-6", "reasoning": {"effort": "low"}}),
    ("user", "text"): _samples("user-1234"),
}
"""Values for the table's descriptions of values."""


def _all_equal(found: list[Any], expected: list[Any]) -> None:
    assert found == expected


def _compressed(value: int, outcome: Outcome) -> None:
    [image], [file] = outcome.images, outcome.files
    name = str(image.format).lower()
    plain = Image.new("RGB", image.size, "red")
    assert file == Encoding(name, value).encode(plain)  # type: ignore[arg-type]
    if name != "png":
        assert file != Encoding(name, 95).encode(plain)  # type: ignore[arg-type]


HONOURED: dict[str, Callable[[Any, Outcome], None]] = {
    "background": lambda value, outcome: _all_equal(
        [outcome.answer.background, outcome.images[0].mode], ["opaque", "RGB"]
    ),
    "image": lambda value, outcome: _all_equal(
        [params.image and params.image.getpixel((5, 5)) for params in outcome.received],
        [COLORS["blue"]],
    ),
    "mask": lambda value, outcome: _all_equal(
        [params.mask_image and params.mask_image.getextrema() for params in outcome.received],
        [(255, 255)],
    ),
    "model": lambda value, outcome: _all_equal([len(outcome.files)], [1]),
    "moderation": lambda value, outcome: _all_equal([len(outcome.files)], [1]),
    "n": lambda value, outcome: _all_equal([len(outcome.files)], [value]),
    "output_compression": _compressed,
    "output_format": lambda value, outcome: _all_equal(
        [outcome.answer.output_format, str(outcome.images[0].format).lower()], [value, value]
    ),
    "partial_images": lambda value, outcome: _all_equal(
        [sum(name.endswith(".partial_image") for name in outcome.events)], [value]
    ),
    "prompt": lambda value, outcome: _all_equal(
        [params.prompt for params in outcome.received], [value]
    ),
    "quality": lambda value, outcome: _all_equal(
        [outcome.received[0].num_inference_steps, outcome.answer.quality],
        [
            {"low": 10, "high": 40, "hd": 40, "xhigh": 60, "max": 80}.get(value, 20),
            {"auto": "medium", "standard": "medium", "hd": "high"}.get(value, value),
        ],
    ),
    "safety_identifier": lambda value, outcome: _all_equal(
        [outcome.answer.safety_identifier], [value]
    ),
    "response_format": lambda value, outcome: _all_equal(
        [image.url for image in getattr(outcome.answer, "data", [])], [None] * (not outcome.events)
    ),
    "size": lambda value, outcome: _all_equal(
        ["{}x{}".format(*outcome.images[0].size), outcome.answer.size],
        ["64x64" if value == "auto" else value] * 2,
    ),
    "stream": lambda value, outcome: _all_equal([bool(outcome.events)], [value]),
    "user": lambda value, outcome: _all_equal([outcome.answer.safety_identifier], [value]),
}
"""Checks that an answer is as requested, by the parameter."""


def check(row_result: str, name: str, value: Any, outcome: Outcome) -> None:
    """Check that an outcome is what the table has."""
    if row_result in ("400", "404"):
        assert str(outcome.status) == row_result, outcome
        assert outcome.error["param"] == name
        assert name in outcome.error["message"] or row_result == "404"
        assert "unknown field" not in outcome.error["message"]
        assert outcome.received == []
        return
    assert outcome.status == 200, outcome.error
    type(outcome.answer).model_validate(outcome.answer.to_dict())  # the client does not check
    assert all(image.size for image in outcome.images)
    about = [text for text in outcome.answer.warnings if text.startswith(f"{name} has no effect")]
    if row_result == "warning":
        assert len(about) == 1
        return
    assert row_result == "honoured"
    assert about == []
    HONOURED[name](value, outcome)


def rows_of(method: Method, name: str) -> list[Row]:
    return [
        row for row in documented_rows() if row.parameter == name and row.results[method] != "-"
    ]


EACH = [(method, name) for method in get_args(Method) for name in parameters_of(method)]


def test_the_parameters_of_the_client_are_found() -> None:
    assert parameters_of("generate")["quality"].literals >= {"auto", "low", "hd"}
    assert parameters_of("generate")["stream"].literals == {"true", "false"}
    assert parameters_of("edit")["image"].takes_others
    assert parameters_of("edit")["n"].takes_null
    assert not parameters_of("edit")["background"].takes_others


def test_the_table_has_nothing_that_the_client_lacks() -> None:
    for row in documented_rows():
        used = [method for method in get_args(Method) if row.results[method] != "-"]
        assert used, row
        for method in used:
            parameter = parameters_of(method)[row.parameter]
            assert parameter.takes_others or not row.kinds, row
        known = {
            value for method in used for value in parameters_of(method)[row.parameter].literals
        }
        assert row.literals <= known, row
    described = {(row.parameter, kind) for row in documented_rows() for kind in row.kinds}
    assert described == KINDS.keys()


@pytest.mark.parametrize(("method", "name"), EACH)
def test_every_value_of_the_client_is_in_the_table(method: Method, name: str) -> None:
    parameter = parameters_of(method)[name]
    listed = [value for row in rows_of(method, name) for value in row.literals]
    assert len(listed) == len(set(listed))
    if parameter.takes_others:  # its literals are examples: the rows about others have them
        assert any(row.kinds for row in rows_of(method, name))
    else:
        assert parameter.literals - set(listed) == set()


def each_value(method: Method, name: str, stream: bool) -> Iterator[tuple[str, Any, Any]]:
    """Yield what becomes of each value of a parameter, the value, and what goes with it."""
    for row in rows_of(method, name):
        for literal in row.literals & parameters_of(method)[name].literals:
            value = {"true": True, "false": False}.get(literal, literal)
            if name != "stream" or value == stream:
                yield row.results[method], value, {}
        for kind in row.kinds:
            for sample in KINDS[name, kind]:
                if stream in sample.streams:
                    yield row.results[method], sample.value, sample.others


@pytest.mark.parametrize("stream", [False, True], ids=["response", "stream"])
@pytest.mark.parametrize(("method", "name"), EACH)
def test_an_answer_is_as_documented(api: Api, method: Method, name: str, stream: bool) -> None:
    for result, value, others in each_value(method, name, stream):
        check(result, name, value, send(api, method, stream, {name: value, **others}))


@pytest.mark.parametrize("name", parameters_of("edit"))
def test_an_edit_in_json_is_answered_as_a_form_is(api: Api, name: str) -> None:
    for result, value, others in each_value("edit", name, False):
        check(result, name, value, send_json(api, {name: value, **others}))


@pytest.mark.parametrize("stream", [False, True], ids=["response", "stream"])
@pytest.mark.parametrize(("method", "name"), EACH)
def test_null_is_left_out(api: Api, method: Method, name: str, stream: bool) -> None:
    if parameters_of(method)[name].takes_null and name != "stream":
        outcome = send(api, method, stream, {name: None})
        assert outcome.status == 200, outcome.error
        assert outcome.answer.warnings == ["a warning"]


@pytest.mark.parametrize("method", get_args(Method))
def test_listed_models_and_sizes_follow_their_rules(api: Api, method: Method) -> None:
    """These parameters take any text, and their types list examples."""
    parameters = parameters_of(method)
    for model in parameters["model"].literals:
        check("404", "model", model, send(api, method, False, {"model": model}))
    fits = {}
    for size in parameters["size"].literals - {"auto"}:
        width, height = map(int, size.split("x"))
        fits[size] = width * height <= LIMITS.max_pixels
        result = "honoured" if fits[size] else "400"
        check(result, "size", size, send(api, method, False, {"size": size}))
    assert fits["1024x1024"]


@pytest.mark.parametrize("stream", [False, True], ids=["response", "stream"])
@pytest.mark.parametrize("method", get_args(Method))
def test_extra_fields_are_honoured_or_named(api: Api, method: Method, stream: bool) -> None:
    outcome = send(api, method, stream, {"extra_body": {"seed": 7}})
    assert [params.seed for params in outcome.received] == [7]
    outcome = send(api, method, stream, {"extra_body": {"sed": 7}})
    assert (outcome.status, outcome.error["param"]) == (400, "sed")
    outcome = send(api, method, stream, {"extra_query": {"seed": 7, "api-version": "1"}})
    warnings = outcome.answer.warnings
    assert any("'seed', 'api-version'" in text and "no effect" in text for text in warnings)


@pytest.mark.parametrize("stream", [False, True], ids=["response", "stream"])
@pytest.mark.parametrize("method", get_args(Method))
def test_the_safety_identifier_takes_precedence_over_the_user(
    api: Api, method: Method, stream: bool
) -> None:
    for given, effective in (
        ({"safety_identifier": "a", "user": "b"}, "a"),
        ({"safety_identifier": "", "user": "b"}, "b"),
        ({"safety_identifier": None, "user": "b"}, "b"),
        ({"user": ""}, None),
        ({}, None),
    ):
        assert send(api, method, stream, given).answer.safety_identifier == effective


@pytest.mark.parametrize("method", get_args(Method))
def test_tokens_are_counted_in_the_shape_of_the_client(api: Api, method: Method) -> None:
    usage = send(api, method, False, {"n": 2, "size": "48x32"}).answer.usage
    image_tokens = 0 if method == "generate" else 12
    assert usage.input_tokens_details.to_dict() == {"text_tokens": 14, "image_tokens": image_tokens}
    assert usage.output_tokens_details.to_dict() == {"text_tokens": 0, "image_tokens": 12}
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_variations_are_a_404(api: Api) -> None:
    with pytest.raises(openai.NotFoundError, match="no such path: /v1/images/variations"):
        api.client.post("/images/variations", cast_to=object, body={"n": 1})
