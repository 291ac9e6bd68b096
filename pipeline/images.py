"""Encoded bytes → upright 8-bit RGB on white: one function for the index, both executors and evaluation."""

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

Image.init()  # `formats` below finds only what is loaded
# Decoders that stay inside this process: Pillow would hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 50_000_000
_ORIENTATION_TAG = 0x0112
_ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}


class Undecodable(ValueError):
    """The bytes are not a complete image this project accepts; the message is the reason in a few words."""


@dataclass(frozen=True)
class ImageFacts:
    """What the index records: upright width and height in pixels; `plain` when any decoder gives the same pixels."""

    width: int
    height: int
    plain: bool


@contextmanager
def _decoding(data: bytes) -> Generator[None]:
    """Whatever Pillow raises on hostile bytes becomes Undecodable."""
    try:
        yield
    except (Undecodable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Undecodable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Undecodable("not an image" if data else "empty") from None
    except Exception as error:  # struct.error, RuntimeError, NotImplementedError, SyntaxError…: each plugin has its own
        raise Undecodable(str(error).lower() or "corrupt") from None


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Undecodable(f"more than {MAX_PIXELS:,} pixels")
    image.load()
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey scaled to 8 bit, its transparent value to alpha (Pillow's own conversion clips both)."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.dtype != np.uint16:
        values = np.clip(values, 0, 65535).astype(np.uint16)
    grey = Image.fromarray((values // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def flatten(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode → upright 8-bit RGB on white."""
    return _on_white(_eight_bit(ImageOps.exif_transpose(image)))


def upright_rgb(data: bytes) -> Image.Image:
    """Decode the first frame, apply EXIF orientation, flatten alpha and palette onto white, 8-bit RGB.

    Raises Undecodable for anything that is not a complete image of at most MAX_PIXELS in one of FORMATS.
    """
    with _decoding(data):
        return flatten(_open(data))


def inspect(data: bytes) -> ImageFacts:
    """Decode fully, as every executor will, and say what the index needs to know. Raises Undecodable."""
    with _decoding(data):
        image = _open(data)
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        plain = image.format == "JPEG" and image.mode in {"RGB", "L"} and orientation not in range(2, 9)
        return ImageFacts(*(image if plain else flatten(image)).size, plain)


def plain_bytes(data: bytes) -> bytes:
    """The upright RGB image as uncompressed PPM, which every decoder reads identically. Raises Undecodable."""
    image = upright_rgb(data)
    return b"P6 %d %d 255\n" % image.size + image.tobytes()
