"""The finder of blocks, and its rules."""

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tools.docs.blocks import ROOT, Page, PageError, main, page_paths, read_page

PAGE = "docs/page.md"

EVERYWHERE = """\
# Title

```sh title="a title"
echo top
```

!!! note
    ```python
    if True:
        print("in a note")
    ```

=== "One tab"

    <!-- not run: needs a GPU -->
    ```sh
    nvidia-smi
    ```

1. A step:

   <!-- server -->
   ~~~sh
   diffusion-serve serve
   ~~~

- ```json
  {"in": "a list"}
  ```

<!-- a comment
```sh
echo hidden
```
-->

````markdown
<!-- not run: because -->
```sh
echo shown as text
```
````
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    return tmp_path


def _read(root: Path, text: str) -> Page:
    (root / PAGE).write_text(text)
    return read_page(PAGE, root)


def test_blocks_are_found_at_any_depth(root: Path) -> None:
    page = _read(root, EVERYWHERE)
    assert [(block.line, block.language, block.text) for block in page.blocks] == [
        (3, "sh", "echo top\n"),
        (8, "python", 'if True:\n    print("in a note")\n'),
        (16, "sh", "nvidia-smi\n"),
        (23, "sh", "diffusion-serve serve\n"),
        (27, "json", '{"in": "a list"}\n'),
        (37, "markdown", "<!-- not run: because -->\n```sh\necho shown as text\n```\n"),
    ]
    assert [block.runs for block in page.blocks] == [True, True, False, True, False, False]
    assert page.blocks[2].fate == "not run: needs a GPU"
    assert page.blocks[3].starts_server
    assert not page.needs_server


def test_a_page_can_need_a_server(root: Path) -> None:
    assert _read(root, "<!-- needs: server -->\n# Title\n").needs_server


def test_macros_are_expanded_and_raw_regions_are_not(root: Path) -> None:
    text = (
        "{% set two = 2 %}\n```text\n{{ two }} {% raw %}{{ kept }}{% endraw %}\n```\n"
        "{% raw %}\n```yaml\na: {{ b }}\n```\n{% endraw %}\n"
    )
    assert [block.text for block in _read(root, text).blocks] == ["2 {{ kept }}\n", "a: {{ b }}\n"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```\nx\n```\n", "docs/page.md:1: the block has no language"),
        ("```sh\nx\n", "docs/page.md:1: the block does not end"),
        ("```bash\nx\n```\n", "docs/page.md:1: the language is 'bash'; write 'sh'"),
        ("<!-- not run: lazy -->\n```sh\nx\n```\n", "docs/page.md:2: the reason 'lazy' is unknown"),
        ("<!-- skip -->\n```sh\nx\n```\n", "docs/page.md:2: the marker 'skip' is unknown"),
        ("<!-- server -->\n```python\nx\n```\n", "docs/page.md:2: only a block of sh"),
        ("<!-- server -->\n\n```sh\nx\n```\n", "docs/page.md:1: 'server' is not directly before"),
        ("<!-- not run: needs a GPU -->\ntext\n", "is not directly before a block"),
        ("<!-- needs: GPU -->\ntext\n", "is not directly before a block"),
        ("<!-- not run: is run by tests/none.py -->\n```sh\nx\n```\n", "no test tests/none.py"),
        ("```sh\nx\n```\n<!-- needs: server -->\n", "allowed once, before the first block"),
        ("<!-- needs: server -->\n<!-- needs: server -->\n", "allowed once"),
    ],
)
def test_a_page_that_breaks_the_rules_is_rejected(root: Path, text: str, complaint: str) -> None:
    with pytest.raises(PageError) as error:
        _read(root, text)
    assert complaint in str(error.value)


def test_another_test_may_run_a_block(root: Path) -> None:
    (root / "tests" / "test_it.py").touch()
    text = "<!-- not run: is run by tests/test_it.py -->\n```sh\nx\n```\n"
    [block] = _read(root, text).blocks
    assert not block.runs
    assert block.fate == "run by tests/test_it.py"


@pytest.mark.parametrize("path", page_paths())
def test_no_block_of_a_page_is_missed(path: str) -> None:
    """Compare with a parser of Markdown, which does not find blocks in notes and tabs."""
    text = (ROOT / path).read_text()
    tokens = MarkdownIt().parse(text)
    found = {token.map[0] + 1 for token in tokens if token.type == "fence" and token.map}
    assert found <= {block.line for block in read_page(path).blocks}


def test_the_list_names_every_block_and_its_fate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    number = sum(len(read_page(path).blocks) for path in page_paths())
    assert f"{number} blocks" in lines
    assert len(lines) > number
