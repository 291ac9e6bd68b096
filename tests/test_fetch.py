"""Every rule of fetching against a real server; 127.0.0.2 stands for a private address."""

import errno
import shutil
import socket
import ssl
import subprocess
import sys
import time

import pytest
from webserver import serving

from pipeline import fetch as fetching
from pipeline.fetch import Failure, Policy, fetch, refused

HERE = Policy(timeout=2, deadline=4, allow=("127.0.0.1",))


@pytest.fixture(scope="module")
def site():
    with serving() as site:
        yield site


@pytest.fixture(scope="module")
def private():
    with serving("127.0.0.2") as site:
        site.pages["/secret"] = b"secret"
        yield site


def failure(url: str, policy: Policy = HERE, retries: int = 0) -> Failure:
    with pytest.raises(Failure) as caught:
        fetch(url, policy, retries)
    return caught.value


def test_body_comes_back_whole_through_redirects_and_odd_paths(site):
    body = bytes(range(256)) * 1000
    site.pages["/a b/ü.jpg"] = body
    site.pages["/from"] = 302, {"Location": "/via"}, b""
    site.pages["/via"] = 308, {"Location": site.url("/a%20b/%C3%BC.jpg")}, b""
    site.pages["/raw"] = 302, {"Location": "/a b/ü.jpg".encode().decode("latin-1")}, b""
    assert fetch(site.url("/from"), HERE) == body
    assert fetch(site.url("/raw"), HERE) == body
    assert fetch(site.url("/a b/ü.jpg"), HERE) == body


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,AAAA", "/etc/passwd"])
def test_only_http_and_https(url):
    assert failure(url).reason == "refused scheme"


def test_redirect_to_a_file_is_refused(site):
    site.pages["/file"] = 302, {"Location": "file:///etc/passwd"}, b""
    assert failure(site.url("/file")).reason == "refused scheme"


@pytest.mark.parametrize("url", ["http://", "http://[::1/", "http://127.0.0.1:port/", "http://a b/",
                                 "http://" + "a" * 70 + ".com/"])
def test_bad_urls_have_their_class(url):
    assert failure(url).reason in {"bad url", "dns"}


def test_private_address_is_never_connected_to(site, private):
    port = private.server_port
    site.pages["/hop"] = 301, {"Location": private.url("/secret")}, b""
    for url in (private.url("/secret"), site.url("/hop"), f"http://2130706434:{port}/secret", f"http://127.2:{port}/secret",
                f"http://0x7f.0.0.2:{port}/secret", f"http://[::ffff:127.0.0.2]:{port}/secret"):
        assert failure(url).reason == "refused address", url
    assert private.connections == 0
    assert fetch(site.url("/hop"), Policy(allow=("127.0.0.0/30",))) == b"secret"


def test_one_private_address_among_several_refuses_the_name(site, private, monkeypatch):
    public, hidden = (socket.getaddrinfo(*s.server_address, type=socket.SOCK_STREAM) for s in (site, private))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: public + hidden)
    before = site.connections
    assert failure("http://example.com/").reason == "refused address"
    assert site.connections == before


def test_connects_to_the_address_that_was_judged(site, private, monkeypatch):
    """A name server that gives a good address first and a private one next gains nothing: it is asked once."""
    site.pages["/x"] = b"public"
    addresses = iter(["127.0.0.1", "127.0.0.2"])
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **named: real(next(addresses), *rest, **named))
    assert fetch(f"http://rebinding.example:{site.server_port}/x", HERE) == b"public"
    assert next(addresses) == "127.0.0.2"


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "0.0.0.0",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.0.192", "168.63.129.16", "::", "::1", "::127.0.0.1", "fe80::1%eth0",
    "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::",
])
def test_addresses_that_are_not_public_are_refused(address):
    assert refused(address, ())


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_not(address):
    assert not refused(address, ())


def test_allowing_is_exact_or_by_block():
    assert not refused("::ffff:127.0.0.1", ("127.0.0.1",))
    assert refused("127.0.0.2", ("127.0.0.1",))
    assert not refused("10.1.2.3", ("10.0.0.0/8",))


def test_opted_out_is_not_asked_again(site):
    site.pages["/optout"] = 200, {"X-Robots-Tag": "nofollow\n*: noai"}, b"picture"
    assert failure(site.url("/optout"), retries=3).reason == "opted out"
    assert site.hits["/optout"] == 1


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (410, 1), (503, 3), (429, 3)])
def test_only_passing_failures_are_tried_again(site, status, tries):
    path = f"/status{status}"
    site.pages[path] = status, {}, b""
    assert str(failure(site.url(path), retries=2)) == f"http {status}"
    assert site.hits[path] == tries


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_the_headers_of_an_error_page_opt_nothing_out(site, status):
    site.pages["/page"] = status, {"X-Robots-Tag": "noai, none", "TDM-Reservation": "1"}, b""
    assert failure(site.url("/page")).reason == f"http {status}"


@pytest.mark.parametrize(("name", "asked"), [
    ("straße.example", "xn--strae-oqa.example"), ("FAẞ.example", "xn--fa-hia.example"),
    ("bücher.example", "xn--bcher-kva.example"), ("b%C3%BCcher.example", "xn--bcher-kva.example"),
    ("βόλος.example", "xn--nxasmm1c.example"),
    ("ＷＷＷ。日本語．example", "www.xn--wgv71a119e.example"), ("i❤.example", "xn--i-7iq.example"),
    ("a_b.example", "a_b.example"),
])
def test_a_name_is_asked_for_as_browsers_do(site, monkeypatch, name, asked):
    """The right-hand side is what WHATWG's URL standard gives; IDNA 2003 asks another site for the names with ß and ς."""
    real, names = socket.getaddrinfo, []
    monkeypatch.setattr(socket, "getaddrinfo",
                        lambda host, *rest, **named: names.append(host) or real("127.0.0.1", *rest, **named))
    site.pages["/host"] = lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + handler.headers["Host"].encode())
    site.pages["/to-host"] = 302, {"Location": f"http://{name}:{site.server_port}/host".encode().decode("latin-1")}, b""
    for url in (f"http://{name}:{site.server_port}/host", site.url("/to-host")):
        assert fetch(url, HERE).decode() == f"{asked}:{site.server_port}"
    assert names == [asked, "127.0.0.1", asked]


def test_want_of_open_files_is_not_the_fault_of_a_server(site, tmp_path):
    """Neither for an address nor for a name: without a file the system's resolver cannot even read its settings."""
    code = ("import os, resource, sys\nfrom pipeline.fetch import Policy, fetch\n"
            "while True:\n    try: os.dup(0)\n    except OSError: break\n"
            "try: fetch(sys.argv[1], Policy(allow=('127.0.0.1', '::1')))\n"
            "except OSError as error: print(error.errno)\nexcept Exception as error: print(error)")
    for host in ("127.0.0.1", "no-such-host.invalid"):
        words = ["bash", "-c", 'ulimit -n 64; exec "$@"', "-", sys.executable, "-c", code, f"http://{host}:{site.server_port}/"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"{errno.EMFILE}\n", done


def test_too_large_is_refused_before_it_is_read(site):
    site.pages["/huge"] = 200, {"Content-Length": str(10**10)}, b""
    assert failure(site.url("/huge")).reason == "too large"


def _endless(pause: float, piece: bytes):
    def talk(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(piece)
            time.sleep(pause)
    return talk


def test_endless_bodies_end(site):
    site.pages["/endless"] = _endless(0, b"x" * 65536)
    site.pages["/drip"] = _endless(0.05, b"x")
    assert failure(site.url("/endless"), Policy(max_bytes=10**6, allow=HERE.allow)).reason == "too large"
    began = time.monotonic()
    assert failure(site.url("/drip"), Policy(timeout=1, deadline=0.5, allow=HERE.allow)).reason == "timeout"
    assert time.monotonic() - began < 2


def test_endless_headers_and_silence_end(site):
    def drip(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.05)

    site.pages["/headers"] = drip
    site.pages["/silence"] = lambda handler: time.sleep(1)
    quick = Policy(timeout=0.3, deadline=0.6, allow=HERE.allow)
    assert failure(site.url("/headers"), quick).reason == "timeout"
    assert failure(site.url("/silence"), quick).reason == "timeout"


def test_redirects_without_end(site):
    site.pages["/loop"] = 302, {"Location": "/loop"}, b""
    assert failure(site.url("/loop")).reason == "too many redirects"
    assert site.hits["/loop"] == 10


def test_a_body_cut_short_is_not_taken_for_whole(site):
    site.pages["/short"] = 200, {"Content-Length": "1000"}, b"only this"
    found = failure(site.url("/short"))
    assert (found.reason, found.passing) == ("connection broken", True)


def test_network_failures_have_plain_names(site):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert failure(f"http://127.0.0.1:{closed.getsockname()[1]}/").reason == "connection refused"
    assert failure("http://no-such-host.invalid/").reason == "dns"
    site.pages["/garbage"] = lambda handler: handler.wfile.write(b"\x00\x01\x02 garbage\r\n\r\n")
    assert failure(site.url("/garbage")).reason == "not http"
    site.pages["/hangup"] = lambda handler: None
    assert failure(site.url("/hangup")).reason == "connection broken"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_tls_is_verified_by_name_though_the_socket_goes_to_an_address(site, tmp_path, monkeypatch):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost", "-out", certificate, "-keyout", key],
                   check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    fetching._tls.cache_clear()
    with serving() as secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.pages["/x"] = b"through TLS"
        secure.pages["/drip"] = _endless(0.05, b"x")
        policy = Policy(timeout=1, deadline=0.8, allow=("127.0.0.1", "::1"))
        assert fetch(f"https://localhost:{secure.server_port}/x", policy) == b"through TLS"
        assert failure(f"https://127.0.0.1:{secure.server_port}/x", policy).reason == "tls"
        assert failure(f"https://localhost:{secure.server_port}/drip", policy).reason == "timeout"
    fetching._tls.cache_clear()
