"""``diffusion-serve top`` against real servers, in this process and as a process."""

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic

import pytest
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.config.environment import API_KEY_VARIABLE
from serve_app.top import Server
from tests.serve_process import free_port
from tests.top.scrapes import AFTER
from tests.waiting import wait_until

PROGRAM = Path(sys.executable).with_name("diffusion-serve")


@dataclass
class Answers:
    """The configured responses of a test server on a real port."""

    url: str = ""
    status: int = 200
    text: str = AFTER
    key: str | None = None
    keys: list[str | None] = field(default_factory=list)
    """``Authorization`` headers of the requests."""


@pytest.fixture
def answers() -> Iterator[Answers]:
    answers = Answers()
    with listening(answers, 0) as server:
        answers.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield answers
        server.shutdown()


def listening(answers: Answers, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.keys.append(self.headers["Authorization"])
            allowed = (
                answers.key is None or self.headers["Authorization"] == f"Bearer {answers.key}"
            )
            found = self.path == "/metrics"
            status = answers.status if allowed and found else 401 if found else 404
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{answers.url}/metrics?again")
            self.end_headers()
            self.wfile.write(answers.text.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def top(*arguments: str, key: str | None = None) -> tuple[int, str, str]:
    result = CliRunner(env={API_KEY_VARIABLE: key}).invoke(
        cli, ["top", *arguments, "--once", "--every", "0.2"]
    )
    return result.exit_code, result.stdout, result.stderr


def test_once(answers: Answers) -> None:
    code, out, err = top(answers.url)
    assert (code, err) == (0, "")
    assert out.startswith(f"demo at {answers.url}  0.1.0")
    assert "1 starting" in out
    assert "\x1b" not in out
    assert len(answers.keys) == 2
    assert top(answers.url.removeprefix("http://"))[0] == 0
    assert top(f"{answers.url}/metrics")[0] == 0


def test_only_the_server_sees_the_key(answers: Answers) -> None:
    answers.key = "sk-secret"
    code, out, err = top(answers.url)
    assert (code, out) == (2, "")
    assert f"requires an API key: set it in {API_KEY_VARIABLE}" in err
    for given_ in ({"key": "sk-wrong"}, {"key": "sk-wrong\n"}, {"key": "sk-wröng"}):
        code, out, err = top(answers.url, **given_)
        assert (code, out) == (2, "")
        assert "key" in err
        assert "wr" not in err
    assert top(answers.url, key="sk-secret")[0] == 0
    code, out, err = top(answers.url, "--key", "sk-secret", key="sk-wrong")
    assert code == 0
    assert "secret" not in out + err + repr(Server("http://h", "sk-secret"))


def test_a_key_follows_no_redirect(answers: Answers) -> None:
    answers.status = 302
    code, _, err = top(answers.url, key="sk-secret")
    assert code == 2
    assert "302" in err
    assert answers.keys == ["Bearer sk-secret"]


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (404, "", "does not exist (404)"),
        (503, "", "responds to GET /metrics with 503 Service Unavailable."),
        (200, "<html></html>", "no metrics of diffusion-serve"),
        (200, "diffusion_serve_x{ 1", "not in Prometheus' format"),
    ],
)
def test_other_servers_are_named_in_the_error(
    answers: Answers, status: int, text: str, words: str
) -> None:
    answers.status, answers.text = status, text
    code, out, err = top(answers.url)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("error: ") == 1


@pytest.mark.parametrize(
    "url",
    ["", "ftp://h", "http://", "http://user:secret@h", "http://h:port", "http://[", "http://h:99999",
     "http://h/?key=secret", "http://h/ x"],
)  # fmt: skip
def test_invalid_urls_are_rejected(url: str) -> None:
    code, _, err = top(url)
    assert code == 2
    assert "URL" in err
    assert "secret" not in err


def test_a_closed_port() -> None:
    code, _, err = top(f"http://127.0.0.1:{free_port()}")
    assert code == 2
    assert "does not respond: Connection refused." in err


def test_a_server_without_http() -> None:
    """An SSH server is an example."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-\x1b[31m\r\n")

        threading.Thread(target=speak, daemon=True).start()
        code, _, err = top(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert code == 2
    assert "does not respond: SSH-2.0-?[31m" in err
    assert "\x1b" not in err


# ---- as a process --------------------------------------------------------------------------------


def test_it_continues_while_the_server_restarts(tmp_path: Path) -> None:
    """Output to a file has the frames one below the other."""
    output = tmp_path / "frames.txt"
    server = listening(Answers(), 0)
    port = server.server_address[1]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [PROGRAM, "top", f"127.0.0.1:{port}", "--every", "0.2"], stdout=file, stderr=file
        )

    seen = 0

    def wait_for(words: str) -> None:
        nonlocal seen
        wait_until(lambda: words in output.read_text()[seen:], what=words)
        seen = output.read_text().index(words, seen)

    try:
        wait_for("last ")
        server.shutdown()
        server.server_close()
        wait_for("does not respond: Connection refused.")
        server = listening(Answers(), port)
        wait_for("measuring")
        wait_for("last ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()
    text = output.read_text()
    assert "Retrying." in text
    assert "\x1b" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_it_restores_the_terminal(number: signal.Signals, answers: Answers) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, "top", answers.url, "--every", "0.2"],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(its)
    seen = bytearray()

    def has(words: bytes) -> bool:
        if words not in seen and select.select([ours], [], [], 0)[0]:
            seen.extend(os.read(ours, 65536))  # raises if the process ends without them
        return words in seen

    try:
        wait_until(lambda: has(b"last "), what="a frame with rates")
        assert b"\x1b[?1049h" in seen  # the alternate screen
        process.send_signal(number)
        wait_until(lambda: has(b"\x1b[?1049l"), what="the previous screen")
        wait_until(lambda: has(b"\x1b[?25h"), what="the cursor")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in seen


def test_it_starts_without_the_packages_of_the_server(report: Callable[[str], None]) -> None:
    code = "import serve_app.top, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    started_at = monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report(f"top is imported in {monotonic() - started_at:.2f} s, with Python's own start")
    assert not {"ray", "torch", "fastapi", "diffusers", "numpy"} & set(done.stdout.split())
