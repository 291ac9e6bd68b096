"""What may be fetched: schemes, addresses, sizes, time, opt-outs.

Nearly standard library alone. Redirects are followed by hand, and the socket is connected by hand, because every hop and
every resolved address has to be judged *before* anything is sent to it; no HTTP library offers that hook.
"""

import errno
import functools
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

import idna

from pipeline.answers import Answer, EncodingError, pieces
from pipeline.optouts import opted_out, reserved

USER_AGENT = "Mozilla/5.0 (compatible; uniclip/0.1; image-text dataset builder)"
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_HOPS = 10
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
LARGE = 4_000_000  # bytes; hardly one image in a thousand of the web
_LEGAL = "%/:=&?~+!$,;'@()*[]"  # in a path or query, besides letters, digits and _.-

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Reachable from inside a cloud machine only, though the registry counts them as global: Azure's and Oracle's metadata.
_METADATA = tuple(ipaddress.ip_network(n) for n in ("168.63.129.16/32", "192.0.0.0/24"))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Policy:
    """One download's rules. timeout: seconds without a byte; deadline: seconds for one try with all its redirects.

    rules: robots.txt is what is fetched; a longer one is cut, and headers that keep it out of search results say nothing.
    """

    timeout: float = 10.0
    deadline: float = 40.0
    max_bytes: int = 50_000_000
    allow: tuple[str, ...] = ()
    user_agent: str = USER_AGENT
    rules: bool = False


class Failure(Exception):
    """A URL that gave nothing. `reason` is one of a small set of plain-word classes; `passing` ones merit a retry."""

    def __init__(self, reason: str, detail: str = "", passing: bool = False):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.passing = reason, passing


def fetch(url: str, policy: Policy, retries: int = 0, judge: Callable[[str], None] | None = None,
          large: Callable[[], None] | None = None) -> bytes:
    """The body behind `url`, at most `policy.max_bytes`. Raises Failure; only passing failures are tried again.

    judge: called with the URL of each hop before it is made, may raise Failure. large: called when a body turns out to
    have more than LARGE bytes, and may wait until there is room for it.
    """
    for left in range(retries, -1, -1):
        try:
            return _follow(url, policy, judge, large)
        except Failure as failure:
            if not (failure.passing and left):
                raise
    raise AssertionError("unreachable")


def may_heal(reason: str) -> bool:
    """Whether a failure of this class is worth trying again another day."""
    status = reason.removeprefix("http ")
    return reason in _PASSING or status.isdecimal() and int(status) in _PASSING_STATUS


def _follow(url: str, policy: Policy, judge: Callable[[str], None] | None, large: Callable[[], None] | None) -> bytes:
    end = time.monotonic() + policy.deadline
    for _ in range(_MAX_HOPS):
        try:
            found = _hop(url, policy, end, judge, large)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _named(error) from None
        if isinstance(found, bytes):
            return found
        url = found
    raise Failure("too many redirects", f"more than {_MAX_HOPS}")


def _hop(url: str, policy: Policy, end: float, judge: Callable[[str], None] | None,
         large: Callable[[], None] | None) -> bytes | str:
    """One request: the body, or the URL it redirects to."""
    parts = urlsplit(url.strip())
    if parts.scheme not in {"http", "https"}:
        raise Failure("refused scheme", parts.scheme or "none")
    if not parts.hostname:
        raise Failure("bad url", "no host")
    if judge:
        judge(url)
    connection = _CheckedConnection(_ascii(parts.hostname), parts.port, parts.scheme == "https", policy, end)
    try:
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_LEGAL)
        connection.request("GET", target, headers={"User-Agent": policy.user_agent, "Accept": "image/*,*/*;q=0.5",
                                                   "Connection": "close"})
        return _answer(connection.getresponse(), url, policy, large)
    finally:
        connection.close()


def _ascii(host: str) -> str:
    """A name as the DNS has it: IDNA 2008 after UTS 46, as browsers do; signs that IDNA lacks (emoji) in plain Punycode."""
    host = unquote(host)
    if host.isascii():
        return host
    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        labels = idna.uts46_remap(host, std3_rules=False).split(".")
        return ".".join(one if one.isascii() else f"xn--{one.encode('punycode').decode()}" for one in labels)


def _answer(response: http.client.HTTPResponse, url: str, policy: Policy, large: Callable[[], None] | None) -> bytes | str:
    # Headers of an error page speak of that page: a picture that is there again tomorrow is not opted out today.
    if not policy.rules and (200 <= response.status < 300 or response.status in _REDIRECTS) and (
            opted_out(response.headers.get_all("X-Robots-Tag", []), policy.user_agent)
            or reserved(response.headers.get_all("TDM-Reservation", []))):
        raise Failure("opted out")
    if response.status in _REDIRECTS and (location := response.headers.get("Location")):
        return urljoin(url, quote(location, safe=_LEGAL + "#", encoding="latin-1"))  # headers arrive as Latin-1
    if not 200 <= response.status < 300:
        raise Failure(f"http {response.status}", passing=response.status in _PASSING_STATUS)
    return _body(response, policy, large)


def _body(response: http.client.HTTPResponse, policy: Policy, large: Callable[[], None] | None) -> bytes:
    limit = policy.max_bytes
    if (response.length or 0) > limit and not policy.rules:
        raise Failure("too large", f"{response.length} bytes announced")
    body = bytearray()
    for piece in pieces(response):
        body += piece
        if large and len(body) > LARGE:
            large()
            large = None
        if len(body) > limit:
            if policy.rules:
                return bytes(body[:limit])
            raise Failure("too large", f"more than {limit} bytes")
    if response.length:  # http.client does not raise on a short body when it is read in pieces
        raise Failure("connection broken", f"{response.length} bytes missing", passing=True)
    return bytes(body)


_NAMES: tuple[tuple[type[Exception], str, bool], ...] = (  # first match wins
    (socket.gaierror, "dns", True),
    (TimeoutError, "timeout", True),
    (ssl.SSLError, "tls", False),
    (ConnectionRefusedError, "connection refused", True),
    (ConnectionError, "connection broken", True),
    (http.client.InvalidURL, "bad url", False),
    (http.client.IncompleteRead, "connection broken", True),
    (EncodingError, "bad encoding", False),
    (http.client.HTTPException, "not http", False),
    (OSError, "unreachable", True),
    (ValueError, "bad url", False),
)
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_PASSING = {reason for _, reason, passing in _NAMES if passing}


def _named(error: Exception) -> Failure:
    """Any exception of the standard library's network stack as one of our classes. Raises it where this machine is to blame."""
    if isinstance(error, socket.gaierror):
        socket.socket().close()  # no name is found either where no more files may be opened: then this raises
    if isinstance(error, OSError) and error.errno in _OURS and not isinstance(error, socket.gaierror):
        raise error
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
        return Failure("timeout", passing=True)
    reason, passing = next((reason, passing) for kind, reason, passing in _NAMES if isinstance(error, kind))
    return Failure(reason, str(error), passing)


@functools.cache
def networks(allow: tuple[str, ...]) -> tuple[Network, ...]:
    """Exact addresses or CIDR blocks. Raises ValueError for anything else."""
    return tuple(ipaddress.ip_network(text) for text in allow)


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, NAT64), otherwise the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def refused(address: str, allow: tuple[str, ...]) -> bool:
    """Whether `address` is none of the public internet's (loopback, private, link-local, metadata…) and not allowed."""
    ip = _embedded(ipaddress.ip_address(address.partition("%")[0]))
    if any(ip in network for network in networks(allow)):
        return False
    return (not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_unspecified
            or getattr(ip, "is_site_local", False) or any(ip in network for network in _METADATA))


class _Paced:
    """A socket that, before each read, allows no more than what is left until `end` (time.monotonic seconds)."""

    end = float("inf")
    patience = 10.0

    def recv_into(self, *args, **kwargs):
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        self.settimeout(min(left, self.patience))  # type: ignore[attr-defined]
        return super().recv_into(*args, **kwargs)  # type: ignore[misc]


class _Socket(_Paced, socket.socket):
    pass


class _TLSSocket(_Paced, ssl.SSLSocket):
    pass


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TLSSocket
    return context


class _CheckedConnection(http.client.HTTPConnection):
    """Resolves once, judges every address, connects to one that was judged; the name serves TLS and Host only."""

    response_class = Answer

    def __init__(self, host: str, port: int | None, tls: bool, policy: Policy, end: float):
        self.default_port = http.client.HTTPS_PORT if tls else http.client.HTTP_PORT
        super().__init__(host, port or self.default_port, timeout=policy.timeout)  # a port of None is looked for in `host`
        self._wants_tls, self._policy, self._end = tls, policy, end

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for *_, where in found:
            if refused(str(where[0]), self._policy.allow):
                raise Failure("refused address", f"{self.host} is {where[0]}")
        plain = self._first_reached(found)
        try:
            self.sock = _tls().wrap_socket(plain, server_hostname=self.host) if self._wants_tls else plain
        except BaseException:
            plain.close()
            raise
        self.sock.end, self.sock.patience = self._end, self._policy.timeout  # type: ignore[attr-defined]

    def _first_reached(self, found: list) -> socket.socket:
        last: OSError = OSError(f"{self.host} has no address")
        for family, kind, protocol, _, where in found:
            tried = _Socket(family, kind, protocol)
            try:
                tried.settimeout(max(0.001, min(self._policy.timeout, self._end - time.monotonic())))
                tried.connect(where)
                return tried
            except OSError as error:
                tried.close()
                last = error
        raise last
