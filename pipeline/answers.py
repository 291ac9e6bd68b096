"""What servers send, read as they mean it: early answers, loose header lines, compressed bodies. Standard library only."""

import http.client
import io
import re
import zlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import chain

PIECE = 65_536
_EARLY = 20  # answers of 1xx before the one that counts
_LINE = re.compile(rb"([!-9;-~]+)[ \t]*:(.*)", re.DOTALL)
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_UNREAD = {"br", "zstd", "compress", "x-compress", "dcb", "dcz"}  # nobody should send them to who asks for `identity`
_MOST_CODINGS = 3


class EncodingError(http.client.HTTPException):
    """A body whose Content-Encoding cannot be undone."""


class _Lines(io.BufferedReader):
    """A connection's bytes, where header lines that were put right come first."""

    def __init__(self, raw: io.RawIOBase):
        super().__init__(raw)
        self.ahead: deque[bytes] = deque()

    def readline(self, size: int | None = -1, /) -> bytes:
        return self.ahead.popleft() if self.ahead else super().readline(size)


class Answer(http.client.HTTPResponse):
    """The answer that counts. Early ones (102, 103 Early Hints) are passed over; http.client does so for 100 alone."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.fp: _Lines = _Lines(self.fp.detach())  # type: ignore[assignment]

    def _read_status(self):
        for _ in range(_EARLY):
            found = super()._read_status()  # type: ignore[misc]
            lines = http.client._read_headers(self.fp)  # type: ignore[attr-defined]
            if not 100 <= found[1] < 200 or found[1] == http.client.SWITCHING_PROTOCOLS:
                self.fp.ahead.extend(_put_right(lines))
                return found
        raise http.client.HTTPException(f"more than {_EARLY} early answers")

    def _read_next_chunk_size(self) -> int:
        size = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:  # of −1 bytes http.client would read without end
            raise ValueError(f"a chunk of {size} bytes")
        return size


def _put_right(lines: list[bytes]) -> Iterator[bytes]:
    """Header lines as RFC 9112, section 5, has a reader take them.

    No blanks before the colon or around the value, folded lines joined. What is no header line is left out: http.client
    would take all that follows it for the body, opt-outs and lengths too.
    """
    fields: list[bytes] = []
    for line in lines:
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1] += b" " + line.strip()
        elif found := _LINE.fullmatch(line):
            fields.append(found[1] + b": " + found[2].strip())
    yield from (re.sub(rb"[\r\n\0]", b" ", field) + b"\r\n" for field in fields)
    yield b"\r\n"


def pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body in pieces of at most PIECE bytes, its Content-Encoding undone.

    A label is believed only where the bytes agree: many pictures are sent as they are under `gzip` or `br`.
    """
    found: Iterator[bytes] = iter(partial(answer.read, PIECE), b"")
    codings = [one.strip().lower() for one in ",".join(answer.headers.get_all("Content-Encoding", [])).split(",")]
    codings = [one for one in codings if one in {"gzip", "x-gzip", "deflate"} | _UNREAD]
    if len(codings) > _MOST_CODINGS:
        raise EncodingError(f"{len(codings)} encodings, one in another")
    for coding in reversed(codings):
        found = _decoded(found, coding)
    return found


def _decoded(found: Iterator[bytes], coding: str) -> Iterator[bytes]:
    first = next(found, b"")
    found, window = chain([first], found), None
    if first.startswith(_PICTURES):
        return found
    if coding in _UNREAD and first:
        raise EncodingError(f"{coding} was not asked for and is not read")
    if first[:2] == b"\x1f\x8b":
        window = 16 + zlib.MAX_WBITS
    elif len(first) > 1 and first[0] & 15 == 8 and int.from_bytes(first[:2], "big") % 31 == 0:
        window = zlib.MAX_WBITS
    elif coding == "deflate" and first:  # some servers leave zlib's two bytes out
        window = -zlib.MAX_WBITS
    return found if window is None else _inflated(found, window, coding)


def _inflated(found: Iterator[bytes], window: int, coding: str) -> Iterator[bytes]:
    """Never more than PIECE bytes at a time, so that a bomb is as small in memory as the limit of who reads."""
    engine = zlib.decompressobj(window)
    try:
        for piece in found:
            while piece:
                if engine.eof:
                    if piece[:1] != b"\x1f" or window <= zlib.MAX_WBITS:
                        break  # padding; a further member of a gzip file would begin so
                    engine = zlib.decompressobj(window)
                yield engine.decompress(piece, PIECE)
                piece = engine.unused_data or engine.unconsumed_tail
        yield engine.flush()
    except zlib.error as error:
        raise EncodingError(f"{coding}: {error}") from None
    if not engine.eof:
        raise http.client.IncompleteRead(b"")
