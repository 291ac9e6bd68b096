"""Servers as the wild has them: raw bytes from sockets, each URL with the outcome that the server's own plan wants."""

import gzip
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conftest import encoded, picture

STORED = "stored"
JPEG = encoded(picture(0))
OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(JPEG)
END = b"\r\n"
Reply = bytes | Callable[[socket.socket], None]
OPT_OUTS = ["noai", "noai=1", '"noai"', "noai.", "NoImageAI", "no-ai", "none", "uniclip : noai", "*: nofollow; noindex",
            "unavailable_after: 2015-10-21T07:28:00Z, noai", "otherbot: all, uniclip/0.1: noml", "tdm-reservation: 1"]
NO_OPT_OUTS = ["all", "otherbot: noai, none", "max-snippet: none", "tdm-reservation: 0", "nofollow, noarchive"]


def _chunked(body: bytes, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    parts = (body[start:start + 333] for start in range(0, len(body), 333))
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n" + trailer + b"\r\n"


def _raw_deflate(body: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(body) + engine.flush()


def _forever(start: bytes, piece: bytes, pause: float) -> Callable:
    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(pause)
    return talk


def _coded(coding: bytes, body: bytes) -> bytes:
    return OK + b"Content-Encoding: " + coding + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _status(status: int, lines: bytes = b"", body: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\n%sContent-Length: %d\r\n\r\n" % (status, lines, len(body)) + body


def heads() -> dict[str, tuple[Reply, str]]:
    """Kind → (reply, outcome): early answers, loose heads, lengths and chunks."""
    chunks, whole = OK + b"Transfer-Encoding: chunked\r\n\r\n", OK + LENGTH + END + JPEG
    return {
        "plain": (whole, STORED), "103": (b"HTTP/1.1 103 Early Hints\r\nLink: <s>\r\n\r\n" + whole, STORED),
        "102": (b"HTTP/1.1 102 X\r\n\r\n" * 5 + whole, STORED),
        "100-103": (b"HTTP/1.1 100 X\r\n\r\nHTTP/1.1 103 X\r\n\r\n" + whole, STORED),
        "103-only": (b"HTTP/1.1 103 X\r\n\r\n", "connection broken"),
        "103-flood": (b"HTTP/1.1 103 X\r\n\r\n" * 999, "not http"),
        "103-noai": (b"HTTP/1.1 103 X\r\nX-Robots-Tag: noai\r\n\r\n" + whole, STORED), "101": (_status(101), "http 101"),
        "loose": (OK + b"Content-Length : %d \r\n\r\n" % len(JPEG) + JPEG, STORED),
        "bare-lf": (whole.replace(END, b"\n", 3), STORED),
        "folded": (OK + b"X: a\r\n b\r\n" + LENGTH + END + JPEG, STORED),
        "no-header": (OK + b"what is this\r\n" + LENGTH + END + JPEG, STORED),
        "no-length": (OK + END + JPEG, STORED), "1.0": (b"HTTP/1.0 200\r\n\r\n" + JPEG, STORED),
        "length-word": (OK + b"Content-Length: many\r\n\r\n" + JPEG, STORED),
        "length-minus": (OK + b"Content-Length: -5\r\n\r\n" + JPEG, STORED),
        "length-short": (OK + b"Content-Length: %d\r\n\r\n" % (len(JPEG) // 2) + JPEG, "broken image"),
        "length-long": (OK + b"Content-Length: 99999\r\n\r\n" + JPEG, "connection broken"),
        "length-huge": (OK + b"Content-Length: 99999999999\r\n\r\n", "too large"),
        "chunks": (chunks + _chunked(JPEG, b";a=b", b"X: y\r\n"), STORED),
        "chunks-cut": (chunks + _chunked(JPEG)[:-9], "connection broken"),
        "chunks-blank": (OK + b"Transfer-Encoding : Chunked \r\n\r\n" + _chunked(JPEG), STORED),
        "chunks-words": (chunks + b"zz\r\n" + JPEG, "connection broken"),
        "chunks-huge": (chunks + b"ffffffffff\r\n" + JPEG, "connection broken"),
        "chunks-minus": (_forever(chunks + b"-1\r\n", bytes(1 << 16), 0), "connection broken"),
        "chunks-none": (chunks + b"0\r\n\r\n", "not an image"), "hang-up": (b"", "connection broken"),
        "half-head": (b"HTTP/1.1 20", "not http"),
        "not-http": (b"SSH-2.0-OpenSSH_9.6\r\n", "not http"), "binary": (bytes(range(256)), "not http"),
        "headers-flood": (_forever(OK, b"A: b\r\n", 0), "not http"),
        "header-long": (OK + b"A: " + b"x" * 99_999 + b"\r\n\r\n", "not http"),
        "header-drip": (_forever(OK + b"A: ", b"x", 0.2), "timeout"), "body-drip": (_forever(OK + LENGTH + END, b"x", 0.2),
        "timeout"),
        "103-drip": (_forever(b"", b"HTTP/1.1 103 X\r\n\r\n", 0.7), "timeout"), "silence": (lambda _: time.sleep(4), "timeout"),
        "endless": (_forever(OK + END, bytes(1 << 18), 0), "too large"), "html": (_status(200, body=b"<html>sorry</html>"),
        "not an image"),
    }


def bodies() -> dict[str, tuple[Reply, str]]:
    """Kind → (reply, outcome): encodings, opt-outs, error pages with opt-outs."""
    bomb, twice = gzip.compress(bytes(200_000_000)), gzip.compress(gzip.compress(bytes(200_000_000)))
    found: dict[str, tuple[Reply, str]] = {
        "gzip": (_coded(b"gzip", gzip.compress(JPEG)), STORED), "x-gzip": (_coded(b"X-GZIP ", gzip.compress(JPEG)), STORED),
        "deflate": (_coded(b"deflate", zlib.compress(JPEG)), STORED),
        "raw-deflate": (_coded(b"deflate", _raw_deflate(JPEG)), STORED),
        "gzip-twice": (_coded(b"gzip, gzip", gzip.compress(gzip.compress(JPEG))), STORED),
        "gzip-label": (_coded(b"gzip", JPEG), STORED),
        "br-label": (_coded(b"br", JPEG), STORED), "br": (_coded(b"br", b"\x1b\x0e\0\0text"), "bad encoding"),
        "utf-8": (_coded(b"utf-8", JPEG), STORED), "gzip-cut": (_coded(b"gzip", gzip.compress(JPEG)[:-40]),
        "connection broken"),
        "gzip-broken": (_coded(b"gzip", b"\x1f\x8b" + JPEG), "bad encoding"), "gzip-bomb": (_coded(b"gzip", bomb), "too large"),
        "gzip-bomb-twice": (_coded(b"gzip, gzip", twice), "too large"), "deflate-noise": (_coded(b"deflate", b"\xff" * 500),
        "bad encoding")}
    for number, value in enumerate(OPT_OUTS):
        line = b"X-Robots-Tag: " + value.encode() + END
        found[f"out-{number}"] = OK + line + LENGTH + END + JPEG, "opted out"
        found[f"out-blank-{number}"] = OK + b"nonsense\r\n" + line.replace(b":", b" :", 1) + LENGTH + END + JPEG, "opted out"
        found[f"out-hop-{number}"] = _status(302, b"Location: /plain/0\r\n" + line), "opted out"
        for status in (404, 429, 503):
            found[f"error-{status}-{number}"] = _status(status, line), f"http {status}"
    for number, value in enumerate(NO_OPT_OUTS):
        found[f"in-{number}"] = OK + b"X-Robots-Tag: " + value.encode() + END + LENGTH + END + JPEG, STORED
    found["tdm"] = OK + b"tdm-reservation : 1\r\n" + LENGTH + END + JPEG, "opted out"
    found["no-tdm"] = OK + b"tdm-reservation: 0\r\n" + LENGTH + END + JPEG, STORED
    return found


def redirects(port: int, secret: int) -> dict[str, tuple[Reply, str]]:
    """Kind → (reply, outcome). port: of the good server; secret: of the private one."""
    good = ["/to/0", "/to/0 ", f"//127.0.0.1:{port}/to/0", f" http://127.0.0.1:{port}/to/0#part \t", "../to/0", "\r\n /to/0"]
    private = [f"http://{host}:{secret}/" for host in (
        "127.0.0.2", "2130706434", "0x7f.0.0.2", "0177.0.0.2", "127.2", "[::ffff:127.0.0.2]",
        "１２７.０.０.２", "%31%32%37.0.0.2", "127.0.0.1@127.0.0.2", "127。0。0。2")]
    private += [f"//127.0.0.2:{secret}/", "http://169.254.169.254/latest/", "http://10.0.0.1/",
                "http://[fe80::1]/", "http://100.100.100.200/"]
    schemes = ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://127.0.0.1/", "data:image/png;base64,AA", "javascript:0"]
    found: dict[str, tuple[Reply, str]] = {"to": (OK + LENGTH + END + JPEG, STORED)}
    for status in (301, 302, 303, 307, 308):
        for kind, places, outcome in (("good", good, STORED), ("private", private, "refused address"),
                                      ("scheme", schemes, "refused scheme")):
            for number, place in enumerate(places):
                found[f"{kind}-{status}-{number}"] = _status(status, b"Location: " + place.encode() + END), outcome
        found[f"nowhere-{status}"] = _status(status), f"http {status}"
    found |= {f"no-redirect-{status}": (_status(status, b"Location: /to/0\r\n"), f"http {status}")
              for status in (300, 304, 305, 404)}
    many = "too many redirects"
    found |= {f"hop{left}": (_status(302, f"Location: /hop{left - 1}/0\r\n".encode()), STORED if left < 10 else many)
              for left in range(1, 12)}
    return found | {"hop0": (OK + LENGTH + END + JPEG, STORED), "circle": (_status(301, b"Location: ?\r\n"), many)}


class Wild(socketserver.ThreadingTCPServer):
    """Replies by kind, the first part of the path; `hits` counts whole paths, `connections` whoever knocks."""

    request_queue_size, daemon_threads, allow_reuse_address = 512, True, True

    def __init__(self, address: str, replies: dict[str, Reply]):
        super().__init__((address, 0), _Talk)
        self.replies, self.hits, self.connections = replies, Counter(), 0

    def verify_request(self, *_) -> bool:
        self.connections += 1
        return True

    def handle_error(self, *_) -> None:
        """Clients that hang up are part of the drill."""


class _Talk(socketserver.StreamRequestHandler):
    server: Wild

    def handle(self) -> None:
        path = self.rfile.readline().split(b" ")[1].decode()
        while self.rfile.readline().strip():
            pass
        self.server.hits[path] += 1
        reply = self.server.replies[path.split("/")[1].partition("?")[0]]
        if isinstance(reply, bytes):
            self.connection.sendall(reply)
        else:
            reply(self.connection)


class Names(socketserver.UDPServer):
    """A name server whose names are at 127.0.0.1 when first asked for and at 127.0.0.2 from then on; `two.…` is at both."""

    def __init__(self):
        super().__init__(("127.0.0.1", 53), _Name)
        self.asked = Counter()


class _Name(socketserver.BaseRequestHandler):
    server: Names

    def handle(self) -> None:
        query, reply = self.request
        end = query.index(b"\0", 12)
        kind, name = query[end + 2], query[12:end]
        addresses: list[bytes] = []
        if kind == 1:  # A; there are no IPv6 addresses
            here, private = b"\x7f\0\0\1", b"\x7f\0\0\2"
            addresses = [here, private] if b"two" in name else [private if self.server.asked[name] else here]
            self.server.asked[name] += 1
        head = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses), 0, 0)
        records = (b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + address for address in addresses)
        reply.sendto(head + query[12:end + 5] + b"".join(records), self.client_address)


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator:
    """Serves while the block runs."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
