"""Encoded bytes → upright 8-bit RGB on white: one function for the index, both executors and evaluation."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
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


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise Undecodable(f"more than {MAX_PIXELS:,} pixels")
        image.load()
    except Image.DecompressionBombError:
        raise Undecodable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Undecodable("not an image" if data else "empty") from None
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:  # what Pillow's decoders raise
        raise error if isinstance(error, Undecodable) else Undecodable(str(error).lower() or "corrupt") from None
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey scaled to 8 bit (Pillow's own conversion clips)."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257).astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def upright_rgb(data: bytes) -> Image.Image:
    """Decode the first frame, apply EXIF orientation, flatten alpha and palette onto white, 8-bit RGB.

    Raises Undecodable for anything that is not a complete image of at most MAX_PIXELS.
    """
    return _flatten(_open(data))


def _flatten(image: Image.Image) -> Image.Image:
    return _on_white(ImageOps.exif_transpose(_eight_bit(image)))


def inspect(data: bytes) -> ImageFacts:
    """Decode fully and say what the index needs to know. Raises Undecodable."""
    image = _open(data)
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    plain = image.format == "JPEG" and image.mode in {"RGB", "L"} and orientation not in range(2, 9)
    width, height = image.size
    if orientation in range(5, 9):
        width, height = height, width
    return ImageFacts(width, height, plain)


def plain_bytes(data: bytes) -> bytes:
    """The upright RGB image as uncompressed PPM, which every decoder reads identically. Raises Undecodable."""
    image = upright_rgb(data)
    return b"P6 %d %d 255\n" % image.size + image.tobytes()
