import pickle

import pytest

from serve_app import errors


def _tree(root: type[errors.DiffusionServeError]) -> list[type[errors.DiffusionServeError]]:
    # Ray derives its own classes from these to transport them; those are not in the module.
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(leaf for child in children for leaf in _tree(child))]


@pytest.mark.parametrize("kind", _tree(errors.DiffusionServeError))
def test_errors_travel_between_processes(kind: type[errors.DiffusionServeError]) -> None:
    error = pickle.loads(pickle.dumps(kind("size is wrong", "size")))
    assert type(error) is kind
    assert (str(error), error.message, error.param) == ("size is wrong", "size is wrong", "size")


@pytest.mark.parametrize("kind", _tree(errors.DiffusionServeError))
def test_the_drawn_tree_is_the_real_one(kind: type[errors.DiffusionServeError]) -> None:
    assert errors.__doc__ is not None
    [line] = [line for line in errors.__doc__.splitlines() if f"{kind.__name__} " in line]
    assert f" {kind.status} " in line
    assert f" {kind.code}" in line
