"""Conditions on the files of the repository."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(pin.split("==")[0]): pin.split("==")[1]
    for pin in (ROOT / "constraints.txt").read_text().splitlines()
    if pin and not pin.startswith("#")
}


CUDA_ONLY = ("nvidia-", "cuda-", "triton")
"""Packages that a CUDA build of torch brings along, at versions that torch fixes."""


def _needed(names: list[str]) -> set[str]:
    """Return all packages that the requirements need on this machine, at any depth."""
    seen: set[str] = set()
    queue = [Requirement(name) for name in names]
    done: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in done:
            continue
        done.add((name, frozenset(requirement.extras)))
        seen.add(name)
        for line in distribution(name).requires or []:
            child = Requirement(line)
            environments = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if child.name.startswith(CUDA_ONLY):
                continue
            if child.marker is None or any(child.marker.evaluate(e) for e in environments):
                queue.append(child)
    return seen


def test_every_dependency_is_pinned_to_what_is_installed() -> None:
    extras = PROJECT["optional-dependencies"].values()
    needed = _needed([*PROJECT["dependencies"], *(name for extra in extras for name in extra)])
    assert needed <= PINS.keys(), f"not pinned: {sorted(needed - PINS.keys())}"
    unused = PINS.keys() - needed - {"setuptools"}
    assert not unused, f"pinned and needed by nothing: {sorted(unused)}"
    for name in needed:
        installed = distribution(name).version.split("+")[0]
        assert installed == PINS[name], f"{name} {installed} is installed, {PINS[name]} is pinned"


def test_torch_may_be_a_cpu_or_a_cuda_build() -> None:
    assert "+" not in PINS["torch"]
