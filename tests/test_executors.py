"""DALI and Pillow agree, and each number of the vector does to the view what METHOD.md says."""

import io

import cv2
import numpy as np
import pytest
import torch
from conftest import encoded, picture
from PIL import Image

from pipeline.images import Undecodable, inspect, plain_bytes, upright_rgb
from pipeline.replay import PillowExecutor, center_crop, eval_view, normalised, pixels, view
from pipeline.sampling import STRONG, WEAK, sample_vectors
from pipeline.schema import IDENTITY, STD, VECTOR
from pipeline.views import DaliExecutor

SIZE = 64
COLUMN = {field.name: number for number, field in enumerate(VECTOR)}


def rgba() -> Image.Image:
    image = picture(1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(2), quality=95, exif=exif)


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16)), "PNG")


# No bilevel here: Pillow clips between the two passes of a resize and DALI does not, so on hard black-and-white edges
# the two differ by up to 15/255 at the 99.9th percentile whatever the decoder.
ODD = {
    "rgb jpeg": lambda: encoded(picture(0), quality=90),
    "progressive jpeg": lambda: encoded(picture(0), quality=90, progressive=True),
    "grey jpeg": lambda: encoded(picture(0).convert("L"), quality=90),
    "cmyk jpeg": lambda: encoded(picture(0).convert("CMYK"), quality=90),
    "alpha png": lambda: encoded(rgba(), "PNG"),
    "palette png": lambda: encoded(picture(3).quantize(16), "PNG"),
    "transparent palette png": lambda: encoded(picture(3).quantize(16), "PNG", transparency=0),
    "grey alpha png": lambda: encoded(rgba().convert("LA"), "PNG"),
    "16 bit png": sixteen_bit,
    "webp": lambda: encoded(rgba(), "WEBP", lossless=True),
    "animated webp": lambda: encoded(picture(5), "WEBP", save_all=True, append_images=[picture(6)], lossless=True),
    "gif": lambda: encoded(picture(7), "GIF"),
    **{f"exif {n}": (lambda n=n: oriented(n)) for n in range(1, 9)},
    **{f"jpeg {options}": (lambda options=options: encoded(picture(4), **options)) for options in (
        {"subsampling": 0}, {"subsampling": 1}, {"optimize": True}, {"restart_marker_rows": 1}, {"keep_rgb": True})},
    **{f"{format} {mode}": (lambda format=format, mode=mode: encoded(picture(4).convert(mode), format))
       for format, modes in {"BMP": ("RGB", "L", "P"), "TIFF": ("RGB", "L", "CMYK", "RGBA"), "PPM": ("RGB", "L"),
                             "PNG": ("L", "P"), "AVIF": ("RGB", "RGBA"), "GIF": ("L",), "WEBP": ("RGB",)}.items()
       for mode in modes},
    "16 bit tiff": lambda: encoded(Image.open(io.BytesIO(sixteen_bit())), "TIFF"),
    "odd size": lambda: encoded(picture(4, 77, 53)), "one pixel": lambda: encoded(picture(4, 1, 1)),
    "large": lambda: encoded(picture(4, 640, 480)),
}


def for_executor(data: bytes) -> bytes:
    """What the loader hands to an executor."""
    return data if inspect(data).plain else plain_bytes(data)


@pytest.fixture(scope="module")
def executors():
    dali, pillow = DaliExecutor(SIZE, 1), PillowExecutor(SIZE, 1)
    yield dali, pillow
    dali.close()
    pillow.close()


def in_255(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """|a − b| in units of 1/255 before normalisation."""
    return ((a - b).abs() * torch.tensor(STD).view(3, 1, 1) * 255).numpy()


@pytest.mark.parametrize("name", ODD)
def test_executors_agree_on_every_kind_of_image(executors, name):
    data = ODD[name]()
    facts = inspect(data)
    ids = np.arange(24)
    vectors = sample_vectors(7, 0, 0, ids, np.tile([facts.width, facts.height], (24, 1)), (WEAK, STRONG, STRONG))
    vectors = np.concatenate([vectors, np.tile(IDENTITY, (24, 1, 1))], axis=1).astype(np.float32)
    results = [executor([for_executor(data)] * 24, vectors, ids) for executor in executors]
    for views, travelled, their_ids in results:
        assert np.array_equal(travelled.numpy(), vectors)
        assert np.array_equal(their_ids.numpy(), ids)
        assert views[0].dtype == torch.float32
    difference = np.concatenate([in_255(d, p).ravel() for d, p in zip(results[0][0], results[1][0], strict=True)])
    assert difference.mean() <= 0.3
    assert difference.reshape(-1, SIZE * SIZE * 3).mean(1).max() <= 0.5, "a single view"
    assert np.quantile(difference, 0.999) <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    data = oriented(orientation)
    facts, image = inspect(data), upright_rgb(data)
    assert (facts.width, facts.height) == image.size == ((80, 60) if orientation < 5 else (60, 80))
    assert facts.plain == (orientation == 1)


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(upright_rgb(encoded(clear, "PNG"))).min() == 255


def test_sixteen_bit_keeps_orientation_and_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(np.full((60, 80), 1000, np.uint16))
    data = encoded(grey, "PNG", exif=exif, transparency=1000)
    facts = inspect(data)
    assert (facts.width, facts.height) == upright_rgb(data).size == (60, 80)
    assert np.asarray(upright_rgb(data)).min() == 255


@pytest.mark.parametrize("format", ["AVIF", "WEBP", "PNG", "TIFF", "GIF", "JPEG"])
def test_damage_anywhere_is_undecodable_and_nothing_else(format):
    """Whatever a decoder raises; and what `inspect` accepts every executor can decode."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(picture(8), format, **({} if format == "GIF" else {"exif": exif}))
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        try:
            facts = inspect(bytes(data))
        except Undecodable:
            continue
        assert upright_rgb(bytes(data)).size == (facts.width, facts.height)


def test_no_image_reaches_another_program():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Undecodable, match="not an image"):
        upright_rgb(eps)


@pytest.mark.parametrize("data", [b"", b"<html>", encoded(picture(0))[:-200], encoded(rgba(), "PNG")[:-300]])
def test_what_is_no_complete_image_is_refused(data):
    with pytest.raises(Undecodable):
        upright_rgb(data)


def test_dali_goes_on_after_a_broken_image(executors):
    dali, _ = executors
    good, broken = encoded(picture(0)), encoded(picture(0))[:-300]
    vectors = np.tile(IDENTITY, (2, 1, 1)).astype(np.float32)
    with pytest.raises(Undecodable):
        dali([good, broken], vectors, np.arange(2))
    views, _, _ = dali([good, good], vectors, np.arange(2))
    assert torch.equal(views[0][0], views[0][1])


IMAGE = picture(11, 96, 96)


def changed(**fields: float) -> np.ndarray:
    vector = IDENTITY.copy()
    for name, value in fields.items():
        vector[COLUMN[name]] = value
    return vector


def plain() -> np.ndarray:
    return pixels(IMAGE, IDENTITY, SIZE).astype(np.float64)


def yiq(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]]).T


def rgb(values: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    return values @ inverse.T


def turned(fraction: float) -> np.ndarray:
    angle = fraction * 2 * np.pi
    y, i, q = np.moveaxis(yiq(plain()), -1, 0)
    return rgb(np.stack([y, np.cos(angle) * i + np.sin(angle) * q, -np.sin(angle) * i + np.cos(angle) * q], -1))


def desaturated(factor: float) -> np.ndarray:
    return rgb(yiq(plain()) * np.array([1, factor, factor]))


def gaussian(sigma: float) -> np.ndarray:
    at = np.arange(-6, 7)
    kernel = np.exp(-(at**2) / (2 * sigma**2))
    return cv2.sepFilter2D(plain(), -1, kernel / kernel.sum(), kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def cropped(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """A crop on whole pixels, resized with the box left out of it."""
    return np.asarray(IMAGE.crop((left, top, right, bottom)).resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)


EXPECTED = {
    "crop_x": (lambda: changed(crop_x=0.25, crop_w=0.75), lambda: cropped(24, 0, 96, 96), 12.0),
    "crop_y": (lambda: changed(crop_y=0.25, crop_h=0.75), lambda: cropped(0, 24, 96, 96), 12.0),
    "crop_w": (lambda: changed(crop_w=0.5), lambda: cropped(0, 0, 48, 96), 12.0),
    "crop_h": (lambda: changed(crop_h=0.5), lambda: cropped(0, 0, 96, 48), 12.0),
    "brightness": (lambda: changed(brightness=0.3), lambda: plain() * 1.3, 0.5),
    "contrast": (lambda: changed(contrast=-0.4), lambda: (plain() - 128) * 0.6 + 128, 0.5),
    "saturation": (lambda: changed(saturation=0.4), lambda: desaturated(1.4), 0.5),
    "hue": (lambda: changed(hue=0.1), lambda: turned(0.1), 0.5),
    "blur_sigma": (lambda: changed(blur_sigma=1.7), lambda: gaussian(1.7), 0.6),
    "flipped": (lambda: changed(flipped=1), lambda: plain()[:, ::-1], 0.0),
    "grayscaled": (lambda: changed(grayscaled=1), lambda: desaturated(0.0), 0.5),
}


@pytest.mark.parametrize("field", EXPECTED)
def test_each_number_alone_changes_the_view_as_it_should(executors, field):
    vector, expected, slack = (EXPECTED[field][0](), EXPECTED[field][1](), EXPECTED[field][2])
    expected = np.clip(expected, 0, 255)
    ours = pixels(IMAGE, vector, SIZE).astype(np.float64)
    inside = np.s_[4:-4, 4:-4] if field.startswith("crop") else np.s_[:]  # a crop's resize cannot see past its edge
    assert np.abs(ours - expected)[inside].max() <= slack + 0.51
    assert np.abs(ours - plain()).mean() > 2, "the field does nothing"
    png = plain_bytes(encoded(IMAGE, "PNG"))
    by_dali = executors[0]([png], vector[None, None], np.arange(1))[0][0][0]
    assert in_255(by_dali, torch.from_numpy(normalised(ours.astype(np.uint8)))).mean() <= 0.3


def test_evaluation_sees_the_central_square():
    image = picture(12, 120, 60)
    data = encoded(image, "PNG")
    assert center_crop(120, 60)[:4].tolist() == [0.25, 0.0, 0.5, 1.0]
    assert np.array_equal(eval_view(data, 60), view(image.crop((30, 0, 90, 60)), IDENTITY, 60))


def test_any_batch_size_and_thread_count_gives_the_same_pixels():
    data = [encoded(picture(n)) for n in range(7)]
    ids = np.arange(7)
    vectors = sample_vectors(1, 0, 0, ids, np.tile([80, 60], (7, 1)), (WEAK, STRONG))
    for make in (DaliExecutor, PillowExecutor):
        whole, parts = make(SIZE, 2), make(SIZE, 1)
        together = whole(data, vectors, ids)[0]
        for b in range(7):
            alone = parts([data[b]], vectors[b : b + 1], ids[b : b + 1])[0]
            assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together, strict=True)), make
        whole.close()
        parts.close()
