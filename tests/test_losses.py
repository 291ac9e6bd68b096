"""The dense losses against double-precision truth, and what must hold for any batch."""

import json
from pathlib import Path

import pytest
import torch

from trainer.losses import LOSSES

ORACLE = json.loads((Path(__file__).parent / "oracle" / "losses.json").read_text())
NAMES = {
    "mp_nce_eq12": ("mp_nce", "unified"),
    "mp_nce_unweighted_eq11": ("mp_nce_unweighted", "unified"),
    "multi_positive_infonce_eq9": ("multi_positive_infonce", "unified"),
    "mil_nce_eq4": ("mil_nce", "unified"),
    "supcon": ("supcon", "unified"),
    "mp_nce_separate_supervision": ("mp_nce", "separate"),
}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def title(case: dict) -> str:
    return f"{case['name']}-V{case['V']}T{case['T']}-{'shared' if case['shared_similarity'] else 'domain'}-{case['extra']}"


@pytest.mark.parametrize("case", ORACLE, ids=title)
def test_loss_and_gradients_equal_the_oracle(case):
    name, supervision = NAMES[case["name"]]
    inputs = [tensor(case[key]) for key in ("image", "text", "temperature", "offset")]
    group_id = None if case["group_id"] is None else torch.tensor(case["group_id"])
    valid = None if case["valid"] is None else torch.tensor(case["valid"])
    loss = LOSSES[name](*inputs, supervision=supervision, group_id=group_id, valid=valid)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    assert abs(float(loss) - case["loss"]) < 1e-10
    for key, gradient in zip(("image", "text", "temperature", "offset"), gradients, strict=True):
        expected = torch.tensor(case["grad_" + key], dtype=torch.float64)
        assert torch.allclose(gradient, expected.view_as(gradient), rtol=0, atol=1e-10), key


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("views, texts, groups", [(1, 1, 1), (3, 0, 4), (1, 0, 3), (3, 1, 2), (1, 3, 2)])
def test_any_shape_has_a_finite_loss_and_gradient(name, views, texts, groups):
    torch.manual_seed(0)
    image = torch.randn(groups, views, 5, dtype=torch.float64, requires_grad=True)
    text = torch.randn(groups, texts, 5, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](image, text, torch.full((3,), 0.07).double(), torch.zeros(3).double())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_valid_group_alone_gives_no_gradient_from_negatives(name):
    image, text = torch.randn(3, 3, 5, requires_grad=True), torch.randn(3, 1, 5)
    loss = LOSSES[name](image, text, torch.full((3,), 0.07), torch.zeros(3), valid=torch.tensor([True, False, False]))
    loss.backward()
    assert torch.isfinite(loss)
    assert image.grad is not None
    assert image.grad[1:].abs().max() == 0


def test_a_batch_without_a_valid_group_is_an_error():
    with pytest.raises(ValueError, match="without a valid group"):
        LOSSES["mp_nce"](torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.ones(3), torch.zeros(3),
                         valid=torch.zeros(2, dtype=torch.bool))


@pytest.mark.parametrize("name", ["mil_nce", "supcon"])
def test_separate_supervision_is_refused_where_it_is_undefined(name):
    with pytest.raises(ValueError, match="separate supervision is undefined"):
        LOSSES[name](torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.ones(3), torch.zeros(3), supervision="separate")


def test_the_free_direction_of_offsets_changes_nothing():
    torch.manual_seed(1)
    image, text = torch.randn(4, 3, 6).double(), torch.randn(4, 1, 6).double()
    tau, b = torch.tensor([0.1, 0.2, 0.15]).double(), torch.tensor([0.4, -0.1, 0.2]).double()
    assert torch.allclose(LOSSES["mp_nce"](image, text, tau, b), LOSSES["mp_nce"](image, text, tau, b + 0.7 * tau))
