"""The measured table of README.md is the one of the results."""

from pathlib import Path

import pytest

from tools.docs import readme


def test_the_readme_shows_the_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.BEGIN in text, f"README.md has no block {readme.BEGIN}"
    assert readme.rendered(text) == text, "run: python -m tools.docs.readme"


def test_an_old_table_is_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# A\n\n{readme.BEGIN}\n| old |\n| --- |\n{readme.END}\n\nThe rest.\n")
    readme.main(path)
    expected = f"# A\n\n{readme.BEGIN}\n{readme.measured()}\n{readme.END}\n\nThe rest.\n"
    assert path.read_text(encoding="utf-8") == expected
    readme.main(path)
    assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    "text",
    [
        "no block",
        f"{readme.BEGIN}\nwithout an end",
        f"{readme.BEGIN}{readme.END}\n{readme.BEGIN}{readme.END}",
    ],
)
def test_without_exactly_one_block_it_fails(text: str) -> None:
    with pytest.raises(ValueError, match="exactly one block"):
        readme.rendered(text)
