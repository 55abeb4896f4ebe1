"""Environments of clients, apart from the project's own."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.client import PROGRAMS, Program, node
from tests.clients.programs.report import blue_png

OPEN_WEBUI = "open-webui==0.12.4"
"""It needs 8 GB of disk, and Python 3.11 or 3.12."""


def python_packages(folder: Path, *requirements: str) -> Path:
    """Return the Python of an environment with these packages, which are installed once."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {' '.join(requirements)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(install, check=True)
        (folder / "installed").touch()
    return python


def node_packages(folder: Path) -> None:
    """Install the packages of ``package.json`` into the folder, and the programs beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (PROGRAMS / "package.json", *PROGRAMS.glob("*.mjs")):
        shutil.copy(path, folder)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(install, cwd=folder, check=True)
    _write_images(folder)


def openai_python(folder: Path) -> Program:
    """Return OpenAI's Python client, of the project's own environment."""
    return _python_program(folder, "openai-python", "openai", Path(sys.executable))


def openai_node(folder: Path) -> Program:
    """Return OpenAI's client for Node.js; `node_packages` has filled the folder."""
    return Program("openai-node", "openai", (str(node()), "openai_node.mjs"), folder)


def vercel(folder: Path) -> Program:
    """Return the Vercel AI SDK; `node_packages` has filled the folder."""
    return Program("Vercel AI SDK", "ai", (str(node()), "vercel.mjs"), folder)


def litellm(folder: Path, python: Path) -> Program:
    """Return LiteLLM."""
    return _python_program(folder, "LiteLLM", "litellm", python)


def langchain(folder: Path, python: Path) -> Program:
    """Return LangChain's clients of OpenAI's API."""
    return _python_program(folder, "LangChain", "langchain-openai", python)


def _python_program(folder: Path, name: str, package: str, python: Path) -> Program:
    folder.mkdir(parents=True, exist_ok=True)
    _write_images(folder)
    files = {
        "openai": "openai_python.py",
        "litellm": "litellm_calls.py",
        "langchain-openai": "langchain_calls.py",
    }
    program = str(PROGRAMS / files[package])
    # LangChain's package with the wrapper warns that nobody develops it.
    variables = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore"}
    return Program(name, package, (str(python), program), folder, variables)


def _write_images(folder: Path) -> None:
    (folder / "image.png").write_bytes(blue_png())
    (folder / "mask.png").write_bytes(blue_png(b"\0"))
