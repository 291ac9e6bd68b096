"""robots.txt (RFC 9309), fetched under the same rules as everything else and asked before each hop. Protego reads it."""

import re
import threading
from dataclasses import replace
from urllib.parse import urldefrag, urlsplit, urlunsplit

from protego import Protego

from pipeline.fetch import Failure, Policy, fetch

_MAX_BYTES = 512_000  # RFC 9309 asks for 500 kibibytes; what comes after is not read
_AGENT = re.compile(r"\b(?!Mozilla)[A-Za-z][\w-]*/[\w.]+")  # rules for `uniclip` and for `uniclip/0.1` are ours


class Robots:
    """Remembers each site's answer for as long as it lives: a shard, so minutes, where RFC 9309 allows a day. For threads."""

    def __init__(self, policy: Policy):
        self._policy = replace(policy, max_bytes=_MAX_BYTES, rules=True)
        named = _AGENT.search(policy.user_agent)
        self._agent = named[0] if named else "uniclip"
        self._sites: dict[str, Protego | Failure] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def judge(self, url: str) -> None:
        """Raises Failure where the site does not want us to fetch `url`, or cannot be asked (RFC 9309: then it may not)."""
        parts = urlsplit(url.strip())
        site = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        with self._lock:
            lock = self._locks.setdefault(site, threading.Lock())
        with lock:
            if site not in self._sites:
                self._sites[site] = self._ask(site)
        rules = self._sites[site]
        if isinstance(rules, Failure):
            raise rules
        if not rules.can_fetch(urldefrag(url)[0], self._agent):
            raise Failure("robots.txt")

    def _ask(self, site: str) -> Protego | Failure:
        try:
            body = fetch(f"{site}/robots.txt", self._policy)
        except Failure as failure:
            if failure.reason.startswith("http 4") and not failure.passing:
                return Protego()  # no rules: everything may be fetched
            return failure
        if len(body) == _MAX_BYTES:
            body = body[:body.rfind(b"\n") + 1]  # half a rule is another rule
        return Protego.parse(body.decode("utf-8-sig", "replace"))
