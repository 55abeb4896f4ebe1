"""Names, labels and the table in the README. That metrics say the truth is tested with who sets
them."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import errors as gateway_errors
from serve_app.metrics import (
    LABELS,
    OUTCOMES,
    RAY_GAUGES,
    SIDES_PX,
    SIZES,
    declared,
    size_label,
    table,
)

README = Path(__file__).parents[1] / "README.md"


def test_names_are_in_the_habits_of_prometheus() -> None:
    for metric in declared():
        [family] = metric.describe()
        assert re.fullmatch(r"diffusion_serve_[a-z_]+[a-z]", family.name)
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|milliseconds|mib|percent|total_total)\b", family.name)
        if family.type == "histogram" and family.name != "diffusion_serve_batch_size":
            assert family.name.endswith(("_seconds", "_ratio")), family.name


def test_every_label_is_explained_and_every_explanation_used() -> None:
    used = {label for metric in declared() for label in metric._labelnames}
    used |= {label for gauge in RAY_GAUGES for label in gauge.labels}
    assert used | {"replica", "diffusion_serve_sharing"} == LABELS.keys()


def test_outcomes_are_all_that_a_client_can_be_told() -> None:
    assert gateway_errors._HttpError.code in OUTCOMES
    assert {"completed", "cancelled", "overloaded", "lora_not_found"} <= set(OUTCOMES)
    assert len(set(OUTCOMES)) == len(OUTCOMES)


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_sizes_without_end_have_few_names(width: int, height: int) -> None:
    label = size_label(width, height)
    assert label in SIZES
    if label != SIZES[-1]:
        assert width * height <= int(label) ** 2
    smaller = [side for side in SIDES_PX if str(side) != label and side**2 >= width * height]
    assert label == SIZES[-1] or all(side > int(label) for side in smaller)


def test_a_square_has_the_name_of_its_side() -> None:
    assert [size_label(side, side) for side in SIDES_PX] == list(SIZES[:-1])


def test_the_table_in_the_readme_is_current() -> None:
    """If not, put there what ``python -m serve_app.metrics`` prints."""
    text = README.read_text(encoding="utf-8")
    section = text.split("\n## Metrics\n")[1].split("\n## ")[0]
    assert table() in section
