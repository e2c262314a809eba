"""Losses by hand, and what may be done to logits without moving them."""

import pytest
import torch

from bench.errors import ConfigError
from bench.losses import check_classes, dlr, probability_margin, targeted_dlr, unit_margin

Z = torch.tensor([[5.0, 3.0, 1.0, 0.0], [1.0, 4.0, 2.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([0, 0])


def test_dlr_by_hand():
    assert dlr(Z, Y).tolist() == pytest.approx([2 / 4, -3 / 3])
    assert targeted_dlr(Z, Y, torch.tensor([1, 1])).tolist() == pytest.approx([2 / 4.5, -3 / 3.5])


@pytest.mark.parametrize("loss", [dlr, lambda z, y: targeted_dlr(z, y, torch.tensor([1, 3]))])
def test_no_scale_and_no_shift_moves_dlr(loss):
    assert torch.allclose(loss(1000 * Z - 7, Y), loss(Z, Y))


def test_dlr_of_equal_logits_is_finite():
    z = torch.zeros(1, 4)
    assert dlr(z, Y[:1]).item() == 0
    assert targeted_dlr(z, Y[:1], Y[:1] + 1).item() == 0


def test_the_margin_of_probabilities():
    p = Z.softmax(dim=1)
    assert probability_margin(Z, Y).tolist() == pytest.approx([(p[0, 0] - p[0, 1]).item(), (p[1, 0] - p[1, 1]).item()])


def test_data_of_too_few_classes_are_refused():
    check_classes("ce", 2)
    check_classes("dlr", 3)
    with pytest.raises(ConfigError, match="loss=dlr compares 3 classes, and the data have 2; use loss=ce"):
        check_classes("dlr", 2)


def test_no_scale_moves_the_unit_margin_even_of_two_classes():
    logits, y = torch.tensor([[3.0, 4.0], [1.0, -1.0]]), torch.tensor([1, 0])
    assert unit_margin(logits, y).tolist() == pytest.approx([1 / 5, 2 / 2**0.5])
    assert torch.allclose(unit_margin(7 * logits, y), unit_margin(logits, y))
