"""Packages for a machine that has torch and transformers but reaches no package index."""

import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[3]

PACKAGES = (
    *("diffusers", "importlib_metadata"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    "greenlet",
)
"""Packages of the engine and of its tests that are no part of such a machine."""

PYTHON = "3.12"

PLATFORMS = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
)

SITE = "build/packages"
"""Folder on the machine in which the packages are installed, relative to the repository."""


def pinned(package: str) -> str:
    """Return the requirement with the version of constraints.txt.

    Raises:
        ValueError: the file does not pin the package.
    """
    pins = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"^{re.escape(package)}==\S+", pins, re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise ValueError(f"constraints.txt does not pin {package}.")
    return found[0]


def carry(folder: Path, output: Path, minutes: float) -> None:
    """Download the wheels, and print them with their size and the commands for the machine.

    Raises:
        subprocess.CalledProcessError: the index does not have a wheel for such a machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):  # two versions of a package cannot be installed at once
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    command += [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    subprocess.run([*command, "--dest", str(folder), *map(pinned, PACKAGES)], check=True)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 2**20:6.2f} MiB in {folder}")
    needs = sorted({need for wheel in wheels for need in _needs(wheel)} - _names(wheels))
    print(f"They also need, and the machine must have: {', '.join(needs)}\n")
    print(commands(folder, output, minutes))


def commands(folder: Path, output: Path, minutes: float) -> str:
    """Return what to run on the machine, in the repository's root.

    Rows of an earlier call, put into ``folder`` under the name of ``output``, are not measured
    again.
    """
    return "\n".join(
        (
            "python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade "
            f"--target {SITE} {folder}/*.whl || exit",
            f"[ ! -f {folder}/{output.name} ] || cp {folder}/{output.name} {output}",
            f'PYTHONPATH="$PWD/{SITE}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 python3 -m '
            f"tests.benchmarks.first_day --minutes {minutes:g} --output {output}",
        )
    )


def _needs(wheel: Path) -> set[str]:
    """Return the names of the packages that a wheel always requires."""
    with ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    required = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    return {
        re.split(r"[ ;<>=!~\[(]", line)[0].lower().replace("_", "-")
        for line in required
        if "extra ==" not in line and "python_version <" not in line
    }


def _names(wheels: list[Path]) -> set[str]:
    return {wheel.name.split("-")[0].lower().replace("_", "-") for wheel in wheels}
