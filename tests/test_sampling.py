"""The vector as a pure function: known answers, distributions, and independence of how one asks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sampling import STRONG, WEAK, ViewKind, draw_captions, philox, sample_vectors, uniforms
from pipeline.schema import IDENTITY, VECTOR

KINDS = (WEAK, STRONG, STRONG)
COLUMN = {field.name: number for number, field in enumerate(VECTOR)}


@pytest.mark.parametrize("counter, key, expected", [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert tuple(philox(tuple(np.array(c) for c in counter), key).tolist()) == expected


def vectors(ids, seed=1, epoch=0, repeat=0, size=(256, 300), kinds=KINDS):
    ids = np.asarray(ids, np.int64)
    return sample_vectors(seed, epoch, repeat, ids, np.tile(size, (len(ids), 1)), kinds)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255),
       st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=20), st.data())
def test_a_vector_does_not_depend_on_its_neighbours(seed, epoch, repeat, ids, data):
    whole = vectors(ids, seed, epoch, repeat)
    some = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1))
    assert np.array_equal(vectors([ids[i] for i in some], seed, epoch, repeat), whole[some])
    epochs = np.full(len(ids), epoch)
    assert np.array_equal(vectors(ids, seed, epochs, np.full(len(ids), repeat)), whole)


def test_seed_epoch_repeat_sample_and_view_all_matter():
    base = vectors([5])[0]
    others = [vectors([5], seed=2), vectors([5], epoch=1), vectors([5], repeat=1), vectors([6]),
              vectors([5], kinds=(WEAK, WEAK, WEAK))]
    assert all(not np.array_equal(other[0], base) for other in others)
    assert not np.array_equal(base[1], base[2])


def test_the_weak_view_only_crops():
    weak = vectors(np.arange(1000))[:, 0]
    assert (weak[:, 4:] == IDENTITY[4:]).all()
    area = weak[:, 2] * weak[:, 3]
    assert area.min() >= 0.5 - 1e-6
    assert area.max() <= 1 + 1e-6


def test_the_strong_view_has_its_probabilities_and_ranges():
    n = 40_000
    strong = vectors(np.arange(n))[:, 1]
    share = {name: (strong[:, COLUMN[name]] != 0).mean() for name in ("hue", "grayscaled", "blur_sigma", "flipped")}
    for name, expected in {"hue": 0.8, "grayscaled": 0.2, "blur_sigma": 0.5, "flipped": 0.5}.items():
        assert abs(share[name] - expected) < 4 * np.sqrt(expected * (1 - expected) / n), name
    for name, limit in {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}.items():
        values = strong[:, COLUMN[name]]
        assert 0.98 * limit < np.abs(values).max() <= limit + 1e-6
        assert abs(values.mean()) < 4 * limit / np.sqrt(n)
    sigma = strong[strong[:, COLUMN["blur_sigma"]] > 0, COLUMN["blur_sigma"]]
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 0.02


@pytest.mark.parametrize("size", [(640, 480), (100, 400), (256, 256), (1000, 50)])
def test_crops_follow_torchvisions_law_and_stay_inside(size):
    import torch
    from torchvision.transforms import RandomResizedCrop

    n = 4000
    crop = vectors(np.arange(n), size=size, kinds=(ViewKind(area=(0.08, 1.0)),))[:, 0, :4].astype(np.float64)
    assert (crop[:, 2:] > 0).all()
    assert (crop[:, :2] >= 0).all()
    assert (crop[:, :2] + crop[:, 2:] <= 1 + 1e-6).all()
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], float)
    area = theirs[:, 2] * theirs[:, 3] / (size[0] * size[1])
    aspect = theirs[:, 3] / theirs[:, 2]
    ours = crop[:, 2] * crop[:, 3]
    quantiles = np.linspace(0.05, 0.95, 10)
    assert np.abs(np.quantile(ours, quantiles) - np.quantile(area, quantiles)).max() < 0.035
    our_aspect = crop[:, 2] * size[0] / (crop[:, 3] * size[1])
    assert np.abs(np.quantile(our_aspect, quantiles) - np.quantile(aspect, quantiles)).max() < 0.05
    assert np.abs(np.quantile(crop[:, 0] / np.maximum(1 - crop[:, 2], 1e-9), quantiles)
                  - quantiles).max() < 0.04 or size[1] > 2 * size[0] or size[0] > 2 * size[1]


def test_captions_are_drawn_evenly_and_purely():
    ids, count = np.arange(20_000), np.full(20_000, 5)
    drawn = draw_captions(3, 0, 0, ids, count)
    assert np.abs(np.bincount(drawn, minlength=5) / len(ids) - 0.2).max() < 0.015
    assert np.array_equal(draw_captions(3, 0, 0, ids[7:9], count[7:9]), drawn[7:9])
    assert (draw_captions(3, 1, 0, ids, count) != drawn).mean() > 0.7


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(0, 0, 0, np.arange(10_000), 9, 0, 8)
    assert u.min() > 0
    assert u.max() < 1
    assert np.abs(np.corrcoef(u) - np.eye(8)).max() < 0.05
    assert np.abs(u.mean(1) - 0.5).max() < 0.015


def test_too_many_or_no_views_are_refused():
    with pytest.raises(ValueError, match="0 view kinds"):
        vectors([1], kinds=())
