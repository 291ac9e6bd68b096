"""The model is what METHOD §3 says."""

import numpy as np
import pytest
import torch

from pipeline.schema import IDENTITY
from trainer.config_file import load_config
from trainer.heads import HEADS, AugmentationEncoder, MlpHead, ResidualHead
from trainer.model import UniCLIP
from trainer.optim import learning_rate, parameter_groups
from trainer.similarity import TEMPERATURE_FLOOR, Similarity, comparable_offsets

VOCAB, END, START = 300, 2, 1
TINY = ["model.image.width=32", "model.image.depth=2", "model.image.heads=2", "model.text.width=32", "model.text.depth=2",
        "model.text.heads=2", "model.dim=16", "model.head.augmentation_width=8", "model.image.size=16"]


def model(*overrides: str) -> UniCLIP:
    torch.manual_seed(0)
    return UniCLIP(load_config("scenes-tiny", [*TINY, *overrides]).model, VOCAB, END).eval()


def tokens(*captions: list[int]) -> torch.Tensor:
    ids = torch.zeros(len(captions), 12, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption) + 2] = torch.tensor([START, *caption, END])
    return ids


@torch.no_grad()
def test_a_group_is_embedded_view_by_view_and_text_by_text():
    m = model()
    views = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    vectors, ids = torch.randn(4, 3, 11), tokens([5], [6, 7], [8], [9])[:, None]
    z_image, z_text = m(views, vectors, ids)
    assert (z_image.shape, z_text.shape) == ((4, 3, 16), (4, 1, 16))
    for v in range(3):
        assert torch.allclose(z_image[:, v], m.encode_image(views[v], vectors[:, v]), atol=1e-5)
    assert torch.allclose(z_text[:, 0], m.encode_text(ids[:, 0]), atol=1e-5)


@torch.no_grad()
def test_the_image_tower_never_sees_the_vector_and_the_head_does():
    m = model()
    image = torch.randn(2, 3, 16, 16)
    other = torch.from_numpy(IDENTITY.copy())
    other[9] = 1
    assert torch.equal(m.encode_image(image), m.encode_image(image, torch.from_numpy(IDENTITY.copy()).expand(2, -1)))
    assert not torch.allclose(m.encode_image(image), m.encode_image(image, other.expand(2, -1)))
    without = model("model.head.augmentation=false")
    assert torch.equal(without.encode_image(image), without.encode_image(image, other.expand(2, -1)))
    assert without.augmentation is None


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["start", "end"])
def test_text_sees_the_whole_caption_and_no_padding(pooling):
    m = model(f"model.text.pooling={pooling}")
    first, last = tokens([5, 6, 7]), tokens([5, 6, 8])
    assert not torch.allclose(m.encode_text(first), m.encode_text(last)), "the feature must depend on the last word"
    padded = first.clone()
    padded[:, 5:] = 99
    assert torch.allclose(m.encode_text(first), m.encode_text(padded), atol=1e-6), "what follows the end token is padding"
    longer = torch.cat([first, torch.zeros(1, 0, dtype=torch.long)], 1)
    assert torch.allclose(m.encode_text(first), m.encode_text(longer[:, :5]), atol=1e-6)


@torch.no_grad()
def test_under_causal_attention_only_the_end_token_sees_the_end():
    m = model("model.text.pooling=end")
    m.text.pooling = "start"
    start_feature = lambda ids: m.text.norm(_last_block(m, ids)[:, 0])  # noqa: E731
    m.text.pooling = "end"
    assert torch.allclose(start_feature(tokens([5, 6, 7])), start_feature(tokens([9, 8])), atol=1e-6)


def _last_block(m: UniCLIP, ids: torch.Tensor) -> torch.Tensor:
    caught = []
    handle = m.text.blocks[-1].register_forward_hook(lambda *a: caught.append(a[2]))
    m.encode_text(ids)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("kind, depth", [("residual", 1), ("residual", 3), ("mlp", 1), ("mlp", 3), ("mlp", 6)])
@pytest.mark.parametrize("condition", [0, 8])
def test_every_head_of_table_4a_exists(kind, depth, condition):
    head = HEADS[kind](32, condition, depth, 16)
    h, e = torch.randn(5, 32), torch.randn(5, condition) if condition else None
    assert head(h, e).shape == (5, 16)
    linears = sum(isinstance(m, torch.nn.Linear) for m in head.modules())
    assert linears == (2 * depth + 1 if kind == "residual" else depth)


def test_a_residual_block_is_its_formula():
    head = ResidualHead(8, 4, 1, 3).double()
    h, e = torch.randn(2, 8).double(), torch.randn(2, 4).double()
    norm, first, _, second = head.blocks[0].layers
    joined = torch.cat([h, e], 1)
    normed = (joined - joined.mean(1, keepdim=True)) / (joined.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    hidden = torch.nn.functional.gelu(normed @ first.weight.T + first.bias)
    expected = (h + hidden @ second.weight.T + second.bias) @ head.out.weight.T + head.out.bias
    assert torch.allclose(head(h, e), expected)


def test_f_a_has_three_layers():
    sizes = [(m.in_features, m.out_features) for m in AugmentationEncoder().modules() if isinstance(m, torch.nn.Linear)]
    assert sizes == [(11, 256), (256, 256), (256, 256)]
    assert isinstance(MlpHead(4, 0, 1, 2).layers[0], torch.nn.Linear)


def test_the_temperature_keeps_its_floor_and_offsets_compare():
    similarity = Similarity(temperature=0.02)
    with torch.no_grad():
        similarity.log_temperature.sub_(3)
    similarity.clamp_()
    assert torch.allclose(similarity()[0], torch.full((3,), TEMPERATURE_FLOOR))
    tau, b = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.1, 0.0])
    assert torch.allclose(comparable_offsets(tau, b), comparable_offsets(tau, b + 5 * tau))
    assert comparable_offsets(tau, b)[1] == 0
    assert len(Similarity("shared").log_temperature) == 1


def test_decay_touches_matrices_alone():
    m = model()
    groups = parameter_groups(m, load_config("scenes-tiny", ["optim.weight_decay=0.2"]).optim)
    others, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    names = {id(p): name for name, p in m.named_parameters()}
    assert sum(len(g["params"]) for g in (decayed, others)) == len(names)
    kept = {names[id(p)] for p in others["params"]}
    for part in ("similarity.log_temperature", "similarity.offset", "text.position", "image.vit.pos_embed",
                 "image.vit.cls_token", "text_head.bias", "text.norm.weight"):
        assert part in kept
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_the_rate_warms_up_and_ends_at_zero():
    optim = load_config("scenes-tiny", ["optim.samples=10000", "optim.batch_size=100", "optim.warmup_samples=1000",
                                        "optim.lr=1e-3"]).optim
    rates = np.array([learning_rate(optim, s) for s in range(0, 10_000, 100)])
    assert np.isclose(rates[0], 1e-4)
    assert np.isclose(rates[9], 1e-3)
    assert rates.argmax() in (9, 10)
    assert (np.diff(rates[10:]) < 0).all()
    assert learning_rate(optim, 10_000) < 1e-12
    quarters = [learning_rate(optim, 1000 + 9000 * n // 4) for n in (1, 2, 3)]
    assert np.allclose(quarters, [0.8535533905932737e-3, 0.5e-3, 0.14644660940672624e-3])  # a cosine; a line has 0.75, 0.25


def test_wrong_shapes_are_refused_under_pytest():
    with pytest.raises(Exception, match="11"):
        AugmentationEncoder()(torch.zeros(2, 10))


def test_a_deep_mlp_begins_with_different_directions_for_different_inputs():
    torch.manual_seed(0)
    z_BD = torch.nn.functional.normalize(MlpHead(128, 64, 6, 128)(torch.randn(64, 128), torch.randn(64, 64)), dim=1)
    cosine_BB = z_BD @ z_BD.T
    assert cosine_BB[~torch.eye(64, dtype=torch.bool)].mean() < 0.7  # torch's own start: 0.999
