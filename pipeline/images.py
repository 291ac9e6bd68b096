"""Encoded bytes → upright 8-bit RGB on white: one function for the index, both executors and evaluation."""

import io
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.jpegs import TooMuch, is_cut, layout

Image.init()  # `formats` below finds only what is loaded
# Decoders that stay inside this process: Pillow would hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
try:
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
except ImportError:
    pass  # the extra `heic` is not installed
MAX_PIXELS = 50_000_000
_MAX_READS = 200_000  # by Pillow's parsers; a large picture takes some thousand
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}
_ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}
_SIGNATURES = {"HEIC, needs pillow-heif": rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",
               "JPEG XL": rb"\xff\x0a|\x00{3}\x0cJXL \r\n\x87\n",
               "JPEG 2000": rb"\xff\x4f\xff\x51|\x00{3}\x0cjP  \r\n\x87\n",
               "ICO": rb"\x00\x00\x01\x00[^\x00]\x00", "PSD": rb"8BPS"}


class Undecodable(ValueError):
    """The bytes are not a complete image this project accepts; the message is the reason in a few words, the first of them
    its class (`tars.why_undecodable`)."""


@dataclass(frozen=True)
class ImageFacts:
    """What the index records: upright width and height in pixels; `plain` when any decoder gives the same pixels."""

    width: int
    height: int
    plain: bool


class _Bytes(io.BytesIO):
    """Bytes that are read in a bounded number of pieces: Pillow's parsers loop over millions of empty ones."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise Undecodable(f"too costly to decode: more than {_MAX_READS:,} pieces")
        return super().read(size)


@contextmanager
def _decoding(data: bytes) -> Generator[None]:
    """Whatever Pillow raises on hostile bytes becomes Undecodable."""
    try:
        yield
    except (Undecodable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Undecodable(f"more than {MAX_PIXELS:,} pixels") from None
    except TooMuch as error:
        raise Undecodable(f"too costly to decode: {error}") from None
    except Image.UnidentifiedImageError:
        raise Undecodable(_unread(data)) from None
    except Exception as error:  # struct.error, RuntimeError, NotImplementedError, SyntaxError…: each plugin has its own
        raise Undecodable(str(error).lower() or "corrupt") from None


def _unread(data: bytes) -> str:
    """What bytes are that none of FORMATS reads."""
    if data.startswith(b"\xff\xd8") and (bits := layout(data).bits) > 8:
        return f"format not read ({bits}-bit JPEG)"
    found = [name for name, signature in _SIGNATURES.items() if re.match(signature, data, re.DOTALL)]
    return f"format not read ({found[0]})" if found else "not an image" if data else "empty"


def _identified(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(_Bytes(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise Undecodable(f"more than {MAX_PIXELS:,} pixels")
    return image


def _loaded(jpeg: bytes) -> Image.Image:
    image = _identified(jpeg, ("JPEG",))
    image.load()
    return image


def _open(data: bytes, checked: bool = True) -> Image.Image:
    """A whole picture. checked: with what decoders do not notice, at the price of a second decoding of some JPEGs."""
    image = _identified(data)
    built = layout(data) if image.format in {"JPEG", "MPO"} else None  # before any scan is decoded
    image.load()
    if checked and built and is_cut(data, built, image, _loaded):
        raise Undecodable("image ends early")
    return image


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How EXIF says that the image is turned; EXIF that cannot be read says nothing."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except MemoryError:
        raise
    except Exception:  # SyntaxError, struct.error, TypeError…: Pillow's parser on noise
        return None


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
    if image.mode == "F":
        raise Undecodable("format not read (floating-point pixels)")  # in a range that nobody agrees on
    turn = _orientation(image)
    return _on_white(_eight_bit(image if turn is None else image.transpose(turn)))


def upright_rgb(data: bytes, checked: bool = True) -> Image.Image:
    """Decode the first frame, apply EXIF orientation, flatten alpha and palette onto white, 8-bit RGB.

    checked: False for what `inspect` has seen. Raises Undecodable for anything that is not a complete image of at most
    MAX_PIXELS in one of FORMATS.
    """
    with _decoding(data):
        return flatten(_open(data, checked))


def header(data: bytes, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Width and height as the header tells them, before any turning. Raises Undecodable."""
    with _decoding(data):
        return _identified(data, formats).size


def inspect(data: bytes) -> ImageFacts:
    """Decode fully, as every executor will, and say what the index needs to know. Raises Undecodable."""
    with _decoding(data):
        image = _open(data)
        plain = image.format == "JPEG" and image.mode in {"RGB", "L"} and _orientation(image) is None
        return ImageFacts(*(image if plain else flatten(image)).size, plain)


def plain_bytes(data: bytes, checked: bool = True) -> bytes:
    """The upright RGB image as uncompressed PPM, which every decoder reads identically. Raises Undecodable."""
    image = upright_rgb(data, checked)
    return b"P6 %d %d 255\n" % image.size + image.tobytes()
