"""On PYTHONPATH: every Python process notes whom it looks up or connects to, and reaches nothing beyond this machine."""

import os
import socket
import sys


def _here(host) -> bool:
    host = (host.decode() if isinstance(host, bytes) else host) or "localhost"
    return host in ("localhost", "::1", "::", "0.0.0.0", "::ffff:127.0.0.1") or host.startswith("127.")


def _refuse(what: str, host) -> None:
    with open(os.environ["LOOK_UPS"], "a") as log:  # noqa: PTH123
        log.write(f"{what} {host!r} by {' '.join(sys.argv)[:200]}\n")
    raise OSError(f"no network in this test: {what} {host!r}")


def _guarded(what: str, real):
    def look_up(host, *rest, **named):
        return real(host, *rest, **named) if _here(host) else _refuse(what, host)

    return look_up


def _guarded_socket(what: str, real):
    def send(self, *given):
        address = given[-1]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _here(address[0]):
            _refuse(what, address)
        return real(self, *given)

    return send


for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
    setattr(socket, name, _guarded(name, getattr(socket, name)))
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, _guarded_socket(name, getattr(socket.socket, name)))
