"""The check of the English: its rules, and that it finds every kind of text."""

from pathlib import Path

import pytest

from tools.docs.english import findings, main, report, sentences
from tools.docs.texts import Text, markdown, python, texts, yaml_file

ROOT = Path(__file__).parents[2]

WORDS_25 = " ".join("abcdefghijklmnopqrstuvwxy") + "."


@pytest.mark.parametrize(
    ("rule", "wrong", "right"),
    [
        ("length", f"One {WORDS_25}", WORDS_25),
        ("length", f"Run `a b` {WORDS_25}", f"`{'code ' * 30}` is one word."),
        ("length", "{a b} " * 26, "{a, b} {c}" * 20),
        ("word", "A refused request.", "A rejected request."),
        ("word", "Requests are let in.", "Requests are admitted; the `held` gauge counts others."),
        ("word", "A request is held.", "A held-out image, or one that is held out."),
        ("word", "Please use keys and/or TLS, etc.", "Use keys, TLS, or /etc/hosts."),
        ("opening", "What is late is rejected.", "A late request is rejected."),
        ("opening", "Whoever has a key may use it.", "What is a site?"),
        ("contraction", "It's not there.", "Its place is not there."),
        ("contraction", "You can't change it.", "You cannot change the server's port."),
        ("person", "The server knows the key.", "The server has the key."),
        ("person", "Ray says that it is full.", "Ray reports that it is full."),
        (
            "colons",
            "Of three nodes one fails: look at it twice: its disk.",
            "Warning: many nodes fail: see.",
        ),
        (
            "colons",
            "Many kinds of nodes: some of them have: a disk.",
            "model {id}: no: {error}.",
        ),
        ("semicolons", "One goes; one comes; one stays.", "A cell; with; a list"),
        ("doubled", "It is in the the file.", "Run diffusion-serve serve."),
    ],
)
def test_a_rule_finds_what_breaks_it(rule: str, wrong: str, right: str) -> None:
    assert rule in [finding.rule for finding in findings(wrong)]
    assert not list(findings(right))


def test_a_finding_names_the_replacement() -> None:
    [finding] = findings("Every painter waits.")
    assert finding.advice == "not 'painter', but: backend"


def test_sentences_end_at_periods_but_not_in_code_names_or_abbreviations() -> None:
    text = "Set `a. B` in x.yaml, e.g. 1.5 s.\nThen run it! (It\nends.) And so on"
    assert [(sentence.text, sentence.line) for sentence in sentences(text)] == [
        ("Set `a. B` in x.yaml, e.g. 1.5 s.", 0),
        ("Then run it!", 1),
        ("(It ends.)", 1),
        ("And so on", 2),
    ]


PAGE = """\
---
title: Not prose
---
# A heading {: #anchor }

Text with `code`, **bold** text,
[a link](x.md) and {{ results("x").rows[0] }}.

<!-- a comment -->
| A cell | Another |
| --- | --- |
| One | {% raw %}Two{% endraw %} |

```sh
not prose
```

!!! note "A title"
    Text of a note.

    ```sh
    not prose
    ```

- An item
- ![An image](x.png)

::: serve_app.engine
    options:
      members: not prose
"""


def test_texts_of_a_document_are_its_prose() -> None:
    assert [(text.content, text.line) for text in markdown(PAGE, "x.md") if text.content] == [
        ("A heading", 4),
        ("Text with `code`, bold text,\na link and {…}.", 6),
        ("A cell", 10),
        ("Another", 10),
        ("One", 12),
        ("Two", 12),
        ("A title", 18),
        ("Text of a note.", 19),
        ("An item", 25),
        ("An image", 26),
    ]


def test_texts_of_python_are_its_messages() -> None:
    code = '''
"""No docstring of a module."""
def f(x):
    """No docstring of a function."""
    raise ValueError(f"the value {x!r} is" + " wrong.\\nRun it:\\n  kubectl get pods")
'''
    assert list(python(code, "x.py")) == [
        Text("the value {x} is wrong.", "x.py", 5),
        Text("Run it:", "x.py", 5),
    ]


def test_texts_of_yaml_are_comments_and_annotations() -> None:
    document = """\
# A comment
# of two lines.
#
# kind: Pod
#   - not: prose
key: "a # b"  # Beside a key.
annotations:
  summary: Of {{ $labels.model }}, one.
  description: >-
    Folded.
"""
    assert list(yaml_file(document, "x.yaml")) == [
        Text("A comment\nof two lines.", "x.yaml", 1),
        Text("Beside a key.", "x.yaml", 6),
        Text("Of {…}, one.", "x.yaml", 8),
        Text("Folded.", "x.yaml", 10),
    ]


@pytest.fixture(scope="module")
def everything() -> dict[str, list[str]]:
    """Contents by the source's file, or by the first word of its description."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        by_source: dict[str, list[str]] = {}
        for text in texts():
            source = text.source if text.line else text.source.split(maxsplit=1)[0].split(".")[0]
            by_source.setdefault(source, []).append(" ".join(text.content.split()))
        return by_source


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("README.md", "diffusion-serve"),
        ("CHANGELOG.md", "Changelog"),
        ("SECURITY.md", "Security"),
        ("CONTRIBUTING.md", "Contributing"),
        ("docs/operate/runbook.md", "replica"),
        ("cluster/README.md", "Kubernetes"),
        ("images/README.md", "image"),
        (".github/ISSUE_TEMPLATE/bug.yml", "version"),
        ("cluster/components/monitoring/prometheusrule.yaml", "GPU"),
        ("configs/sdxl.yaml", "Stable Diffusion XL"),
        ("images/compose.yaml", "Ray"),
        ("serve_app/config/serve_file.py", "is not YAML"),
        ("serve_app/doctor/driver.py", "driver"),
        ("serve_app/metrics/gateway.py", "HTTP requests for images that have ended."),
        ("serve_app/gateway/page/index.html", "Start from an image: drop, paste or choose one"),
        ("serve_app/gateway/page/index.html", "Generated images"),
        ("serve_app/gateway/page/server.js", "The server cannot be reached."),
        ("help", "Constant arrival rate, in requests per second."),
        ("AppConfig", "Branch, tag or commit of the repository."),
        ("OpenAPI", "Width and height must be multiples of it."),
        ("dashboard", "diffusion-serve / Engine"),
    ],
)
def test_each_kind_of_source_yields_its_texts(
    everything: dict[str, list[str]], source: str, known: str
) -> None:
    assert any(known in text for text in everything[source]), everything[source]


def test_findings_name_their_place() -> None:
    assert list(report(Text("Fine.\nNot so\nsimply.", "x.md", 7))) == [
        "x.md:8: word: not 'simply', but: nothing\n    Not so simply."
    ]
    [line] = report(Text("He waits.", "help of diffusion-serve plan --mix"))
    assert line.startswith("help of diffusion-serve plan --mix: word: ")


def test_the_exit_status_reports_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("Right.")
    assert main([str(page)]) == 0
    page.write_text("It's wrong.")
    assert main([str(tmp_path)]) == 1
    assert f"{page}:1: contraction" in capsys.readouterr().out


def test_a_path_selects_the_interfaces_that_are_built_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)

    def interfaces(path: str) -> set[str]:
        return {text.source.split()[0] for text in texts([Path(path)]) if text.line is None}

    assert interfaces("serve_app/cli/plan.py") == {"help"}
    assert interfaces("monitoring") == {"dashboard"}
    assert not interfaces("docs")
