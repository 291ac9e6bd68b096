"""Answers as servers really write them, byte by byte from a socket, through the fetch that downloads use."""

import gzip
import random
import tracemalloc
import zlib

import pytest
from conftest import encoded, picture
from test_fetch import HERE, failure
from webserver import serving

from pipeline.fetch import Policy, fetch

BODY = b"picture"


@pytest.fixture(scope="module")
def site():
    with serving() as site:
        yield site


def says(site, head: bytes, body: bytes = BODY) -> str:
    """The URL of a page that is these bytes."""
    site.pages["/raw"] = lambda handler: handler.wfile.write(head + b"\r\n" + body)
    return site.url("/raw")


LENGTH = b"Content-Length: 7\r\n"


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 103 Early Hints\r\nLink: <s>\r\nX-Robots-Tag: noai\r\n\r\nHTTP/1.1 200 OK\r\n" + LENGTH,
    b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 199 X\r\n\r\nHTTP/1.1 200 OK\r\n" + LENGTH,
    b"HTTP/1.1 200 OK\r\nContent-Length : 7 \t\r\n", b"HTTP/1.1 200 OK\nContent-Length:7\n", b"HTTP/1.0 200\r\n",
    b"HTTP/1.1 200 OK\r\nno header line\r\n: nor this\r\n" + LENGTH, b"HTTP/1.1 200 OK\r\n folded onto nothing\r\n" + LENGTH,
    b"HTTP/1.1 200 OK\r\nContent-Length:\r\n 7\r\n", "HTTP/1.1 200 OK\r\nX-Näme: ü\r\n".encode() + LENGTH,
])
@pytest.mark.parametrize("trailing", [b"", b"more than was announced"])
def test_loose_heads_are_read_as_they_are_meant(site, head, trailing):
    whole = b"ength" not in head
    assert fetch(says(site, head, BODY if whole else BODY + trailing), HERE) == BODY


@pytest.mark.parametrize("name", [b"Transfer-Encoding: chunked \r\n", b"Transfer-Encoding : chunked\t\r\n"])
def test_blanks_behind_chunked(site, name):
    assert fetch(says(site, b"HTTP/1.1 200 OK\r\n" + name, b"3\r\npic\r\n4;x=y\r\nture\r\n0\r\n\r\n"), HERE) == BODY


@pytest.mark.parametrize("size", [b"-1", b"zz", b"", b"7fffffffff"])
def test_a_chunk_of_no_sane_size_ends_the_body(site, size):
    """http.client would read a chunk of −1 bytes to the end of the connection, however much there is."""
    whole = b"3\r\npic\r\n" + size + b"\r\nture\r\n0\r\n\r\n"
    found = failure(says(site, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", whole))
    assert (found.reason, found.passing) == ("connection broken", True)


@pytest.mark.parametrize("location", ["/to.jpg ", "  /to.jpg\t", "/to.jpg#part", " //{host}/to.jpg ", "\r\n /to.jpg",
                                      "http://{host}/to.jpg "])
@pytest.mark.parametrize("name", ["Location:", "location :"])
def test_blanks_around_a_redirect_are_not_of_its_path(site, name, location):
    site.pages["/to.jpg"] = BODY
    place = location.format(host=f"127.0.0.1:{site.server_port}")
    assert fetch(says(site, f"HTTP/1.1 302 X\r\n{name}{place}\r\nContent-Length: 0\r\n".encode()), HERE) == BODY


@pytest.mark.parametrize("line", [b"X-Robots-Tag : noai", b"x-robots-tag:noai ", b"X-Robots-Tag:\r\n\tnoai",
                                  b"nonsense\r\nX-Robots-Tag: noai", b"TDM-Reservation: 1", b"tdm-reservation : 1 "])
@pytest.mark.parametrize("status", [b"200 OK", b"302 X\r\nLocation: /to.jpg", b"103 X\r\n\r\nHTTP/1.1 200 OK"])
def test_opt_outs_are_seen_behind_loose_lines(site, status, line):
    site.pages["/to.jpg"] = BODY
    assert failure(says(site, b"HTTP/1.1 " + status + b"\r\n" + line + b"\r\n" + LENGTH)).reason == "opted out"


def test_early_answers_without_end_end(site):
    assert failure(says(site, b"HTTP/1.1 103 X\r\n\r\n" * 1000 + b"HTTP/1.1 200 OK\r\n" + LENGTH)).reason == "not http"
    assert failure(says(site, b"HTTP/1.1 101 Switching Protocols\r\n")).reason == "http 101"


def _raw_deflate(body: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(body) + engine.flush()


def _members(body: bytes) -> bytes:
    return b"".join(gzip.compress(body[start:start + 20_000]) for start in range(0, len(body), 20_000))


CODINGS = {
    "gzip": gzip.compress, "x-gzip": gzip.compress, "GZIP ": gzip.compress, "deflate": zlib.compress,
    "deflate, identity": _raw_deflate, "gzip, gzip": lambda body: gzip.compress(gzip.compress(body)),
    "deflate, gzip": lambda body: gzip.compress(zlib.compress(body)),
    "gzip, utf-8": lambda body: _members(body) + b"\0" * 9, "binary": bytes, "aws-chunked": bytes, "": bytes}


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_072, 300_001])
@pytest.mark.parametrize("coding", CODINGS)
def test_encoded_bodies_come_back_whole(site, coding, size):
    for body in (random.Random(size).randbytes(size), b"x" * size):
        site.pages["/coded"] = 200, {"Content-Encoding": coding}, CODINGS[coding](body)
        assert fetch(site.url("/coded"), HERE) == body


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip", "base64"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_that_is_labelled_but_not_encoded_is_taken_as_it_is(site, coding, format):
    body = encoded(picture(0), format)
    site.pages["/coded"] = 200, {"Content-Encoding": coding}, body
    assert fetch(site.url("/coded"), HERE) == body


@pytest.mark.parametrize(("coding", "body", "reason", "passing"), [
    ("br", b"\x1b\x0e\x00\x00picture", "bad encoding", False), ("zstd", b"\x28\xb5\x2f\xfd", "bad encoding", False),
    ("gzip", gzip.compress(BODY * 99, mtime=0)[:20], "connection broken", True),  # no time: names of tests must not change
    ("deflate", b"\xff" * 99, "bad encoding", False),
    ("gzip", b"\x1f\x8bnonsense", "bad encoding", False), (", ".join(["gzip"] * 4), BODY, "bad encoding", False),
])
def test_what_cannot_be_decoded_is_named(site, coding, body, reason, passing):
    site.pages["/coded"] = 200, {"Content-Encoding": coding}, body
    found = failure(site.url("/coded"))
    assert (found.reason, found.passing) == (reason, passing)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_compressed_bomb_is_too_large_in_little_memory(site, rounds):
    bomb = bytes(300_000_000)
    for _ in range(rounds):
        bomb = gzip.compress(bomb, 1)
    site.pages["/bomb"] = 200, {"Content-Encoding": ", ".join(["gzip"] * rounds)}, bomb
    tracemalloc.start()
    try:
        assert failure(site.url("/bomb"), Policy(max_bytes=5_000_000, allow=HERE.allow)).reason == "too large"
        assert tracemalloc.get_traced_memory()[1] < 15_000_000
    finally:
        tracemalloc.stop()
