"""How a JPEG is built, read from its markers, and whether its picture is whole: what decoders know and do not tell."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_SEGMENTS, MAX_SCANS = 10_000, 100  # encoders write hardly 100 and 20
# Inside a scan FF stands only before 00 and before restart marks. (`\xff+` would be sixty times as slow.)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
_END = b"\xff\xd9"
_HOLE = bytes(64)
_BYTES = np.random.default_rng(0).integers(1, 255, 64, dtype=np.uint8).tobytes()  # without FF, which would be a marker
# With each restart mark, because a decoder that waits for one passes over all else.
_NOISE = _BYTES + b"".join(bytes([0xFF, 0xD0 + number]) + _BYTES for number in range(8))
_GREY, _NEAR = 128, 4


class TooMuch(ValueError):
    """More segments or scans than any encoder writes: they cost time, and hardly a byte."""


@dataclass(frozen=True)
class Layout:
    """Bits a sample, kind of coding (the SOF marker's second byte), number of scans; offsets of the last scan and of the
    end mark, which is the file's end where there is none."""

    bits: int
    coding: int
    scans: int
    last: int
    end: int


def layout(data: bytes) -> Layout:
    """Raises TooMuch."""
    bits = coding = scans = last = at = 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if not found or data[found.end() - 1] == _EOI:
            return Layout(bits, coding, scans, last, found.start() if found else len(data))
        code = data[found.end() - 1]
        at = found.end()
        if code in _SOF and not scans:
            bits, coding = int.from_bytes(data[at + 2:at + 3]), code
        elif code == _SOS:
            scans, last = scans + 1, at
            if scans > MAX_SCANS:
                raise TooMuch(f"more than {MAX_SCANS} scans")
        if code not in {_SOI, 1}:
            at += int.from_bytes(data[at:at + 2])
    raise TooMuch(f"more than {MAX_SEGMENTS:,} segments")


def is_cut(data: bytes, built: Layout, picture: Image.Image, decoded: Callable[[bytes], Image.Image]) -> bool:
    """Whether the scans of a JPEG that has its end mark do not make up its picture: cut short, or zeros in their place.

    A decoder fills what is missing with grey and says nothing. So the last scan gets some noise behind it: a picture that
    changes was still waiting for data. That takes another decoding, so only suspects are tried: a grey last corner,
    several scans, zeros in a row (flat pictures have them too). They are in place where the last bytes still matter, or
    where no zero does.
    """
    def same(scans: bytes) -> bool:
        try:
            return decoded(scans + _END).tobytes() == picture.tobytes()
        except (OSError, SyntaxError):  # what Pillow raises on a scan that is none any more
            return False

    start = built.last + int.from_bytes(data[built.last:built.last + 2])  # behind the scan's header
    hole = data.find(_HOLE, start, built.end)
    if built.coding in _SEQUENTIAL and built.scans == 1 and hole < 0 and not _ends_grey(picture):
        return False
    if not same(data[:built.end] + _NOISE):
        return True
    return hole >= 0 and same(data[:built.end - len(_HOLE) // 2] + _NOISE) and not same(data[:hole])


def _ends_grey(picture: Image.Image) -> bool:
    """Whether the last pixel is what a decoder fills in: every component in the middle of its range."""
    last = picture.crop((picture.width - 1, picture.height - 1, picture.width, picture.height)).tobytes()
    return all(abs(value - _GREY) <= _NEAR for value in last)
