"""A real web server on loopback whose answers a test chooses, and which counts what it is asked."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

Answer = bytes | tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]


class Site(ThreadingHTTPServer):
    """`pages` maps a path to a body, to (status, headers, body), or to a function that talks to the socket itself."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str = "127.0.0.1"):
        super().__init__((address, 0), _Handler)
        self.pages: dict[str, Answer] = {}
        self.hits: Counter[str] = Counter()
        self.connections = 0

    def url(self, path: str) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}{path}"

    def verify_request(self, *_) -> bool:
        self.connections += 1
        return True

    def handle_error(self, *_) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        path = unquote(self.path)
        self.server.hits[path] += 1
        answer = self.server.pages.get(path, (404, {}, b"no such page"))
        if callable(answer):
            answer(self)
            return
        status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
        self.send_response(status)
        for name, values in {"Content-Length": str(len(body)), **headers}.items():
            for value in values.split("\n"):  # one header a line
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(address: str = "127.0.0.1") -> Iterator[Site]:
    """A site that serves while the block runs."""
    site = Site(address)
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
        thread.join()
