"""Diagnostics against brute force, and the closed form of chance against random embeddings."""

import math

import pytest
import torch

from trainer.diagnostics import diagnose, effective_rank, loss_bounds, uniformity
from trainer.losses import FORMULAS, LOSSES, SEPARABLE, unit

MEMBERS = [(name, "unified") for name in FORMULAS] + [(name, "separate") for name in sorted(SEPARABLE)]
TEMPERATURE, OFFSET = torch.tensor([0.1, 0.2, 0.15]).double(), torch.tensor([0.3, -0.1, 0.2]).double()


def brute_force(z_BSD: torch.Tensor, views: int, id_B: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean positive and negative logit of each domain pair, pair by pair."""
    found = {(kind, domain): [] for kind in ("positive", "negative") for domain in range(3)}
    for g, first in enumerate(z_BSD):
        for h, second in enumerate(z_BSD):
            for a, x in enumerate(first):
                for b, y in enumerate(second):
                    domain = int(a >= views) + int(b >= views)
                    kind = "positive" if g == h and a != b else "negative" if id_B[g] != id_B[h] else None
                    if kind:
                        found[kind, domain].append(float((x @ y - OFFSET[domain]) / TEMPERATURE[domain]))
    return tuple([sum(x) / len(x) for x in (found[kind, d] for d in range(3))] for kind in ("positive", "negative"))


def test_mean_logits_equal_brute_force_with_duplicates_and_invalid_groups():
    torch.manual_seed(0)
    image, text = torch.randn(6, 3, 5).double(), torch.randn(6, 2, 5).double()
    ids, valid = torch.tensor([4, 1, 4, 2, 2, 9]), torch.tensor([True, True, True, True, True, False])
    numbers = diagnose(image, text, TEMPERATURE, OFFSET, ids, valid)
    positive, negative = brute_force(unit(torch.cat([image, text], dim=1))[:5], 3, ids[:5])
    assert numbers["positive_logit"] == pytest.approx(positive, abs=1e-12)
    assert numbers["negative_logit"] == pytest.approx(negative, abs=1e-12)


def test_a_single_text_has_itself_as_positive():
    numbers = diagnose(torch.randn(4, 3, 5).double(), torch.randn(4, 1, 5).double(), TEMPERATURE, OFFSET)
    assert numbers["positive_logit"][2] == pytest.approx((1 - 0.2) / 0.15)


def test_hardest_negative_wins_where_another_group_matches_better():
    image = torch.eye(4).double()[:, None]
    text = torch.eye(4).double()[[0, 1, 3, 2]][:, None]  # groups 2 and 3 have each other's text
    assert diagnose(image, text, TEMPERATURE, OFFSET)["hardest_negative_wins"] == 0.5
    assert diagnose(image, text, TEMPERATURE, OFFSET, torch.tensor([0, 1, 2, 2]))["hardest_negative_wins"] == 0.5
    assert diagnose(image, image, TEMPERATURE, OFFSET)["hardest_negative_wins"] == 0
    assert diagnose(image * 0 + 1, image * 0 + 1, TEMPERATURE, OFFSET)["hardest_negative_wins"] == 1


@pytest.mark.parametrize("views, texts", [(1, 0), (3, 0), (1, 1)])
def test_any_shape_has_diagnostics(views, texts):
    numbers = diagnose(torch.randn(5, views, 8), torch.randn(5, texts, 8), TEMPERATURE, OFFSET)
    assert ("uniformity_text" in numbers) == bool(texts)
    assert math.isnan(numbers["hardest_negative_wins"]) == (views + texts == 1)


def test_effective_rank_and_uniformity_of_known_sets():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 7)) == pytest.approx(1, abs=1e-5)
    assert uniformity(torch.ones(5, 7)) == pytest.approx(0)
    assert uniformity(torch.eye(7)) == pytest.approx(-4)


@pytest.mark.parametrize("name, supervision", MEMBERS)
@pytest.mark.parametrize("views, texts, temperature", [(3, 1, (0.1, 0.1, 0.1)), (2, 2, (0.12, 0.2, 0.1)),
                                                       (1, 1, (0.1, 0.2, 0.15))])
def test_bounds_are_the_losses_of_random_and_of_agreeing_groups(name, supervision, views, texts, temperature):
    torch.manual_seed(0)
    groups, width = 128, 96
    similarity = torch.tensor(temperature).double(), torch.tensor([0.1, -0.05, 0.0]).double()
    drawn = {"floor": [], "chance": []}
    for _ in range(16):
        image, text = torch.randn(groups, views, width).double(), torch.randn(groups, texts, width).double()
        drawn["chance"].append(LOSSES[name](image, text, *similarity, supervision).item())
        image[:], text[:] = image[:, :1], image[:, :1]
        drawn["floor"].append(LOSSES[name](image, text, *similarity, supervision).item())
    bounds = loss_bounds(name, supervision, groups, views, texts, width, *similarity)
    assert bounds == pytest.approx(tuple(sum(losses) / len(losses) for losses in drawn.values()), rel=0.005)


def test_chance_of_infonce_at_high_temperature_is_the_log_of_the_batch_and_of_mp_nce_is_not():
    temperature, offset = torch.full((3,), 10.0), torch.zeros(3)
    assert loss_bounds("multi_positive_infonce", "separate", 64, 1, 1, 512, temperature, offset)[1] == \
        pytest.approx(math.log(64), abs=1e-4)
    assert loss_bounds("mp_nce", "unified", 64, 3, 1, 512, temperature, offset)[1] < 0.4 * math.log(4 * 64)
