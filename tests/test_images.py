"""Images from the wild: EXIF in every state, JPEGs that lost their end, formats we name, files made to cost time."""

import ast
import io
import os
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, encoded, picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.execution import fit
from pipeline.images import FORMATS, Undecodable, header, inspect, upright_rgb
from pipeline.jpegs import MAX_SEGMENTS, layout
from pipeline.replay import PillowExecutor
from pipeline.schema import IDENTITY, STD
from pipeline.tars import why_undecodable
from pipeline.views import DaliExecutor

SIZE = 64


def exif(kind: int, count: int, value: int, tag: int = 0x0112, order: str = "<") -> bytes:
    """One EXIF entry of any type and count, as a JPEG's APP1 segment."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHHI", 1, tag, kind, count) + struct.pack(order + "HH", value, 0)
    body = b"Exif\0\0" + start + struct.pack(order + "I", 8) + entry + bytes(4)
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_segments(*segments: bytes) -> bytes:
    jpeg = encoded(picture(0), quality=95)
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="6"/>'
TURNED = {
    **{f"orientation {n} as type {kind} count {count}": with_segments(exif(kind, count, n))
       for n in (1, 3, 6) for kind in (1, 3, 4, 7) for count in (0, 1, 2)},
    "high byte first": with_segments(exif(3, 1, 6, order=">")), "orientation 9": with_segments(exif(3, 1, 9)),
    "two segments, 1 then 6": with_segments(exif(3, 1, 1), exif(3, 1, 6)),
    "two segments, 6 then 1": with_segments(exif(3, 1, 6), exif(3, 1, 1)),
    "two segments, none then 6": with_segments(exif(3, 1, 1, 0x010F), exif(3, 1, 6)),
    "in XMP only": with_segments(b"\xff\xe1" + struct.pack(">H", len(XMP) + 2) + XMP),
    "garbage": with_segments(b"\xff\xe1\0\x0dExif\0\0abcde"), "empty": with_segments(b"\xff\xe1\0\x08Exif\0\0"),
}


def test_executors_turn_a_picture_the_same_way_whatever_its_exif_says():
    dali, pillow = DaliExecutor(SIZE, 1), PillowExecutor(SIZE, 1)
    fitting = [fit(data, inspect(data).plain) for data in TURNED.values()]
    vectors = np.tile(IDENTITY, (len(fitting), 1, 1)).astype(np.float32)
    seen, reference = (executor(fitting, vectors, np.arange(len(fitting)))[0] for executor in (dali, pillow))
    pillow.close()
    difference = (seen[0] - reference[0]).abs().mean((2, 3)).numpy() @ np.array(STD) * 255 / 3
    assert {name: round(d, 2) for name, d in zip(TURNED, difference, strict=True) if d > 0.3} == {}


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def malformed() -> dict[str, bytes]:
    png, text = encoded(picture(0), "PNG"), PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n      10\n456869660000zz")
    return {"png chunk": png[:33] + chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03") + png[33:],
            "png text": encoded(picture(0), "PNG", pnginfo=text), "jpeg": TURNED["garbage"],
            "webp": encoded(picture(0), "WEBP", exif=b"Exif\0\0garbage", lossless=True),
            "turned png, its tags cut": png[:33] + chunk(b"eXIf", exif(3, 1, 6)[10:-6]) + png[33:]}


@pytest.mark.parametrize("name", malformed())
def test_exif_that_cannot_be_read_costs_nothing(name):
    data = malformed()[name]
    facts = inspect(data)
    assert (facts.width, facts.height) == upright_rgb(data).size in {(80, 60), (60, 80)}


def jpegs() -> dict[str, bytes]:
    """Whole ones, each of another build."""
    photo, flat = picture(1, 320, 240), Image.new("RGB", (640, 480), "white")
    flat.paste(picture(2), (30, 40))
    grey = Image.new("RGB", (320, 240), (128, 128, 128))
    grey.paste(picture(3), (30, 40))
    return {
        "baseline": encoded(photo), "best": encoded(photo, quality=95, subsampling=0),
        "optimised": encoded(photo, optimize=True), "progressive": encoded(photo, progressive=True),
        "restarts": encoded(photo, restart_marker_rows=1), "grey": encoded(photo.convert("L")),
        "cmyk": encoded(photo.convert("CMYK")), "zeros in a row": encoded(flat, optimize=True),
        "zeros, progressive": encoded(flat, progressive=True), "zeros, grey": encoded(flat.convert("L"), optimize=True),
        "mid-grey end": encoded(grey), "mid-grey end, optimised": encoded(grey, optimize=True),
        "mid-grey end, progressive": encoded(grey, progressive=True),
        "one mid-grey": encoded(Image.new("RGB", (800, 600), (128, 128, 128)), optimize=True),
        "one flat colour": encoded(Image.new("L", (3000, 3000)), progressive=True),
        "something behind the end": encoded(photo) + bytes(999) + encoded(picture(4)),
        "zeros before the end": encoded(photo)[:-2] + bytes(200) + b"\xff\xd9",
        "fill bytes before the end": encoded(photo)[:-2] + b"\xff" * 200 + b"\xff\xd9",
    }


@pytest.mark.parametrize("name", jpegs())
def test_a_whole_jpeg_of_any_build_is_taken(name):
    inspect(jpegs()[name])


@pytest.mark.parametrize("name", ["baseline", "best", "optimised", "progressive", "restarts", "grey", "cmyk"])
def test_a_cut_jpeg_is_refused_though_its_end_mark_was_put_back(name):
    data = jpegs()[name]
    built = layout(data)
    first = data.find(b"\xff\xda") + 20
    for share in (0.1, 0.4, 0.7):  # zeros in a progressive file's last scan change the picture by a third of a grey level
        at = first + int((built.end - first) * share)
        for tail in (b"\xff\xd9", bytes(built.end - at) + b"\xff\xd9", bytes(built.end - at), b"\xff" * 999 + b"\xff\xd9"):
            for decode in (inspect, upright_rgb):
                with pytest.raises(Undecodable) as refused:
                    decode(data[:at] + tail)
                assert why_undecodable(refused.value) == "broken image", (share, tail[:4])


@pytest.mark.slow
@pytest.mark.skipif("UNICLIP_SHARED" not in os.environ, reason="needs the photographs of the project's shared folder")
@pytest.mark.parametrize("name", ["coco", "clothing", "flickr8k"])
def test_no_photograph_is_refused(name, capsys):
    refused, seconds, count = [], time.process_time(), 0
    with tarfile.open(Path(os.environ["UNICLIP_SHARED"], "data", f"{name}.tar")) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                count += 1
                try:
                    inspect(tar.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
                except Undecodable as error:
                    refused.append((member.name, str(error)))
    with capsys.disabled():
        print(f"\n{name}: {count:,} photographs, {(time.process_time() - seconds) / count * 1e3:.2f} ms each")
    assert not refused


def twelve_bit() -> bytes:
    jpeg = bytearray(encoded(picture(0)))
    jpeg[jpeg.find(b"\xff\xc0") + 4] = 12
    return bytes(jpeg)


NAMED = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "JPEG XL": b"\xff\x0a" + bytes(99),
    "JPEG XL in a box": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG 2000": encoded(picture(0), "JPEG2000"),
    "ICO": encoded(picture(0, 32, 32), "ICO"), "PSD": b"8BPS\0\1" + bytes(99), "12-bit JPEG": twelve_bit(),
    "floating-point": encoded(Image.fromarray(np.linspace(0, 1, 4800, dtype=np.float32).reshape(60, 80)), "TIFF"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_format_that_is_not_read_is_named(name):
    if name == "HEIC" and "HEIF" in FORMATS:
        pytest.skip("read: the extra `heic` is installed")
    with pytest.raises(Undecodable) as refused:
        inspect(NAMED[name])
    assert why_undecodable(refused.value).startswith(f"format not read ({name.removesuffix(' in a box')}")


def test_heic_is_read_with_the_extra():
    pytest.importorskip("pillow_heif")
    data = encoded(picture(0), "HEIF", quality=95)
    assert (inspect(data).width, inspect(data).plain) == (80, False)
    assert np.abs(np.asarray(upright_rgb(data)).astype(int) - np.asarray(picture(0))).mean() < 6
    with pytest.raises(Undecodable):
        inspect(data[:-100])


def costly(count: int = 2_000_000) -> dict[str, bytes]:
    jpeg, png, gif = encoded(picture(0)), encoded(picture(0), "PNG"), encoded(picture(0), "GIF")
    large = encoded(Image.new("L", (5000, 5000)), progressive=True)
    scan = large[large.rfind(b"\xff\xda"):-2]
    after = jpeg.find(b"\xff\xda") - len(jpeg)
    return {"empty scans": large[:-2] + scan * (2_000_000 // len(scan)) + b"\xff\xd9",
            "empty comments": jpeg[:2] + b"\xff\xfe\0\2" * count + jpeg[2:],
            "fill bytes": jpeg[:2] + b"\xff" * count + jpeg[2:],
            "tables between scans": jpeg[:-2] + b"\xff\xdd\0\4\0\0" * (MAX_SEGMENTS + 1) + jpeg[after:],
            "empty chunks": png[:33] + chunk(b"teSt") * (count // 8) + png[33:],
            "empty chunks at the end": png[:-12] + chunk(b"teSt") * (count // 8) + png[-12:],
            "comment in pieces": gif[:781] + b"\x21\xfe" + b"\1a" * count + b"\0" + gif[781:],
            "blanks": b"P6" + b" " * count + b"1 1 255\n\0\0\0"}


@pytest.mark.parametrize("name", costly(1))
def test_decoding_has_a_bound(name):
    data, start = costly()[name], time.process_time()
    with pytest.raises(Undecodable) as refused:
        inspect(data)
    assert why_undecodable(refused.value) == "too costly to decode"
    assert time.process_time() - start < 2


def test_a_header_is_read_in_the_formats_we_read_only():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert header(encoded(picture(0))) == (80, 60)
    for data in (eps, b"/* XPM */\n" + b"a" * 999, encoded(picture(0), "PCX"), encoded(picture(0), "TGA")):
        with pytest.raises(Undecodable, match="not an image"):
            header(data)


def test_pillow_opens_bytes_in_one_place():
    """Every other `Image.open` would try each of Pillow's forty parsers, and follow none of the bounds above."""
    opens = [f"{path.relative_to(ROOT)}:{node.lineno}" for package in ("pipeline", "trainer", "evaluation", "tools")
             for path in (ROOT / package).glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value) in {"Image", "PIL.Image"}]
    assert [place.split(":")[0] for place in opens] == ["pipeline/images.py"]


def test_pieces_of_a_large_picture_are_no_attack():
    file = io.BytesIO()
    Image.effect_noise((3000, 2000), 80).save(file, "PNG")
    assert inspect(file.getvalue()).width == 3000
