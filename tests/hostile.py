"""Every kind of answer that a downloader meets on the web, good and bad, each with what must become of it."""

import gzip
import io
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
from conftest import encoded, picture
from PIL import Image
from webserver import Answer, Site

STORED = "stored"
OPT_OUTS = ["noai", "NoImageAI", "none", "nofollow, noai", "noai, max-snippet:20", "*: noai", "uniclip: noindex",
            "otherbot: all\nuniclip: noml", "img2dataset: noimageindex",
            "unavailable_after: Wed, 21 Oct 2015 07:28:00 GMT, noai"]


def _trickle(start: bytes, piece: bytes, pause: float) -> Callable:
    def talk(handler):
        handler.wfile.write(start)
        while True:
            handler.wfile.write(piece)
            time.sleep(pause)
    return talk


def _bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 100,000 × 100,000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(orientation), exif=exif)


def _many_frames(format: str) -> bytes:
    return encoded(picture(1), format, save_all=True, append_images=[picture(2), picture(3)])


def answers(site: Site, private: Site) -> dict[str, tuple[Answer, str]]:
    """Kind → (answer, outcome)."""
    alpha = picture(4).convert("RGBA")
    alpha.putalpha(128)
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16)).save(file, "PNG")
    jpeg, whole = encoded(picture(0)), encoded(picture(5, 400, 300))
    html = {"Content-Type": "text/html"}
    return {
        "jpeg": (jpeg, STORED), "large jpeg": (encoded(picture(6, 1500, 1200)), STORED),
        "alpha": (encoded(alpha, "PNG"), STORED),
        "palette": (encoded(picture(7).quantize(8), "PNG", transparency=0), STORED), "16 bit": (file.getvalue(), STORED),
        "cmyk": (encoded(picture(8).convert("CMYK")), STORED), "gif": (_many_frames("GIF"), STORED),
        "animated webp": (_many_frames("WEBP"), STORED), "rotated": (_exif(6), STORED), "mirrored": (_exif(2), STORED),
        "wrong type": ((200, html, jpeg), STORED), "redirected": ((302, {"Location": "/jpeg/0"}, b""), STORED),
        "chunked": (_chunked(jpeg), STORED),
        "404": ((404, html, b"<html>gone</html>"), "http 404"), "403": ((403, {}, b""), "http 403"),
        "410": ((410, {}, b""), "http 410"), "451": ((451, {}, b""), "http 451"), "500": ((500, {}, b""), "http 500"),
        "503": ((503, {}, b""), "http 503"), "429": ((429, {"Retry-After": "3600"}, b""), "http 429"),
        "nothing": (b"", "not an image"), "no content": ((204, {}, b""), "not an image"),
        "html": ((200, {"Content-Type": "image/jpeg"}, b"<html>"), "not an image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "zipped": ((200, {"Content-Encoding": "gzip"}, gzip.compress(jpeg)), STORED),
        "cut jpeg": (whole[:len(whole) // 2], "broken image"),
        "cut jpeg, its end mark put back": (whole[:len(whole) // 2] + b"\xff\xd9", "broken image"),
        "jpeg xl": (b"\xff\x0a" + bytes(99), "format not read (JPEG XL)"),
        "cut png": (encoded(picture(1), "PNG")[:-400], "broken image"),
        "bomb": (_bomb(), "too many pixels"), "announced": ((200, {"Content-Length": "10000000000"}, b""), "too large"),
        "endless": (_trickle(b"HTTP/1.0 200 OK\r\n\r\n", bytes(1 << 20), 0), "too large"),
        "dripping": (_trickle(b"HTTP/1.0 200 OK\r\n\r\n", b"x", 0.1), "timeout"),
        "endless header": (_trickle(b"HTTP/1.0 200 OK\r\nX: ", b"x", 0.1), "timeout"),
        "silent": (lambda handler: time.sleep(2), "timeout"),
        "short": ((200, {"Content-Length": "99"}, b"x"), "connection broken"),
        "hang up": (lambda handler: None, "connection broken"),
        "not http": (lambda handler: handler.wfile.write(b"\0\1 hi\r\n\r\n"), "not http"),
        "in circles": ((302, {"Location": "/in circles/0"}, b""), "too many redirects"),
        "to a file": ((302, {"Location": "file:///etc/passwd"}, b""), "refused scheme"),
        "to a private address": ((307, {"Location": private.url("/secret")}, b""), "refused address"),
        "to metadata": ((301, {"Location": "http://169.254.169.254/latest/"}, b""), "refused address"),
        **{f"opt out {number}": ((200, {"X-Robots-Tag": value}, jpeg), "opted out")
           for number, value in enumerate(OPT_OUTS)},
    }


def _chunked(body: bytes) -> Callable:
    def talk(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(body), 500):
            piece = body[start:start + 500]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")
    return talk


SLOW = {"dripping", "endless header", "silent", "endless"}
NEVER_ASKED = {"file:///etc/passwd": "refused scheme", "data:image/png;base64,AAAA": "refused scheme",
               "ftp://127.0.0.1/a.jpg": "refused scheme", "http://[::1/": "bad url", "http://127.0.0.1:99999/": "bad url",
               "http://2130706434/": "refused address", "http://[::ffff:127.0.0.2]/": "refused address",
               "http://0x7f.2/": "refused address", "http://10.0.0.1/": "refused address"}
