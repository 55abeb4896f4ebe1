"""The closed sets of label values."""

from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from serve_app.gateway.errors import problem_of
from serve_app.metrics.labels import OUTCOMES, SIDES_PX, SIZES, size_label


def test_every_error_code_is_an_outcome() -> None:
    scope = {"type": "http", "method": "POST", "path": "/nothing", "headers": []}
    codes = {
        problem_of(HTTPException(status), scope).detail.code for status in (404, 405, 408, 429, 503)
    }
    assert "http_error" in codes
    assert codes <= set(OUTCOMES)
    assert {"completed", "cancelled", "overloaded", "lora_not_found"} <= set(OUTCOMES)
    assert len(set(OUTCOMES)) == len(OUTCOMES)


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_any_size_maps_to_one_of_a_few_labels(width: int, height: int) -> None:
    label = size_label(width, height)
    assert label in SIZES
    if label != SIZES[-1]:
        assert width * height <= int(label) ** 2
    smaller = [side for side in SIDES_PX if str(side) != label and side**2 >= width * height]
    assert label == SIZES[-1] or all(side > int(label) for side in smaller)


def test_the_label_of_a_square_is_its_side() -> None:
    assert [size_label(side, side) for side in SIDES_PX] == list(SIZES[:-1])
