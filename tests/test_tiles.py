"""Tiles against the dense loss, at the edges of what a batch can be, in memory, and in Triton's interpreter.

B groups, V views, T texts, D embedding, M = (V+T)·B.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import tiles, tiles_torch
from trainer.losses import FORMULAS, SEPARABLE, dense_loss, info_nce

MEMBERS = [(name, "unified") for name in FORMULAS] + [(name, "separate") for name in sorted(SEPARABLE)]
tiled_loss = jaxtyped(typechecker=beartype)(tiles.tiled_loss)


def drawn(batch: int, views: int = 3, texts: int = 1, width: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
          ) -> list[torch.Tensor]:
    """Image, text, temperature, offset; all want gradients."""
    torch.manual_seed(seed)
    values = (torch.randn(views, batch, width).transpose(0, 1), torch.randn(batch, texts, width),
              torch.tensor([0.3, 0.5, 0.4]), torch.tensor([0.2, -0.1, 0.3]))
    return [x.to(dtype).requires_grad_() for x in values]


def with_gradients(loss_of: Callable, inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """The loss, then its gradients."""
    loss = loss_of(*inputs, **options)
    return [loss, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


def assert_close(got: list, expected: list, tolerance: float) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.allclose(x.double(), y.double(), rtol=0, atol=tolerance * max(1, float(y.detach().abs().amax()) if
                              y.numel() else 1)), (x, y)


@st.composite
def batches(draw):
    """Inputs and options of any loss: some groups invalid, some of equal id, any tile."""
    batch, views, texts = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    ids = draw(st.none() | st.lists(st.integers(-3, 4), min_size=batch, max_size=batch).map(torch.tensor))
    valid = draw(st.none() | st.lists(st.booleans(), min_size=batch, max_size=batch).filter(any).map(torch.tensor))
    inputs = drawn(batch, views, texts, seed=draw(st.integers(0, 99)))
    return inputs, {"group_id": ids, "valid": valid}, draw(st.integers(1, 9))


@pytest.mark.parametrize("name, supervision", MEMBERS)
@given(batches())
@settings(max_examples=25, deadline=None)
def test_tiles_equal_the_dense_loss_on_any_batch(name, supervision, drawn_batch):
    inputs, options, tile = drawn_batch
    expected = with_gradients(partial(dense_loss, name, supervision=supervision), inputs, **options)
    got = with_gradients(partial(tiled_loss, name, supervision=supervision, tile=tile), inputs, **options)
    assert all(torch.isfinite(x).all() for x in got)
    assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("name, supervision", MEMBERS)
@pytest.mark.parametrize("shape, tile", [((4, 2, 1, 3), 3), ((3, 1, 2, 4), 2), ((3, 2, 0, 3), 64)])
def test_gradients_are_those_of_the_value(name, supervision, shape, tile):
    ids = torch.tensor([5, 2, 2, 7])[:shape[0]]
    loss = partial(tiles.tiled_loss, name, supervision=supervision, tile=tile, group_id=ids)
    assert torch.autograd.gradcheck(lambda *inputs: -3 * loss(*inputs), drawn(*shape))


@pytest.mark.parametrize("supervision", ["unified", "separate"])
@pytest.mark.parametrize("loss_of", [dense_loss, partial(tiles.tiled_loss, tile=3)], ids=["dense", "tiled"])
def test_offsets_matter_only_relative_to_each_other_and_only_when_unified(loss_of, supervision):
    image, text, temperature, offset = drawn(4)
    loss_of = partial(loss_of, "mp_nce", supervision=supervision)
    loss, *_, gradient = with_gradients(loss_of, [image, text, temperature, offset])
    moved = loss_of(image, text, temperature, offset + 0.7 * temperature)
    assert torch.allclose(moved, loss, rtol=0, atol=1e-12)
    largest = gradient.abs().amin() if supervision == "unified" else gradient.abs().amax()
    assert (largest > 1e-3) if supervision == "unified" else (largest < 1e-12)


def vectors(kind: str) -> torch.Tensor:
    """Six groups of three views and a text, 8 wide."""
    torch.manual_seed(3)
    z = torch.randn(6, 4, 8)
    return {"identical embeddings": z[:1, :1].expand(6, 4, 8), "views of a group coincide": z[:, :1].expand(6, 4, 8),
            "texts opposite to images": torch.cat([z[:1, :1].expand(6, 3, 8), -z[:1, :1].expand(6, 1, 8)], dim=1),
            "zeros": torch.zeros(6, 4, 8), "huge": z.sign() * 3e38, "tiny": z * 1e-38,
            "huge and tiny": torch.where(z > 0, 3e38, 1e-38)}[kind].clone()


@pytest.mark.parametrize("loss_of", [dense_loss, tiled_loss], ids=["dense", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["identical embeddings", "views of a group coincide", "texts opposite to images", "zeros",
                                  "huge", "tiny", "huge and tiny"])
def test_extreme_embeddings_at_the_lowest_temperature_have_a_finite_loss_and_gradient(kind, dtype, loss_of):
    z = vectors(kind).to(dtype)
    similarity = [torch.full((3,), 0.01, requires_grad=True), torch.zeros(3, requires_grad=True)]
    for name, supervision in MEMBERS:
        inputs = [z[:, :3].clone().requires_grad_(), z[:, 3:].clone().requires_grad_(), *similarity]
        assert all(torch.isfinite(x).all() for x in with_gradients(partial(loss_of, name, supervision=supervision), inputs))


@pytest.mark.parametrize("name, supervision", MEMBERS)
def test_what_is_in_an_invalid_group_has_no_influence(name, supervision):
    inputs, valid = drawn(4), torch.tensor([True, False, True, True])
    loss_of = partial(tiled_loss, name, supervision=supervision, valid=valid)
    broken = [x.detach().clone() for x in inputs]
    broken[0][1], broken[1][1] = torch.nan, torch.inf
    assert_close(with_gradients(loss_of, [x.requires_grad_() for x in broken]), with_gradients(loss_of, inputs), 1e-12)


@pytest.mark.parametrize("name, supervision", MEMBERS)
def test_a_single_valid_group_has_the_loss_of_a_batch_of_one(name, supervision):
    image, text, *similarity = drawn(5)
    only = torch.arange(5) == 3
    loss, in_image, *_ = with_gradients(partial(tiled_loss, name, supervision=supervision), [image, text, *similarity],
                                        valid=only)
    alone = tiled_loss(name, image[3:4], text[3:4], *similarity, supervision)
    assert torch.allclose(loss, alone)
    assert in_image[~only].abs().max() == 0


def test_a_batch_without_a_valid_group_is_an_error():
    with pytest.raises(ValueError, match="without a valid group"):
        tiled_loss("mp_nce", *drawn(2), valid=torch.zeros(2, dtype=torch.bool))


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - SEPARABLE))
def test_separate_supervision_is_refused_where_it_is_undefined(name):
    with pytest.raises(ValueError, match="separate supervision is undefined"):
        tiled_loss(name, *drawn(2), supervision="separate")


@pytest.mark.parametrize("dtype, of_loss, of_gradients", [(torch.bfloat16, 1e-5, 2e-2), (torch.float16, 1e-5, 3e-3)])
def test_half_precision_embeddings_are_summed_in_float32(dtype, of_loss, of_gradients):
    """Against double precision on the same rounded unit vectors."""
    inputs = drawn(64, width=32, dtype=torch.float32)
    inputs[2] = torch.tensor([0.05, 0.07, 0.06], requires_grad=True)
    image, text = (F.normalize(x, dim=-1).to(dtype).double() for x in inputs[:2])
    monkey = [x.detach().double().requires_grad_() for x in (image, text, *inputs[2:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.losses.unit", lambda x: x)
        expected = with_gradients(partial(dense_loss, "mp_nce"), monkey)
    got = with_gradients(partial(tiled_loss, "mp_nce", tile=50, dtype=dtype), inputs)
    assert got[0].dtype == torch.float32
    assert_close(got[:1], expected[:1], of_loss)
    assert_close(got[3:], expected[3:], 1e-3)
    for x, gradient, reference in zip(inputs, got[1:3], expected[1:3], strict=False):
        z = F.normalize(x.detach(), dim=-1).double()
        along = (reference * z).sum(-1, keepdim=True)  # normalising removes what points along z
        reference = (reference - along * z) / x.detach().double().norm(dim=-1, keepdim=True)
        assert (gradient.double() - reference).norm() < of_gradients * reference.norm()


def test_autocast_changes_nothing():
    inputs = drawn(20, dtype=torch.float32)
    expected = with_gradients(partial(tiled_loss, "mp_nce", tile=7), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiled_loss("mp_nce", *inputs, tile=7)
    assert_close([loss, *torch.autograd.grad(loss, inputs)], expected, 0)


def test_the_product_is_the_same_without_onednn(monkeypatch):
    inputs = drawn(40, width=32, dtype=torch.float32)
    got = with_gradients(partial(tiled_loss, "mp_nce", tile=50), inputs)
    monkeypatch.setattr(tiles_torch, "_ONEDNN", False)
    assert_close(got, with_gradients(partial(tiled_loss, "mp_nce", tile=50), inputs), 1e-6)


class Live(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at once."""

    def __init__(self):
        super().__init__()
        self.peak, self._live = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self._live[x.untyped_storage()._cdata] = (StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes())
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def memory(loss_of: Callable, batch: int) -> tuple[int, int]:
    """Bytes saved for the backward pass, and the peak of both passes."""
    inputs = drawn(batch, width=16, dtype=torch.float32)
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with Live() as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of("mp_nce", *inputs).backward()
    return sum(saved.values()), live.peak


def test_memory_grows_with_the_batch_where_the_dense_loss_grows_with_its_square():
    embeddings = 64 * 4 * 16 * 4  # bytes of M·D in the smaller batch
    tiled = partial(tiles.tiled_loss, tile=32)
    (saved, peak), (saved_of_four, peak_of_four) = memory(tiled, 64), memory(tiled, 256)
    assert saved < saved_of_four < 4.1 * saved < 5 * 4.1 * embeddings
    assert peak < peak_of_four < 4.1 * peak < 12 * 4.1 * embeddings
    (saved, peak), (saved_of_four, peak_of_four) = memory(dense_loss, 64), memory(dense_loss, 256)
    assert saved_of_four > 12 * saved
    assert peak_of_four > 12 * peak


@pytest.mark.parametrize("loss_of", [dense_loss, partial(tiles.tiled_loss, tile=7)], ids=["dense", "tiled"])
def test_infonce_equals_open_clips_loss(loss_of):
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    image, text = (torch.randn(32, 16, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    got = info_nce(image, text, 1 / scale, loss=loss_of)
    expected = ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)
    assert torch.allclose(got, expected, rtol=0, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(loss, (image, text, scale)) for loss in (got, expected)), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_infonce_computes_no_tiles_within_a_modality(monkeypatch):
    seen = []
    monkeypatch.setitem(tiles.BACKENDS, "torch", lambda: (lambda patch: seen.append(patch) or tiles_torch.log_sums(patch),
                                                          tiles_torch.weights))
    info_nce(torch.randn(6, 4), torch.randn(6, 4), torch.tensor(0.1), loss=partial(tiles.tiled_loss, tile=3))
    assert len(seen) == 4


TRITON_CASES = [("mp_nce", "unified", (9, 3, 1, 24), 20), ("mp_nce", "separate", (7, 2, 2, 17), 64),
                ("mil_nce", "unified", (9, 2, 0, 33), 5)]
TRITON_DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3}  # the interpreter's bfloat16 is broken


def run_triton(pipe) -> None:
    """Sends [(got, expected)] of all cases, as lists of arrays."""
    for name, supervision, shape, tile in TRITON_CASES:
        ids, valid = torch.tensor([0, 1, 0, 3, 4, 5, 6, 7, 7])[:shape[0]], torch.arange(shape[0]) != 4
        loss_of = partial(tiles.tiled_loss, name, supervision=supervision, tile=tile, group_id=ids, valid=valid)
        for dtype in TRITON_DTYPES:
            got = with_gradients(partial(loss_of, backend="triton", dtype=dtype), drawn(*shape, dtype=torch.float32))
            expected = with_gradients(partial(loss_of, backend="torch"), drawn(*shape))
            pipe.send([[x.detach().numpy() for x in results] for results in (got, expected)])


@pytest.fixture(scope="module")
def interpreted():
    """The results of run_triton, from a process in which Triton interprets: it decides that when it is imported."""
    pytest.importorskip("triton")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_triton, args=(there,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process.start()
    there.close()
    results = [here.recv() for _ in range(len(TRITON_CASES) * len(TRITON_DTYPES))]
    process.join()
    return dict(zip([(case, dtype) for case in range(len(TRITON_CASES)) for dtype in TRITON_DTYPES], results, strict=True))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", range(len(TRITON_CASES)), ids=lambda case: "-".join(map(str, TRITON_CASES[case])))
def test_the_triton_kernels_equal_pytorch(interpreted, case, dtype):
    got, expected = ([torch.from_numpy(x) for x in results] for results in interpreted[case, dtype])
    assert_close(got, expected, TRITON_DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tiles_on_a_gpu_equal_the_dense_loss(backend, dtype, tolerance):
    inputs = [x.detach().cuda().requires_grad_() for x in drawn(300, width=512, dtype=torch.float32)]
    expected = with_gradients(partial(dense_loss, "mp_nce"), inputs)
    got = with_gradients(partial(tiled_loss, "mp_nce", tile=256, dtype=dtype, backend=backend), inputs)
    assert_close(got, expected, tolerance)
