"""Distances of tensors, with the values computed by hand."""

import math

import pytest
import torch

from serve_app.engine.startup.comparison import (
    is_constant,
    is_finite,
    largest_difference,
    psnr_db,
    relative_l2,
)


def test_psnr() -> None:
    black = torch.zeros(3, 4, 4)
    assert psnr_db(black, black) == 200
    assert psnr_db(black, black + 0.1) == pytest.approx(20)
    assert math.isnan(psnr_db(black, black * math.nan))


def test_relative_l2_is_over_all_tensors() -> None:
    one = {"a": torch.tensor([3.0]), "b": [torch.tensor([[4.0]])]}
    two = {"a": torch.tensor([3.0]), "b": [torch.tensor([[4.5]])]}
    assert relative_l2(one, one) == 0
    assert relative_l2(one, two) == pytest.approx(0.1)


def test_relative_l2_of_what_cannot_be_compared_is_no_match() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_l2(one, torch.ones(3)) == math.inf
    assert relative_l2(zero, one) == math.inf
    assert relative_l2(zero, zero) == 0
    assert math.isnan(relative_l2(one, one * math.nan))


def test_nan_in_one_image_is_not_lost() -> None:
    images = [torch.zeros(2), torch.tensor([0.0, math.nan]), torch.zeros(2)]
    assert math.isnan(largest_difference([torch.zeros(2)] * 3, images))


def test_constant_and_finite() -> None:
    assert is_constant((torch.ones(2, 2),))
    assert not is_constant((torch.ones(2), torch.tensor([0.0, 1.0])))
    assert is_finite([torch.ones(2)])
    assert not is_finite([torch.ones(2), torch.tensor([math.inf])])
