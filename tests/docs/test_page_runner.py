"""The runner of pages, on pages made for it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs import page_runner
from tests.docs.page_runner import PageRunner, Workspace, on_port
from tests.fakes.http_server import QuietHandler, serving
from tests.serve_process import ROOT
from tools.docs.blocks import read_page

Run = Callable[..., Workspace]


@pytest.fixture
def run_text(tmp_path: Path) -> Run:
    """Run a page with this text in a new workspace."""

    def run(text: str, url: str | None = None, also: str = "") -> Workspace:
        workspace = Workspace(tmp_path / "workspace")
        path = workspace.root / "docs" / "page.md"
        path.write_text(text)
        page = read_page("docs/page.md", workspace.root)
        PageRunner(workspace, workspace.use_packages()).run(page, url, also)
        return workspace

    (tmp_path / "workspace").mkdir()
    return run


def _sh(*lines: str) -> str:
    return "```sh\n" + "".join(f"{line}\n" for line in lines) + "```\n\n"


def _python(*lines: str) -> str:
    return _sh(*lines).replace("```sh", "```python")


pytestmark = pytest.mark.slow


def test_blocks_of_a_page_share_state(run_text: Run) -> None:
    workspace = run_text(
        _sh("export COLOR=red", "mkdir made", "cd made", 'SHAPE="a circle"')
        + _sh('test "$COLOR $SHAPE" = "red a circle"', "echo $COLOR > color.txt", "cd ..")
        + _python("import os", "color = open('made/color.txt').read().strip()")
        + _python("assert color == os.environ['COLOR'] == 'red'", "open('end.txt', 'w').close()")
        + _sh("test -f end.txt", "test -f configs/demo.yaml", 'test -z "$(ls -A ~)"')
    )
    assert (workspace.root / "end.txt").exists()


def test_programs_of_the_environment_are_found_and_import_the_copy(run_text: Run) -> None:
    run_text(
        _sh("command -v kubectl >kubectl.txt", "diffusion-serve check configs/demo.yaml")
        + _sh("echo broken >serve_app/errors.py", "! diffusion-serve check configs/demo.yaml")
    )
    assert "class ConfigError" in (ROOT / "serve_app" / "errors.py").read_text()


def test_a_failed_command_is_reported_with_its_place_and_output(run_text: Run) -> None:
    with pytest.raises(AssertionError) as error:
        run_text("# Title\n\n" + _sh("echo before", "ls nowhere | cat", "echo after >after.txt"))
    message = str(error.value)
    assert message.startswith("docs/page.md:3: exit status 2\n")
    assert "ls nowhere | cat\n" in message
    assert "--- its output\nbefore\n" in message
    assert "No such file" in message


def test_a_failed_python_block_names_the_line_of_the_page(run_text: Run) -> None:
    with pytest.raises(AssertionError, match=r"docs/page.md:7: exit status 1") as error:
        run_text("# Title\n\n" + _python("a = 1") + _python("b = 2", "a / (b - 2)"))
    assert 'File "docs/page.md", line 9, in <module>' in str(error.value)
    assert "a / (b - 2)" in str(error.value).partition("ZeroDivisionError")[0]


def test_an_unset_variable_fails(run_text: Run) -> None:
    with pytest.raises(AssertionError, match="NOBODY_SET_THIS: unbound variable"):
        run_text(_sh("echo $NOBODY_SET_THIS"))


def test_a_block_has_a_time_limit(run_text: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_runner, "LIMIT_S", 0.5)
    with pytest.raises(AssertionError, match=r"docs/page.md:1: ran for more than 0.5 s"):
        run_text(_sh("echo begins", "sleep 1000"))


def test_a_block_cannot_write_into_the_repository(run_text: Run) -> None:
    before = (ROOT / "README.md").read_bytes()
    with pytest.raises(AssertionError, match=r"wrote outside the repository's folder: astray"):
        run_text(_sh("rm -r serve_app", "echo x >README.md") + _sh("touch ../astray"))
    assert (ROOT / "README.md").read_bytes() == before
    assert (ROOT / "serve_app" / "errors.py").exists()


def test_a_block_cannot_install_packages(run_text: Run) -> None:
    with pytest.raises(AssertionError, match=r"docs/page.md:1"):
        run_text(_sh("pip install -c constraints.txt -e '.[cluster]'"))


def test_a_block_that_is_not_run_is_run_by_its_own_test(run_text: Run) -> None:
    text = "<!-- not run: installs packages -->\n" + _sh("touch made")
    assert not (run_text(text).root / "made").exists()


def test_also_runs_blocks_of_one_reason(run_text: Run) -> None:
    text = "<!-- not run: installs packages -->\n" + _sh("touch made")
    assert (run_text(text, also="installs packages").root / "made").exists()


def test_a_page_that_needs_a_server_gets_its_address(run_text: Run) -> None:
    asked = threading.Event()

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802  # http.server's name
            asked.set()
            self.respond(200, b"ready", "text/plain")

    with serving(Handler) as url:
        run_text("<!-- needs: server -->\n" + _sh("curl -sf http://localhost:8000/ready"), url)
    assert asked.is_set()


@pytest.mark.parametrize(
    ("shown", "run"),
    [
        (
            "diffusion-serve serve configs/demo.yaml  # stays",
            "diffusion-serve serve --port 7 configs/demo.yaml  # stays",
        ),
        (
            "A=1 diffusion-serve serve \\\n  --port 8000 x.yaml",
            "A=1 diffusion-serve serve --port 7 \\\n  x.yaml",
        ),
        ("make serve", "make serve HOST='127.0.0.1 --port 7'"),
        (
            "make serve HOST=0.0.0.0 CONFIG=x.yaml",
            "make serve HOST='0.0.0.0 --port 7' CONFIG=x.yaml",
        ),
        ("serve run configs/demo.yaml", None),
    ],
)
def test_a_server_listens_on_a_free_port(shown: str, run: str | None) -> None:
    assert on_port(shown, 7) == run


@pytest.mark.serve
@pytest.mark.parametrize("command", ["diffusion-serve serve --port 8123", "make serve"])
def test_a_server_block_runs_until_the_end_of_its_page(run_text: Run, command: str) -> None:
    port = "8123" if "8123" in command else "8000"
    workspace = run_text(
        f"<!-- server -->\n{_sh('# The demo.', command)}"
        + _sh(
            f"curl -sf http://localhost:{port}/ready >ready.txt",
            f"echo http://127.0.0.1:{port} >url.txt",
            "diffusion-serve top --once >top.txt" if port == "8000" else "true",
        )
    )
    url = (workspace.root / "url.txt").read_text()
    assert not url.endswith(f":{port}\n")
    assert port != "8000" or url.strip() in (workspace.root / "top.txt").read_text()


@pytest.mark.serve
def test_a_server_that_does_not_start_is_reported(run_text: Run) -> None:
    with pytest.raises(AssertionError) as error:
        run_text("<!-- server -->\n" + _sh("diffusion-serve serve none.yaml"))
    assert str(error.value).startswith("docs/page.md:2: the server ended\n")
    assert "none.yaml" in str(error.value).partition("--- its output")[2]
